// dag_seed_bilinear and argmax_bilinear on the CPU. Pixels are taken by low-resolution cell: inside
// one, every class is a blend of its four corners, so that most classes are ruled out per cell.
#include "../dag_seed_bilinear.h"

#include <limits>
#include <memory>

#include "labels.h"
#include "simd.h"

namespace dagcore {
namespace {

constexpr int kSide = 32;               // pixels of a tile's side, at most
constexpr int kPixels = kSide * kSide;  // of a tile: the part of a cell that is worked on at once
constexpr int kRoom = kPixels + 16;     // a tile's arrays do not all begin in one cache set
constexpr int kLanes = 16;      // of every sum, whatever the vector width: same bits anywhere
constexpr int64_t kBands = 16;  // parts of an image that are worked on in parallel

// Neighbouring pixels of one axis that read the same two low-resolution neighbours.
struct Segment {
  int64_t low, high;     // low-resolution indices
  int64_t begin;         // first pixel
  int count;             // at most kSide
  int weights;           // segments of equal weights share this number
  double weight[kSide];  // of `high`
};

std::vector<Segment> segments(int64_t from, int64_t to, bool align_corners) {
  std::vector<Segment> all;
  for (int64_t pixel = 0; pixel < to; ++pixel) {
    const Source source = source_of(pixel, from, to, align_corners);
    if (all.empty() || all.back().low != source.low || all.back().count == kSide) {
      all.push_back({source.low, source.high, pixel, 0, 0, {}});
    }
    Segment& last = all.back();
    last.weight[last.count++] = source.weight;
  }
  for (size_t i = 0; i < all.size(); ++i) {
    Segment& segment = all[i];
    segment.weights = static_cast<int>(i);
    for (size_t j = i; j-- > 0 && i - j <= 4;) {  // whole factors repeat at once
      if (all[j].count == segment.count &&
          std::equal(segment.weight, segment.weight + segment.count, all[j].weight)) {
        segment.weights = all[j].weights;
        break;
      }
    }
  }
  return all;
}

template <typename T>
struct Arithmetic {  // in which the scores are blended, compared and summed
  using Real = float;
  using Index = int32_t;
};
template <>
struct Arithmetic<double> {
  using Real = double;
  using Index = int64_t;
};

// Row y of every class, as reals: (C, w).
template <typename T>
struct ReadRow {
  using Real = typename Arithmetic<T>::Real;
  DAGCORE_INLINE static void run(const T* scores, int64_t class_stride, int64_t column_stride,
                                 int64_t classes, int64_t width, Real* row) {
    for (int64_t c = 0; c < classes; ++c) {
      const T* from = scores + c * class_stride;
      Real* to = row + c * width;
      if (column_stride == 1) {
        for (int64_t x = 0; x < width; ++x) to[x] = Pixel<T>::load(from[x]);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x] = Pixel<T>::load(from[x * column_stride]);
      }
    }
  }
};

// For each cell of a row: which classes can win (or come second, with kRunnerUp) in it.
template <typename Real, bool kRunnerUp>
struct Prune {
  // above, below (C, w): the rows of the cells' corners, `step` columns apart; floors (2, w):
  // scratch; keep (C, w): result, bytes
  DAGCORE_INLINE static void run(const Real* above, const Real* below, int64_t classes,
                                 int64_t width, int64_t step, Real* floors, uint8_t* keep) {
    constexpr Real kLowest = -std::numeric_limits<Real>::infinity();
    Real* best = floors;
    Real* second = floors + width;
    for (int64_t x = 0; x < width; ++x) best[x] = second[x] = kLowest;
    for (int64_t c = 0; c < classes; ++c) {
      const Real* a = above + c * width;
      const Real* b = below + c * width;
      for (int64_t x = 0; x + step < width; ++x) floor_at(a, b, x, x + step, best, second);
      if (step) floor_at(a, b, width - 1, width - 1, best, second);
    }
    const Real* bar = kRunnerUp ? second : best;
    for (int64_t c = 0; c < classes; ++c) {
      const Real* a = above + c * width;
      const Real* b = below + c * width;
      uint8_t* k = keep + c * width;
      for (int64_t x = 0; x + step < width; ++x) k[x] = kept(a, b, x, x + step, bar[x]);
      if (step) k[width - 1] = kept(a, b, width - 1, width - 1, bar[width - 1]);
    }
  }
  DAGCORE_INLINE static Real least(Real a, Real b) { return a < b ? a : b; }
  DAGCORE_INLINE static Real most(Real a, Real b) { return a > b ? a : b; }
  DAGCORE_INLINE static void floor_at(const Real* a, const Real* b, int64_t x, int64_t right,
                                      Real* best, Real* second) {
    const Real floor = least(least(a[x], a[right]), least(b[x], b[right]));
    const Real sum = (a[x] + a[right]) + (b[x] + b[right]);
    const Real usable = sum - sum == 0 ? floor : -std::numeric_limits<Real>::infinity();
    if (kRunnerUp) second[x] = most(second[x], least(best[x], usable));
    best[x] = most(best[x], usable);
  }
  DAGCORE_INLINE static uint8_t kept(const Real* a, const Real* b, int64_t x, int64_t right,
                                     Real bar) {
    const Real ceiling = most(most(a[x], a[right]), most(b[x], b[right]));
    const Real sum = (a[x] + a[right]) + (b[x] + b[right]);
    return !((sum - sum == 0) & dominated(ceiling, bar));
  }
};

// The classes that can win in a cell, rising, and the rows (C, w) that its corners are in.
template <typename Real>
struct Candidates {
  const int32_t* classes;
  int count;
  const Real *above, *below;
  int64_t width, left, right;
};

// Pixels of a tile are lanes of these arrays, row after row, padded to whole vectors with weight 0.
template <typename Real, typename Index>
struct alignas(64) Tile {
  Real w00[kRoom], w01[kRoom], w10[kRoom], w11[kRoom];
  Real weight[kRoom][4];  // the same, pixel by pixel
  Real total[4];          // over all pixels
  Real best[kRoom], second[kRoom];
  Index best_class[kRoom], second_class[kRoom];
  Index label[kRoom], adversarial[kRoom], plus[kRoom], minus[kRoom];
  int count = 0, padded = 0;
  int y_weights = -1, x_weights = -1;  // whose weights are filled in
};

// The corners' weights summed over a tile's active pixels, or over all of them.
template <typename Real, typename Index>
struct SumWeights {
  DAGCORE_INLINE static void run(const Tile<Real, Index>& tile, bool all, Real (&sum)[4]) {
    const Real* weights[4] = {tile.w00, tile.w01, tile.w10, tile.w11};
    Real lanes[4][kLanes] = {};
    for (int k = 0; k < 4; ++k) {
      for (int p = 0; p < tile.padded; p += kLanes) {
        const Real* weight = weights[k] + p;
        const Index* plus = tile.plus + p;
        for (int j = 0; j < kLanes; ++j) {
          lanes[k][j] += all | (plus[j] >= 0) ? weight[j] : Real{0};
        }
      }
    }
    for (int k = 0; k < 4; ++k) {
      sum[k] = 0;
      for (int j = 0; j < kLanes; ++j) sum[k] += lanes[k][j];
    }
  }
};

template <typename Real, typename Index>
void fill_weights(Simd simd, const Segment& y, const Segment& x, Tile<Real, Index>* tile) {
  if (tile->y_weights == y.weights && tile->x_weights == x.weights) return;
  tile->y_weights = y.weights;
  tile->x_weights = x.weights;
  tile->count = y.count * x.count;
  tile->padded = (tile->count + kLanes - 1) / kLanes * kLanes;
  int p = 0;
  for (int i = 0; i < y.count; ++i) {
    const double v = y.weight[i];
    for (int j = 0; j < x.count; ++j, ++p) {
      const double u = x.weight[j];
      Real* weight = tile->weight[p];
      tile->w00[p] = weight[0] = static_cast<Real>((1 - v) * (1 - u));
      tile->w01[p] = weight[1] = static_cast<Real>((1 - v) * u);
      tile->w10[p] = weight[2] = static_cast<Real>(v * (1 - u));
      tile->w11[p] = weight[3] = static_cast<Real>(v * u);
    }
  }
  for (; p < tile->padded; ++p) {
    tile->w00[p] = tile->w01[p] = tile->w10[p] = tile->w11[p] = 0;
    tile->label[p] = tile->adversarial[p] = kUncounted;
  }
  run_simd<SumWeights<Real, Index>>(simd, *tile, true, tile->total);
}

// The winner at every pixel of a tile among a cell's candidates, in rising class order.
template <typename Real, typename Index, bool kRunnerUp>
struct FindWinners {
  using Winners = Tile<Real, Index>;

