// Cells, the pixels between two low-resolution rows and columns: which classes can win in each of
// them, and the winners at a tile's pixels. Inside a cell every class is a blend of its four
// corners, so that most classes are ruled out without evaluating them.
#pragma once

#include "../score_maps.h"
#include "bilinear_tiles.h"

namespace dagcore {

// One low-resolution row of every class, (C, padded): the scores, and the smaller and the larger of
// each score and its right neighbour. These are infinite if the sum of the two is not finite, so
// that the class is never ruled out and rules none out.
template <typename Real>
struct ScoreRow {
  std::vector<Real> scores, least, most;
  ScoreRow(int64_t classes, int64_t padded)
      : scores(classes * padded + kLanes), least(classes * padded), most(classes * padded) {}
};

// out: (C, padded); padded is a multiple of kLanes and above the width.
template <typename T>
DAGCORE_INLINE void read_scores(const T* scores, int64_t class_stride, int64_t column_stride,
                                int64_t classes, int64_t width, int64_t padded, RealOf<T>* out) {
  for (int64_t c = 0; c < classes; ++c) {
    const T* from = scores + c * class_stride;
    RealOf<T>* to = out + c * padded;
    for (int64_t x = 0; x < width; ++x) to[x] = Pixel<T>::load(from[x * column_stride]);
    to[width] = to[width - 1];  // the last column is its own neighbour
  }
}

// `step` columns lie between neighbours.
template <typename T>
DAGCORE_INLINE void read_row(const T* scores, int64_t class_stride, int64_t column_stride,
                             int64_t classes, int64_t width, int64_t padded, int64_t step,
                             ScoreRow<RealOf<T>>* row) {
  using Real = RealOf<T>;
  read_scores(scores, class_stride, column_stride, classes, width, padded, row->scores.data());
  const auto* from = row->scores.data();
  Real *least = row->least.data(), *most = row->most.data();
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  for (int64_t i = 0; i < classes * padded; ++i) {
    const Real a = from[i], b = from[i + step];
    const bool finite = (a + b) - (a + b) == 0;
    least[i] = finite ? (a < b ? a : b) : -kInfinity;
    most[i] = finite ? (a > b ? a : b) : kInfinity;
  }
}

// For each cell of a row: which classes can win (or come second, with kSecond) in it.
// above, below: the rows of the cells' corners; floors (2, padded): scratch; keep (C, padded):
// result, bytes
template <typename Real, bool kSecond>
DAGCORE_INLINE void prune(const ScoreRow<Real>& above, const ScoreRow<Real>& below, int64_t classes,
                          int64_t padded, Real* floors, uint8_t* keep) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Real* best = floors;
  Real* second = floors + padded;
  for (int64_t x = 0; x < padded; ++x) best[x] = second[x] = -kInfinity;
  for (int64_t c = 0; c < classes; ++c) {
    const Real *a = above.least.data() + c * padded, *b = below.least.data() + c * padded;
    for (int64_t x = 0; x < padded; ++x) {
      const Real floor = a[x] < b[x] ? a[x] : b[x];
      if (kSecond) {
        const Real lower = best[x] < floor ? best[x] : floor;
        second[x] = second[x] > lower ? second[x] : lower;
      }
      best[x] = best[x] > floor ? best[x] : floor;
    }
  }
  const Real* bar = kSecond ? second : best;
  for (int64_t c = 0; c < classes; ++c) {
    const Real *a = above.most.data() + c * padded, *b = below.most.data() + c * padded;
    uint8_t* k = keep + c * padded;
    for (int64_t x = 0; x < padded; ++x) k[x] = !dominated(a[x] > b[x] ? a[x] : b[x], bar[x]);
  }
}

// Maximum number of parts of an image that are worked on in parallel. It is fixed, so that results
// do not depend on the number of threads.
constexpr int64_t kBands = 16;

// The cells of one call. Bands hold whole rows of cells.
template <typename T>
struct Cells : ScoreMaps {
  int64_t padded;       // length of a `ScoreRow`
  int64_t column_step;  // from a cell's left to its right corner: 0 if not enlarged
  std::vector<Segment> ys, xs;
  std::vector<size_t> band_begin;  // into ys; bands begin where `low` changes
  Simd simd;

  // Tiles have at most `tile_rows` and `tile_columns`, bands at least `band_rows` rows of cells.
  explicit Cells(const ScoreMaps& maps, int tile_rows = kSide, int tile_columns = kSide,
                 int64_t band_rows = 1)
      : ScoreMaps(maps),
        padded((width + kLanes) / kLanes * kLanes),
        column_step(width == out_width ? 0 : 1),
        ys(segments(height, out_height, align_corners, tile_rows)),
        xs(segments(width, out_width, align_corners, tile_columns)),
        simd(simd_in_use()) {
    const int64_t bands = std::clamp<int64_t>(height / band_rows, 1, kBands);
    for (size_t s = 0; s < ys.size(); ++s) {
      const auto band = [&](const Segment& y) { return y.low * bands / height; };
      if (s == 0 || band(ys[s]) != band(ys[s - 1])) band_begin.push_back(s);
    }
    band_begin.push_back(ys.size());
  }

  int64_t bands() const { return static_cast<int64_t>(band_begin.size()) - 1; }