  struct Corners {
    Real s00, s01, s10, s11;
  };
  DAGCORE_INLINE static Corners corners(const Candidates<Real>& of, int64_t c) {
    const Real *above = of.above + c * of.width, *below = of.below + c * of.width;
    return {above[of.left], above[of.right], below[of.left], below[of.right]};
  }
  DAGCORE_INLINE static Real value_at(const Winners& tile, int p, const Corners& q) {
    return blend(tile.w00[p], tile.w01[p], tile.w10[p], tile.w11[p], q.s00, q.s01, q.s10, q.s11);
  }
  DAGCORE_INLINE static void meet(const Candidates<Real>& of, int32_t c, int padded,
                                  Winners* tile) {
    const Corners next = corners(of, c);
    for (int p = 0; p < padded; ++p) {
      Top<Real, Index, kRunnerUp> top{};
      top.best = tile->best[p];
      top.best_class = tile->best_class[p];
      if (kRunnerUp) {
        top.second = tile->second[p];
        top.second_class = tile->second_class[p];
      }
      top.next(value_at(*tile, p, next), static_cast<Index>(c));
      tile->best[p] = top.best;
      tile->best_class[p] = top.best_class;
      if (kRunnerUp) {
        tile->second[p] = top.second;
        tile->second_class[p] = top.second_class;
      }
    }
  }
  DAGCORE_INLINE static void run(const Candidates<Real>& of, Winners* tile) {
    const int padded = tile->padded;
    const Corners first = corners(of, of.classes[0]);
    for (int p = 0; p < padded; ++p) {
      tile->best[p] = value_at(*tile, p, first);
      tile->best_class[p] = static_cast<Index>(of.classes[0]);
      if (kRunnerUp) {
        tile->second[p] = tile->best[p];
        tile->second_class[p] = kUncounted;
      }
    }
    for (int k = 1; k < of.count; ++k) meet(of, of.classes[k], padded, tile);
  }
};

// One candidate, all corners finite: it wins everywhere, and there is nothing to evaluate.
template <typename Real, typename Index>
struct OneWinner {
  DAGCORE_INLINE static void run(Index c, Tile<Real, Index>* tile) {
    for (int p = 0; p < tile->padded; ++p) {
      tile->best[p] = 0;
      tile->best_class[p] = c;
    }
  }
};

template <typename Index>
struct Tally {
  uint32_t active = 0;
  bool bad = false;
  bool uniform = false;  // all active pixels have one plus and one minus
  Index plus = kUncounted, minus = kUncounted;
};

template <typename Real, typename Index, bool kRunnerUp>
struct Judge {
  DAGCORE_INLINE static void run(bool reach, Tile<Real, Index>* tile, Tally<Index>* tally) {
    constexpr Index kMany = std::numeric_limits<Index>::max();
    const int padded = tile->padded;
    const Real* best = tile->best;
    const Index *best_class = tile->best_class, *second_class = tile->second_class;
    const Index* label = tile->label;
    Index *adversarial = tile->adversarial, *plus = tile->plus, *minus = tile->minus;
    uint32_t sum = 0, bad = 0;
    for (int p = 0; p < padded; ++p) {
      if (kRunnerUp) {
        adversarial[p] = best_class[p] == label[p] ? second_class[p] : best_class[p];
      }
      const Verdict<Index> verdict =
          judge(reach, label[p], adversarial[p], best_class[p], best[p] != best[p]);
      plus[p] = verdict.plus;
      minus[p] = verdict.minus;
      sum += verdict.plus >= 0;
      bad |= (label[p] == kOutOfRange) | ((label[p] >= 0) & (adversarial[p] == kOutOfRange));
    }
    Index plus_low = kMany, plus_high = kUncounted, minus_low = kMany, minus_high = kUncounted;
    for (int p = 0; p < padded; ++p) {
      const Index low = plus[p] >= 0 ? plus[p] : kMany, other = plus[p] >= 0 ? minus[p] : kMany;
      plus_low = low < plus_low ? low : plus_low;
      minus_low = other < minus_low ? other : minus_low;
      plus_high = plus[p] > plus_high ? plus[p] : plus_high;
      minus_high = minus[p] > minus_high ? minus[p] : minus_high;
    }
    tally->active = sum;
    tally->bad = bad != 0;
    tally->uniform = plus_low == plus_high && minus_low == minus_high;
    tally->plus = plus_high;
    tally->minus = minus_high;
  }
};

// What is known and needed while a band of one image is worked on.
template <typename T>
struct Band {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  std::vector<Real> rows[2];     // scores of the cells' upper and lower corners, (C, w)
  std::vector<Real> floors;      // (2, w)
  std::vector<uint8_t> keep;     // (C, w)
  std::vector<int32_t> lists;    // (w, C + 1): the classes that can win in each cell, rising
  std::vector<int> counts;       // (w): how many they are
  std::vector<Real> corner;      // (C, 4): sums of a tile whose pixels differ
  std::vector<int32_t> touched;  // classes whose sums are not zero
  std::vector<uint8_t> is_touched;
  Tile<Real, Index> tile;

  Band(int64_t classes, int64_t width)
      : floors(2 * width),
        keep(classes * width),
        lists(width * (classes + 1)),
        counts(width),
        corner(classes * 4),
        is_touched(classes) {
    rows[0].resize(classes * width);
    rows[1].resize(classes * width);
  }
};

// The labels of a tile, out of those of its rows of pixels, (rows, width).
template <typename Index>
struct TakeLabels {
  template <int kCount>
  DAGCORE_INLINE static void take(const Index* rows, int64_t width, int count, Index* out) {
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < kCount; ++j) out[i * kCount + j] = rows[i * width + j];
    }
  }
  DAGCORE_INLINE static void run(const Index* rows, int64_t width, const Segment& y,
                                 const Segment& x, Index* out) {
    const Index* from = rows + x.begin;
    switch (x.count) {
      case 4:
        return take<4>(from, width, y.count, out);
      case 8:
        return take<8>(from, width, y.count, out);
      case 16:
        return take<16>(from, width, y.count, out);
      case 32:
        return take<32>(from, width, y.count, out);
    }
    for (int i = 0; i < y.count; ++i) {
      for (int j = 0; j < x.count; ++j) out[i * x.count + j] = from[i * width + j];
    }
  }
};

// The low-resolution scores of one call, and the pixels that read them.
template <typename T>
struct Map {
  const T* data;
  int64_t batch, class_stride, row_stride, column_stride;
  int64_t images, classes, height, width;
  int64_t column_step;  // from a cell's left to its right corner: none at the size as it is
  std::vector<Segment> ys, xs;
  std::vector<size_t> band_begin;  // into ys; bands begin where `low` changes
  Simd simd;