  const T* row(int64_t n, int64_t y) const {
    return static_cast<const T*>(data) + n * batch_stride + y * row_stride;
  }
  void read(int64_t n, int64_t y, ScoreRow<RealOf<T>>* to) const {
    run_simd<read_row<T>>(simd, row(n, y), class_stride, column_stride, classes, width, padded,
                          column_step, to);
  }
  // Only the scores, (C, padded).
  void read(int64_t n, int64_t y, std::vector<RealOf<T>>* to) const {
    run_simd<read_scores<T>>(simd, row(n, y), class_stride, column_stride, classes, width, padded,
                             to->data());
  }
};

// Working memory for a row of cells.
template <typename T>
struct CellRow {
  using Real = RealOf<T>;
  ScoreRow<Real> above, below;  // of the cells' upper and lower corners
  std::vector<Real> floors;     // (2, padded)
  std::vector<uint8_t> keep;    // (C, padded)
  std::vector<int32_t> lists;   // (w, C + 1): the classes that can win in each cell, rising
  std::vector<int> counts;      // (w): number of these classes
  std::vector<Candidate<Real>> candidates;  // (C): those of the current cell
  TileWeights<Real> weights[4];             // integer factors need three: left, middle, right
  int next_weights = 0;
  Tile<Real> tile;

  explicit CellRow(const Cells<T>& cells)
      : above(cells.classes, cells.padded),
        below(cells.classes, cells.padded),
        floors(2 * cells.padded),
        keep(cells.classes * cells.padded),
        lists(cells.width * (cells.classes + 1)),
        counts(cells.width),
        candidates(cells.classes) {}

  TileWeights<Real>* weights_of(Simd simd, const Segment& y, const Segment& x) {
    for (TileWeights<Real>& known : weights) {
      if (known.y_weights == y.weights && known.x_weights == x.weights) return &known;
    }
    TileWeights<Real>& oldest = weights[next_weights];
    next_weights = (next_weights + 1) % 4;
    run_simd<fill_weights<Real>>(simd, y, x, &oldest);
    return &oldest;
  }
  const Real (&total_weight(Simd simd))[4] {
    if (!tile.weights->has_total) run_simd<fill_total<Real>>(simd, tile.weights);
    return tile.weights->total;
  }
};

// Moves on to the cells of segment y of image n: reads their rows and lists the classes that can
// win. `previous_high` is the lower row of the previous cells, -1 if there are none.
template <typename T, bool kSecond>
void open_row(const Cells<T>& cells, int64_t n, const Segment& y, int64_t previous_high,
              CellRow<T>* row) {
  if (y.low == previous_high) {
    std::swap(row->above, row->below);
  } else {
    cells.read(n, y.low, &row->above);
  }
  cells.read(n, y.high, &row->below);
  run_simd<prune<RealOf<T>, kSecond>>(cells.simd, row->above, row->below, cells.classes,
                                      cells.padded, row->floors.data(), row->keep.data());
  std::fill(row->counts.begin(), row->counts.end(), 0);
  for (int64_t c = 0; c < cells.classes; ++c) {
    const uint8_t* keep = row->keep.data() + c * cells.padded;
    for (int64_t x = 0; x < cells.width;) {
      uint64_t eight = 0;
      __builtin_memcpy(&eight, keep + x, 8);
      const int64_t end = std::min(x + 8, cells.width);
      for (; eight != 0 && x < end; ++x) {
        row->lists[x * (cells.classes + 1) + row->counts[x]] = static_cast<int32_t>(c);
        row->counts[x] += keep[x];
      }
      x = end;
    }
  }
}

// Whether a class trails the one that wins everywhere in a cell, by at least the margin.
template <typename T>
bool is_far(const Cells<T>& cells, int64_t x, const CellRow<T>& row, int64_t c, int64_t winner,
            double margin) {
  const int64_t at = c * cells.padded + x, best = winner * cells.padded + x;
  return dominated(std::max(row.above.most[at], row.below.most[at]),
                   std::min(row.above.least[best], row.below.least[best]),
                   static_cast<RealOf<T>>(margin));
}

// A class's scores at the corners of a cell.
template <typename T>
Candidate<RealOf<T>> candidate(const Cells<T>& cells, int64_t x, const CellRow<T>& row, int32_t c) {
  const int64_t right = x + (x + 1 < cells.width ? cells.column_step : 0);
  const auto* above = &row.above.scores[c * cells.padded];
  const auto* below = &row.below.scores[c * cells.padded];
  return {{above[x], above[right], below[x], below[right]}, c};
}

// The class that is sure to win everywhere in a cell, without evaluating it, or kUncounted.
template <typename T>
int32_t only_winner(const Cells<T>& cells, int64_t x, const CellRow<T>& row) {
  if (row.counts[x] != 1) return kUncounted;
  const int32_t c = row.lists[x * (cells.classes + 1)];
  const int64_t at = c * cells.padded + x;
  const bool finite = row.above.most[at] < std::numeric_limits<double>::infinity() &&
                      row.below.most[at] < std::numeric_limits<double>::infinity();
  return finite ? c : kUncounted;
}

// `only` is the cell's only winner, or kUncounted.
template <typename T, bool kSecond>
void find_tile_winners(const Cells<T>& cells, int64_t x, int32_t only, CellRow<T>* row) {
  using Real = RealOf<T>;
  if (only >= 0) return run_simd<fill_winner<Real>>(cells.simd, only, &row->tile);
  const int32_t* classes = &row->lists[x * (cells.classes + 1)];
  const int count = row->counts[x];
  for (int k = 0; k < count; ++k) row->candidates[k] = candidate(cells, x, *row, classes[k]);
  run_simd<find_winners<Real, kSecond>>(cells.simd, row->candidates.data(), count, &row->tile);
}

}  // namespace dagcore