  Map(const Tensor& scores, int64_t out_height, int64_t out_width, bool align_corners)
      : data(static_cast<const T*>(scores.data_ptr())),
        batch(scores.stride(0)),
        class_stride(scores.stride(1)),
        row_stride(scores.stride(2)),
        column_stride(scores.stride(3)),
        images(scores.size(0)),
        classes(scores.size(1)),
        height(scores.size(2)),
        width(scores.size(3)),
        column_step(width == out_width ? 0 : 1),
        ys(segments(height, out_height, align_corners)),
        xs(segments(width, out_width, align_corners)),
        simd(simd_in_use()) {
    const int64_t rows = (height + kBands - 1) / kBands;  // of cells, in a band
    for (size_t s = 0; s < ys.size(); ++s) {
      if (s == 0 || ys[s].low / rows != ys[s - 1].low / rows) band_begin.push_back(s);
    }
    band_begin.push_back(ys.size());
  }

  int64_t bands() const { return static_cast<int64_t>(band_begin.size()) - 1; }

  using Real = typename Arithmetic<T>::Real;
  void read_row(int64_t n, int64_t y, Real* row) const {
    run_simd<ReadRow<T>>(simd, data + n * batch + y * row_stride, class_stride, column_stride,
                         classes, width, row);
  }
};

// Fills band.rows, band.lists and band.counts for the cells between two low-resolution rows.
template <typename T, bool kRunnerUp>
void open_row(const Map<T>& map, int64_t n, const Segment& y, int64_t previous_high,
              Band<T>* band) {
  using Real = typename Arithmetic<T>::Real;
  if (y.low == previous_high) {
    band->rows[0].swap(band->rows[1]);
  } else {
    map.read_row(n, y.low, band->rows[0].data());
  }
  map.read_row(n, y.high, band->rows[1].data());
  const Real* above = band->rows[0].data();
  const Real* below = band->rows[1].data();
  const int64_t width = map.width;
  run_simd<Prune<Real, kRunnerUp>>(map.simd, above, below, map.classes, width, map.column_step,
                                   band->floors.data(), band->keep.data());
  std::fill(band->counts.begin(), band->counts.end(), 0);
  for (int64_t c = 0; c < map.classes; ++c) {
    const uint8_t* keep = band->keep.data() + c * width;
    for (int64_t x = 0; x < width;) {
      uint64_t eight = 0;
      if (x + 8 <= width && (__builtin_memcpy(&eight, keep + x, 8), eight == 0)) {
        x += 8;
        continue;
      }
      for (const int64_t end = std::min(x + 8, width); x < end; ++x) {
        band->lists[x * (map.classes + 1) + band->counts[x]] = static_cast<int32_t>(c);
        band->counts[x] += keep[x];
      }
    }
  }
}

template <typename T, bool kRunnerUp>
void find_winners(const Map<T>& map, int64_t x, Band<T>* band) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  const Candidates<Real> of{&band->lists[x * (map.classes + 1)],
                            band->counts[x],
                            band->rows[0].data(),
                            band->rows[1].data(),
                            map.width,
                            x,
                            x + (x + 1 < map.width ? map.column_step : 0)};
  if (!kRunnerUp && of.count == 1) {
    const Real *above = of.above + of.classes[0] * of.width,
               *below = of.below + of.classes[0] * of.width;
    const Real sum = (above[of.left] + above[of.right]) + (below[of.left] + below[of.right]);
    if (sum - sum == 0) {
      const Index only = static_cast<Index>(of.classes[0]);
      return run_simd<OneWinner<Real, Index>>(map.simd, only, &band->tile);
    }
  }
  run_simd<FindWinners<Real, Index, kRunnerUp>>(map.simd, of, &band->tile);
}

// Adds a tile's seed to the two low-resolution rows of its corners, (C, w) each.
template <typename T>
void add_seed(const Map<T>& map, const Segment& y, const Segment& x,
              const Tally<typename Arithmetic<T>::Index>& tally, Band<T>* band,
              typename Arithmetic<T>::Real* above, typename Arithmetic<T>::Real* below) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  const auto add = [&](int64_t c, Real sign, const Real* sum) {
    above[c * map.width + x.low] += sign * sum[0];
    above[c * map.width + x.high] += sign * sum[1];
    below[c * map.width + x.low] += sign * sum[2];
    below[c * map.width + x.high] += sign * sum[3];
  };
  const Tile<Real, Index>& tile = band->tile;
  if (tally.uniform) {
    Real sum[4] = {tile.total[0], tile.total[1], tile.total[2], tile.total[3]};
    if (tally.active != static_cast<uint32_t>(tile.count)) {
      run_simd<SumWeights<Real, Index>>(map.simd, tile, false, sum);
    }
    add(tally.plus, 1, sum);
    add(tally.minus, -1, sum);
    return;
  }
  const auto touch = [&](Index c) {
    if (band->is_touched[c]) return;
    band->is_touched[c] = 1;
    band->touched.push_back(static_cast<int32_t>(c));
  };
  for (int p = 0; p < tile.count; ++p) {
    if (tile.plus[p] < 0) continue;
    const Real* weight = tile.weight[p];
    touch(tile.plus[p]);
    touch(tile.minus[p]);
    Real* plus = &band->corner[4 * tile.plus[p]];
    for (int k = 0; k < 4; ++k) plus[k] += weight[k];
    Real* minus = &band->corner[4 * tile.minus[p]];
    for (int k = 0; k < 4; ++k) minus[k] -= weight[k];
  }
  for (int32_t c : band->touched) {
    Real* sum = &band->corner[4 * c];
    add(c, 1, sum);
    for (int k = 0; k < 4; ++k) sum[k] = 0;
    band->is_touched[c] = 0;
  }
  band->touched.clear();
}

template <typename T>
void store_row(const Tensor& seed, int64_t n, int64_t y, const Map<T>& map,
               const typename Arithmetic<T>::Real* row) {
  T* data = static_cast<T*>(seed.data_ptr()) + n * seed.stride(0) + y * seed.stride(2);
  const int64_t class_stride = seed.stride(1), column_stride = seed.stride(3);
  for (int64_t c = 0; c < map.classes; ++c) {
    for (int64_t x = 0; x < map.width; ++x) {
      data[c * class_stride + x * column_stride] = Pixel<T>::store(row[c * map.width + x]);
    }
  }
}

// The seed's rows that two bands share: each band keeps its first and its last row for itself, and
// they are added afterwards, in the order of the bands.
template <typename T>
struct SharedRows {
  using Real = typename Arithmetic<T>::Real;
  int64_t bands, row;  // row: C * w
  std::vector<Real> data;

  SharedRows(const Map<T>& map)
      : bands(map.bands()), row(map.classes * map.width), data(2 * map.images * bands * row) {}
  Real* first(int64_t n, int64_t band) { return &data[((n * bands + band) * 2) * row]; }
  Real* last(int64_t n, int64_t band) { return first(n, band) + row; }
};

// One band of one image: counts its active pixels and seeds its low-resolution rows.
template <typename T, bool kRunnerUp>
uint32_t seed_band(const BilinearCall& call, const Map<T>& map, const LabelSource& labels,
                   const LabelSource& adversarial, int64_t n, int64_t index,
                   SharedRows<T>* shared) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  const auto band = std::make_unique<Band<T>>(map.classes, map.width);
  Tile<Real, Index>& tile = band->tile;
  const size_t begin = map.band_begin[index], end = map.band_begin[index + 1];
  std::vector<Real> sums[2] = {std::vector<Real>(shared->row), std::vector<Real>(shared->row)};
  const int64_t width = call.labels.size(2);
  std::vector<Index> label_rows(kSide * width), adversarial_rows(kRunnerUp ? 0 : kSide * width);
  const auto read = [&](auto reader, const LabelSource& source, const Tensor& maps,
                        const Segment& y, Index* rows) {
    for (int i = 0; i < y.count; ++i) {
      run_simd<decltype(reader)>(map.simd, source.at(n, (y.begin + i) * maps.stride(1)),
                                 source.type, maps.stride(2), static_cast<int>(width), call.rule,
                                 rows + i * width);
    }
  };

  uint32_t active = 0;
  for (size_t s = begin; s < end; ++s) {
    const Segment& y = map.ys[s];
    if (s == begin || y.low != map.ys[s - 1].low) {
      open_row<T, kRunnerUp>(map, n, y, s == begin ? -1 : map.ys[s - 1].high, band.get());
    }
    read(ReadLabels<Index, false>{}, labels, call.labels, y, label_rows.data());
    if (!kRunnerUp) {
      read(ReadLabels<Index, true>{}, adversarial, call.adversarial, y, adversarial_rows.data());
    }
    for (const Segment& x : map.xs) {
      fill_weights(map.simd, y, x, &tile);
      run_simd<TakeLabels<Index>>(map.simd, label_rows.data(), width, y, x, tile.label);
      if (!kRunnerUp) {
        run_simd<TakeLabels<Index>>(map.simd, adversarial_rows.data(), width, y, x,
                                    tile.adversarial);
      }
      find_winners<T, kRunnerUp>(map, x.low, band.get());
      Tally<Index> tally;
      run_simd<Judge<Real, Index, kRunnerUp>>(map.simd, call.reach, &tile, &tally);
      active = (active + tally.active) | (tally.bad ? kOutOfRangeFlag : 0);
      if (tally.active) {
        add_seed(map, y, x, tally, band.get(), sums[0].data(), sums[y.high != y.low].data());
      }
    }
    if (s + 1 < end && map.ys[s + 1].low == y.low) continue;
    if (y.low == map.ys[begin].low) {
      std::copy(sums[0].begin(), sums[0].end(), shared->first(n, index));
    } else {
      store_row<T>(call.seed, n, y.low, map, sums[0].data());
    }
    sums[0].swap(sums[1]);
    if (s + 1 == end) {
      std::copy(sums[0].begin(), sums[0].end(), shared->last(n, index));
    } else if (map.ys[s + 1].low != y.high && y.high != y.low) {  // no cell begins at this row
      store_row<T>(call.seed, n, y.high, map, sums[0].data());
      std::fill(sums[0].begin(), sums[0].end(), Real{0});
    }
    std::fill(sums[1].begin(), sums[1].end(), Real{0});
  }
  return active;
}

// Puts together the rows that bands share, and zeroes those that no pixel reads.
template <typename T>
void join_bands(const Tensor& seed, const Map<T>& map, int64_t n, SharedRows<T>* shared) {
  using Real = typename Arithmetic<T>::Real;
  for (int64_t band = 0; band < map.bands(); ++band) {
    const int64_t first = map.ys[map.band_begin[band]].low;
    Real* row = shared->first(n, band);
    if (band > 0 && map.ys[map.band_begin[band] - 1].high == first) {
      const Real* before = shared->last(n, band - 1);
      for (int64_t i = 0; i < shared->row; ++i) row[i] += before[i];
    }
    store_row<T>(seed, n, first, map, row);
    const size_t end = map.band_begin[band + 1];
    const Segment& last = map.ys[end - 1];
    const bool continued = end < map.ys.size() && map.ys[end].low == last.high;
    if (!continued && last.high != last.low) {
      store_row<T>(seed, n, last.high, map, shared->last(n, band));
    }
  }
  std::vector<bool> read(map.height);
  for (const Segment& y : map.ys) read[y.low] = read[y.high] = true;
  const std::vector<Real> zeros(shared->row);
  for (int64_t y = 0; y < map.height; ++y) {
    if (!read[y]) store_row<T>(seed, n, y, map, zeros.data());
  }
}

template <typename T, bool kRunnerUp>
void seed_all(const BilinearCall& call) {
  const Map<T> map(call.scores, call.labels.size(1), call.labels.size(2), call.align_corners);
  const LabelSource labels(call.labels), adversarial(call.adversarial);
  uint32_t* active = static_cast<uint32_t*>(call.active.data_ptr());
  SharedRows<T> shared(map);
  const int64_t bands = map.bands();
  torch::stable::parallel_for(0, map.images * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands;
      const uint32_t sum =
          seed_band<T, kRunnerUp>(call, map, labels, adversarial, n, item % bands, &shared);
      if (sum & kOutOfRangeFlag) __atomic_fetch_or(&active[n], kOutOfRangeFlag, __ATOMIC_RELAXED);
      __atomic_fetch_add(&active[n], sum & ~kOutOfRangeFlag, __ATOMIC_RELAXED);
    }
  });
  torch::stable::parallel_for(0, map.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) join_bands<T>(call.seed, map, n, &shared);
  });
}

// scores (N, C, h, w), labels and adversarial (N, H, W); without adversarial labels the
// runner-up's. Returns the seed at the low-resolution scores, laid out like them, and the number of
// active targets (N,), int32.
std::tuple<Tensor, Tensor> dag_seed_bilinear(Tensor scores, Tensor labels,
                                             std::optional<Tensor> adversarial, bool reach,
                                             int64_t ignore_index, bool align_corners) {
  const BilinearCall call(scores, labels, adversarial, reach, ignore_index, align_corners);
  if (labels.numel() == 0) {
    torch::stable::zero_(const_cast<Tensor&>(call.seed));
    return {call.seed, call.active};
  }
  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    call.runner_up ? seed_all<T, true>(call) : seed_all<T, false>(call);
  });
  return {call.seed, call.active};
}

template <typename T>
void argmax_all(const Tensor& scores, bool align_corners, const Tensor& labels) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  const int64_t height = labels.size(1), width = labels.size(2);
  const Map<T> map(scores, height, width, align_corners);
  int64_t* out = static_cast<int64_t*>(labels.data_ptr());
  const int64_t bands = map.bands();
  torch::stable::parallel_for(0, map.images * bands, 1, [&](int64_t begin, int64_t end) {
    const auto band = std::make_unique<Band<T>>(map.classes, map.width);
    Tile<Real, Index>& tile = band->tile;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands, index = item % bands;
      const size_t first = map.band_begin[index];
      for (size_t s = first; s < map.band_begin[index + 1]; ++s) {
        const Segment& y = map.ys[s];
        if (s == first || y.low != map.ys[s - 1].low) {
          open_row<T, false>(map, n, y, s == first ? -1 : map.ys[s - 1].high, band.get());
        }
        for (const Segment& x : map.xs) {
          fill_weights(map.simd, y, x, &tile);
          find_winners<T, false>(map, x.low, band.get());
          for (int i = 0; i < y.count; ++i) {
            std::copy_n(tile.best_class + i * x.count, x.count,
                        out + (n * height + y.begin + i) * width + x.begin);
          }
        }
      }
    }
  });
}

// scores (N, C, h, w) -> the winning class at each pixel of (N, height, width), int64.
Tensor argmax_bilinear(Tensor scores, int64_t height, int64_t width, bool align_corners) {
  BilinearCall::check_maps(scores);
  STD_TORCH_CHECK(height >= 0 && width >= 0, "size must not be negative, got (", height, ", ",
                  width, ")");
  Tensor labels =
      torch::stable::new_empty(scores, {scores.size(0), height, width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  for_float_type("scores", scores.scalar_type(),
                 [&](auto type) { argmax_all<decltype(type)>(scores, align_corners, labels); });
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dagcore, CPU, library) {
  library.impl("dag_seed_bilinear", TORCH_BOX(&dag_seed_bilinear));
  library.impl("argmax_bilinear", TORCH_BOX(&argmax_bilinear));
}

}  // namespace dagcore
