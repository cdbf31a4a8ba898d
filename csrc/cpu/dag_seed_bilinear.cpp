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
constexpr int kLanes = 16;          // of every sum, whatever the vector width: same bits anywhere
constexpr int64_t kBands = 16;      // parts of an image that are worked on in parallel
constexpr int kVerdicts = 16;       // of a tile that are summed one by one
constexpr uint32_t kFewPixels = 2;  // of one verdict: summing pixel by pixel is as fast

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

// One low-resolution row of every class, (C, padded): its scores, and of each score and its right
// neighbour the smaller and the larger; infinite where their sum is not finite, so that the class
// is never ruled out and rules none out.
template <typename Real>
struct Row {
  std::vector<Real> scores, least, most;
  Row(int64_t classes, int64_t padded)
      : scores(classes * padded + kLanes), least(classes * padded), most(classes * padded) {}
};

// `step` columns lie between neighbours; padded is a multiple of kLanes and above the width.
template <typename T>
struct ReadRow {
  using Real = typename Arithmetic<T>::Real;
  DAGCORE_INLINE static void run(const T* scores, int64_t class_stride, int64_t column_stride,
                                 int64_t classes, int64_t width, int64_t padded, int64_t step,
                                 Row<Real>* row) {
    for (int64_t c = 0; c < classes; ++c) {
      const T* from = scores + c * class_stride;
      Real* to = row->scores.data() + c * padded;
      if (column_stride == 1) {
        for (int64_t x = 0; x < width; ++x) to[x] = Pixel<T>::load(from[x]);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x] = Pixel<T>::load(from[x * column_stride]);
      }
      to[width] = to[width - 1];  // the last column is its own neighbour
    }
    const Real* from = row->scores.data();
    Real *least = row->least.data(), *most = row->most.data();
    constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
    for (int64_t i = 0; i < classes * padded; ++i) {
      const Real a = from[i], b = from[i + step];
      const bool finite = (a + b) - (a + b) == 0;
      least[i] = finite ? (a < b ? a : b) : -kInfinity;
      most[i] = finite ? (a > b ? a : b) : kInfinity;
    }
  }
};

// For each cell of a row: which classes can win (or come second, with kRunnerUp) in it.
template <typename Real, bool kRunnerUp>
struct Prune {
  // above, below: the rows of the cells' corners; floors (2, padded): scratch; keep (C, padded):
  // result, bytes
  DAGCORE_INLINE static void run(const Row<Real>& above, const Row<Real>& below, int64_t classes,
                                 int64_t padded, Real* floors, uint8_t* keep) {
    constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
    Real* best = floors;
    Real* second = floors + padded;
    for (int64_t x = 0; x < padded; ++x) best[x] = second[x] = -kInfinity;
    for (int64_t c = 0; c < classes; ++c) {
      const Real *a = above.least.data() + c * padded, *b = below.least.data() + c * padded;
      for (int64_t block = 0; block < padded; block += kLanes) {
        for (int64_t x = block; x < block + kLanes; ++x) {
          const Real floor = a[x] < b[x] ? a[x] : b[x];
          if (kRunnerUp) {
            const Real lower = best[x] < floor ? best[x] : floor;
            second[x] = second[x] > lower ? second[x] : lower;
          }
          best[x] = best[x] > floor ? best[x] : floor;
        }
      }
    }
    const Real* bar = kRunnerUp ? second : best;
    for (int64_t c = 0; c < classes; ++c) {
      const Real *a = above.most.data() + c * padded, *b = below.most.data() + c * padded;
      uint8_t* k = keep + c * padded;
      for (int64_t block = 0; block < padded; block += kLanes) {
        for (int64_t x = block; x < block + kLanes; ++x) {
          k[x] = !dominated(a[x] > b[x] ? a[x] : b[x], bar[x]);
        }
      }
    }
  }
};

// The weights of a tile's pixels at the four corners: pixels are lanes of these arrays, row after
// row, padded to whole vectors with weight 0.
template <typename Real>
struct alignas(64) Weights {
  Real w00[kRoom], w01[kRoom], w10[kRoom], w11[kRoom];
  Real of_pixel[kRoom][4];  // the same, pixel by pixel
  Real total[4];            // over all pixels
  int count = 0, padded = 0;
  int y_weights = -1, x_weights = -1;  // whose they are
};

template <typename Real, typename Index>
struct alignas(64) Tile {
  const Weights<Real>* weights;
  Real best[kRoom];
  Index best_class[kRoom], second_class[kRoom];
  Index label[kRoom], adversarial[kRoom], plus[kRoom], minus[kRoom];
};

// A sum in lanes, added up in an order that does not depend on the vector width.
template <typename Value>
struct Lanes {
  Value lane[kLanes] = {};

  template <int kHalf = kLanes / 2>
  DAGCORE_INLINE Value total() {
    for (int j = 0; j < kHalf; ++j) lane[j] += lane[j + kHalf];
    if constexpr (kHalf > 1) return total<kHalf / 2>();
    return lane[0];
  }
};

// The weights summed over the pixels of one verdict, which are struck off the tile.
template <typename Real, typename Index>
struct TakeVerdict {
  DAGCORE_INLINE static void run(Verdict<Index> verdict, Tile<Real, Index>* tile, Real (&sum)[4],
                                 uint32_t* taken) {
    const Weights<Real>& weights = *tile->weights;
    Lanes<Real> s00, s01, s10, s11;
    Lanes<Index> found;
    for (int p = 0; p < weights.padded; p += kLanes) {
      Real w00[kLanes], w01[kLanes], w10[kLanes], w11[kLanes];
      Index plus[kLanes], minus[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        w00[j] = weights.w00[p + j];
        w01[j] = weights.w01[p + j];
        w10[j] = weights.w10[p + j];
        w11[j] = weights.w11[p + j];
        plus[j] = tile->plus[p + j];
        minus[j] = tile->minus[p + j];
      }
      for (int j = 0; j < kLanes; ++j) {
        const bool same = (plus[j] == verdict.plus) & (minus[j] == verdict.minus);
        s00.lane[j] += same ? w00[j] : Real{0};
        s01.lane[j] += same ? w01[j] : Real{0};
        s10.lane[j] += same ? w10[j] : Real{0};
        s11.lane[j] += same ? w11[j] : Real{0};
        found.lane[j] += same ? Index{1} : Index{0};
        plus[j] = same ? static_cast<Index>(kUncounted) : plus[j];
      }
      for (int j = 0; j < kLanes; ++j) tile->plus[p + j] = plus[j];
    }
    sum[0] = s00.total();
    sum[1] = s01.total();
    sum[2] = s10.total();
    sum[3] = s11.total();
    *taken = static_cast<uint32_t>(found.total());
  }
};

template <typename Real>
struct FillWeights {
  DAGCORE_INLINE static void run(const Segment& y, const Segment& x, Weights<Real>* weights) {
    int p = 0;
    for (int i = 0; i < y.count; ++i) {
      const double v = y.weight[i];
      for (int j = 0; j < x.count; ++j, ++p) {
        const double u = x.weight[j];
        Real* of_pixel = weights->of_pixel[p];
        weights->w00[p] = of_pixel[0] = static_cast<Real>((1 - v) * (1 - u));
        weights->w01[p] = of_pixel[1] = static_cast<Real>((1 - v) * u);
        weights->w10[p] = of_pixel[2] = static_cast<Real>(v * (1 - u));
        weights->w11[p] = of_pixel[3] = static_cast<Real>(v * u);
      }
    }
    weights->count = p;
    for (; p % kLanes; ++p) {
      weights->w00[p] = weights->w01[p] = weights->w10[p] = weights->w11[p] = 0;
    }
    weights->padded = p;
    weights->y_weights = y.weights;
    weights->x_weights = x.weights;
    const Real* corners[4] = {weights->w00, weights->w01, weights->w10, weights->w11};
    for (int k = 0; k < 4; ++k) {
      Lanes<Real> sum;
      for (int q = 0; q < p; q += kLanes) {
        for (int j = 0; j < kLanes; ++j) sum.lane[j] += corners[k][q + j];
      }
      weights->total[k] = sum.total();
    }
  }
};

// A class that may win in a cell, and its scores at the four corners.
template <typename Real, typename Index>
struct Candidate {
  Real s00, s01, s10, s11;
  Index c;
};

// The winner at every pixel of a tile among a cell's candidates, in rising class order.
template <typename Real, typename Index, bool kRunnerUp>
struct FindWinners {
  // A vector of pixels at a time, so that their weights and winners stay in registers.
  DAGCORE_INLINE static void run(const Candidate<Real, Index>* candidates, int count,
                                 Tile<Real, Index>* tile) {
    const Weights<Real>& weights = *tile->weights;
    for (int p = 0; p < weights.padded; p += kLanes) {
      Real w00[kLanes], w01[kLanes], w10[kLanes], w11[kLanes], best[kLanes], second[kLanes];
      Index best_class[kLanes], second_class[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        w00[j] = weights.w00[p + j];
        w01[j] = weights.w01[p + j];
        w10[j] = weights.w10[p + j];
        w11[j] = weights.w11[p + j];
        const Candidate<Real, Index>& q = candidates[0];
        best[j] = blend(w00[j], w01[j], w10[j], w11[j], q.s00, q.s01, q.s10, q.s11);
        best_class[j] = q.c;
        second[j] = best[j];
        second_class[j] = kUncounted;
      }
      for (int k = 1; k < count; ++k) {
        const Candidate<Real, Index> q = candidates[k];
        for (int j = 0; j < kLanes; ++j) {
          Top<Real, Index, kRunnerUp> top{best[j], second[j], best_class[j], second_class[j]};
          top.next(blend(w00[j], w01[j], w10[j], w11[j], q.s00, q.s01, q.s10, q.s11), q.c);
          best[j] = top.best;
          best_class[j] = top.best_class;
          if (kRunnerUp) {
            second[j] = top.second;
            second_class[j] = top.second_class;
          }
        }
      }
      for (int j = 0; j < kLanes; ++j) {
        tile->best[p + j] = best[j];
        tile->best_class[p + j] = best_class[j];
        if (kRunnerUp) tile->second_class[p + j] = second_class[j];
      }
    }
  }
};

// One candidate, all corners finite: it wins everywhere, and there is nothing to evaluate.
template <typename Real, typename Index>
struct OneWinner {
  DAGCORE_INLINE static void run(Index c, Tile<Real, Index>* tile) {
    for (int p = 0; p < tile->weights->padded; ++p) {
      tile->best[p] = 0;
      tile->best_class[p] = c;
    }
  }
};

// Verdicts of a tile's pixels; the count of active ones, flagged if a label is out of range.
template <typename Real, typename Index, bool kRunnerUp>
struct Judge {
  DAGCORE_INLINE static void run(bool reach, Tile<Real, Index>* tile, uint32_t* active) {
    const int count = tile->weights->count, padded = tile->weights->padded;
    const Real* best = tile->best;
    const Index *best_class = tile->best_class, *second_class = tile->second_class;
    Index *label = tile->label, *adversarial = tile->adversarial;
    Index *plus = tile->plus, *minus = tile->minus;
    for (int p = count; p < padded; ++p) label[p] = adversarial[p] = kUncounted;
    Index sum = 0, bad = 0;
    for (int p = 0; p < padded; ++p) {
      if (kRunnerUp) {
        adversarial[p] = best_class[p] == label[p] ? second_class[p] : best_class[p];
      }
      const Verdict<Index> verdict =
          judge(reach, label[p], adversarial[p], best_class[p], best[p] != best[p]);
      plus[p] = verdict.plus;
      minus[p] = verdict.minus;
      sum += verdict.plus >= 0;
      bad |= is_out_of_range(label[p], adversarial[p]);
    }
    *active = static_cast<uint32_t>(sum) | (bad ? kOutOfRangeFlag : 0);
  }
};

// What is known and needed while a band of one image is worked on.
template <typename T>
struct Band {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  Row<Real> above, below;      // of the cells' upper and lower corners
  std::vector<Real> floors;    // (2, padded)
  std::vector<uint8_t> keep;   // (C, padded)
  std::vector<int32_t> lists;  // (w, C + 1): the classes that can win in each cell, rising
  std::vector<int> counts;     // (w): how many they are
  std::vector<Candidate<Real, Index>> candidates;  // (C): those of the cell in hand
  std::vector<Real> corner;                        // (C, 4): sums of a tile of many verdicts
  std::vector<int32_t> touched;                    // classes whose sums are not zero
  std::vector<uint8_t> is_touched;
  Weights<Real> weights[4];  // whole factors need three, at the left, in the middle, at the right
  int next_weights = 0;
  Tile<Real, Index> tile;

  Band(int64_t classes, int64_t width, int64_t padded)
      : above(classes, padded),
        below(classes, padded),
        floors(2 * padded),
        keep(classes * padded),
        lists(width * (classes + 1)),
        counts(width),
        candidates(classes),
        corner(classes * 4),
        is_touched(classes) {}

  const Weights<Real>& weights_of(Simd simd, const Segment& y, const Segment& x) {
    for (const Weights<Real>& known : weights) {
      if (known.y_weights == y.weights && known.x_weights == x.weights) return known;
    }
    Weights<Real>& oldest = weights[next_weights];
    next_weights = (next_weights + 1) % 4;
    run_simd<FillWeights<Real>>(simd, y, x, &oldest);
    return oldest;
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

// Where a column of labels (rows, width) is not the same all the way down, or not the same as the
// column before it: what is nowhere so, but for its first column's latter, is all of one label.
template <typename Index>
struct FindChanges {
  DAGCORE_INLINE static void run(const Index* rows, int64_t width, int count, bool first,
                                 Index* down, Index* across) {
    if (first) {
      for (int64_t x = 0; x < width; ++x) down[x] = across[x] = 0;
    }
    for (int i = 1; i < count; ++i) {
      for (int64_t x = 0; x < width; ++x) down[x] |= rows[i * width + x] ^ rows[x];
    }
    for (int64_t x = 1; x < width; ++x) across[x] |= rows[x] ^ rows[x - 1];
  }
};

// The labels of the rows of pixels that one row of cells holds, and of which tiles are uniform.
template <typename Index, bool kRunnerUp>
struct LabelRows {
  int64_t width;
  std::vector<Index> labels, adversarial, down, across;

  explicit LabelRows(int64_t width)
      : width(width),
        labels(kSide * width),
        adversarial(kRunnerUp ? 0 : kSide * width),
        down(width),
        across(width) {}

  bool uniform(const Segment& x) const {
    Index changes = down[x.begin];
    for (int j = 1; j < x.count; ++j) changes |= down[x.begin + j] | across[x.begin + j];
    return changes == 0;
  }
};

// The low-resolution scores of one call, and the pixels that read them.
template <typename T>
struct Map {
  const T* data;
  int64_t batch, class_stride, row_stride, column_stride;
  int64_t images, classes, height, width;
  int64_t padded;       // length of a `Row`
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
        padded((width + kLanes) / kLanes * kLanes),
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
  void read_row(int64_t n, int64_t y, Row<Real>* row) const {
    run_simd<ReadRow<T>>(simd, data + n * batch + y * row_stride, class_stride, column_stride,
                         classes, width, padded, column_step, row);
  }
};

// Fills the band's rows, lists and counts for the cells between two low-resolution rows.
template <typename T, bool kRunnerUp>
void open_row(const Map<T>& map, int64_t n, const Segment& y, int64_t previous_high,
              Band<T>* band) {
  using Real = typename Arithmetic<T>::Real;
  if (y.low == previous_high) {
    std::swap(band->above, band->below);
  } else {
    map.read_row(n, y.low, &band->above);
  }
  map.read_row(n, y.high, &band->below);
  run_simd<Prune<Real, kRunnerUp>>(map.simd, band->above, band->below, map.classes, map.padded,
                                   band->floors.data(), band->keep.data());
  std::fill(band->counts.begin(), band->counts.end(), 0);
  for (int64_t c = 0; c < map.classes; ++c) {
    const uint8_t* keep = band->keep.data() + c * map.padded;
    for (int64_t x = 0; x < map.width;) {
      uint64_t eight = 0;
      if ((__builtin_memcpy(&eight, keep + x, 8), eight == 0)) {
        x += 8;
        continue;
      }
      for (const int64_t end = std::min(x + 8, map.width); x < end; ++x) {
        band->lists[x * (map.classes + 1) + band->counts[x]] = static_cast<int32_t>(c);
        band->counts[x] += keep[x];
      }
    }
  }
}

// The class that wins everywhere in a cell without evaluating it, or kUncounted.
template <typename T>
int32_t only_winner(const Map<T>& map, int64_t x, const Band<T>& band) {
  if (band.counts[x] != 1) return kUncounted;
  const int32_t c = band.lists[x * (map.classes + 1)];
  const int64_t at = c * map.padded + x;
  const bool finite = band.above.most[at] < std::numeric_limits<double>::infinity() &&
                      band.below.most[at] < std::numeric_limits<double>::infinity();
  return finite ? c : kUncounted;
}

// `only` is the cell's only winner, or kUncounted.
template <typename T, bool kRunnerUp>
void find_winners(const Map<T>& map, int64_t x, int32_t only, Band<T>* band) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  if (only >= 0) {
    return run_simd<OneWinner<Real, Index>>(map.simd, static_cast<Index>(only), &band->tile);
  }
  const int32_t* classes = &band->lists[x * (map.classes + 1)];
  const int64_t right = x + (x + 1 < map.width ? map.column_step : 0);
  const int count = band->counts[x];
  for (int k = 0; k < count; ++k) {
    const Real* above = &band->above.scores[classes[k] * map.padded];
    const Real* below = &band->below.scores[classes[k] * map.padded];
    band->candidates[k] = {above[x], above[right], below[x], below[right],
                           static_cast<Index>(classes[k])};
  }
  run_simd<FindWinners<Real, Index, kRunnerUp>>(map.simd, band->candidates.data(), count,
                                                &band->tile);
}

// The two low-resolution rows of a cell's corners, (C, w) each, and what is added to them.
template <typename Real>
struct CornerSums {
  Real *above, *below;
  int64_t width;

  void add(const Segment& x, int64_t c, Real sign, const Real* sum) const {
    above[c * width + x.low] += sign * sum[0];
    above[c * width + x.high] += sign * sum[1];
    below[c * width + x.low] += sign * sum[2];
    below[c * width + x.high] += sign * sum[3];
  }
};

// Adds the seed of a tile with `left` active pixels: verdict by verdict, which most tiles have few
// of, and the rest pixel by pixel.
template <typename T>
void add_seed(const Map<T>& map, const Segment& x, uint32_t left, Band<T>* band,
              const CornerSums<typename Arithmetic<T>::Real>& sums) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  Tile<Real, Index>& tile = band->tile;
  int p = 0;
  for (int k = 0; k < kVerdicts && left; ++k) {
    while (tile.plus[p] < 0) ++p;
    const Verdict<Index> verdict{tile.plus[p], tile.minus[p]};
    Real sum[4];
    uint32_t taken = 0;
    run_simd<TakeVerdict<Real, Index>>(map.simd, verdict, &tile, sum, &taken);
    sums.add(x, verdict.plus, 1, sum);
    sums.add(x, verdict.minus, -1, sum);
    left -= taken;
    if (taken < kFewPixels) break;
  }
  if (!left) return;
  const auto touch = [&](Index c) {
    if (band->is_touched[c]) return;
    band->is_touched[c] = 1;
    band->touched.push_back(static_cast<int32_t>(c));
  };
  for (; p < tile.weights->count; ++p) {
    if (tile.plus[p] < 0) continue;
    const Real* weight = tile.weights->of_pixel[p];
    touch(tile.plus[p]);
    touch(tile.minus[p]);
    Real* plus = &band->corner[4 * tile.plus[p]];
    for (int k = 0; k < 4; ++k) plus[k] += weight[k];
    Real* minus = &band->corner[4 * tile.minus[p]];
    for (int k = 0; k < 4; ++k) minus[k] -= weight[k];
  }
  for (int32_t c : band->touched) {
    Real* sum = &band->corner[4 * c];
    sums.add(x, c, 1, sum);
    for (int k = 0; k < 4; ++k) sum[k] = 0;
    band->is_touched[c] = 0;
  }
  band->touched.clear();
}

template <typename T>
struct StoreRow {
  using Real = typename Arithmetic<T>::Real;
  DAGCORE_INLINE static void run(const Real* row, int64_t classes, int64_t width,
                                 int64_t class_stride, int64_t column_stride, T* out) {
    for (int64_t c = 0; c < classes; ++c) {
      const Real* from = row + c * width;
      T* to = out + c * class_stride;
      if (column_stride == 1) {
        for (int64_t x = 0; x < width; ++x) to[x] = Pixel<T>::store(from[x]);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x * column_stride] = Pixel<T>::store(from[x]);
      }
    }
  }
};

template <typename T>
void store_row(const Tensor& seed, int64_t n, int64_t y, const Map<T>& map,
               const typename Arithmetic<T>::Real* row) {
  T* out = static_cast<T*>(seed.data_ptr()) + n * seed.stride(0) + y * seed.stride(2);
  run_simd<StoreRow<T>>(map.simd, row, map.classes, map.width, seed.stride(1), seed.stride(3), out);
}

// The seed's rows that two bands share: each band keeps its first and its last row for itself, and
// they are added afterwards, in the order of the bands.
template <typename T>
struct SharedRows {
  using Real = typename Arithmetic<T>::Real;
  int64_t bands, row;            // row: C * w
  std::unique_ptr<Real[]> data;  // not zeroed: every row is written before it is read

  SharedRows(const Map<T>& map)
      : bands(map.bands()),
        row(map.classes * map.width),
        data(new Real[2 * map.images * bands * row]) {}
  Real* first(int64_t n, int64_t band) { return &data[((n * bands + band) * 2) * row]; }
  Real* last(int64_t n, int64_t band) { return first(n, band) + row; }
};

// Counts the active pixels of the cells' part in one segment of rows, and adds their seed.
template <typename T, bool kRunnerUp>
uint32_t seed_segment(const BilinearCall& call, const Map<T>& map,
                      const LabelRows<typename Arithmetic<T>::Index, kRunnerUp>& rows,
                      const Segment& y, Band<T>* band,
                      const CornerSums<typename Arithmetic<T>::Real>& sums) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  Tile<Real, Index>& tile = band->tile;
  uint32_t active = 0;
  for (const Segment& x : map.xs) {
    tile.weights = &band->weights_of(map.simd, y, x);
    const int32_t only = kRunnerUp ? kUncounted : only_winner(map, x.low, *band);
    if (only >= 0 && rows.uniform(x)) {  // one verdict for all pixels
      const Index label = rows.labels[x.begin], adversarial = rows.adversarial[x.begin];
      const Verdict<Index> verdict =
          judge(call.reach, label, adversarial, static_cast<Index>(only), false);
      if (is_out_of_range(label, adversarial)) active |= kOutOfRangeFlag;
      if (verdict.plus < 0) continue;
      active += static_cast<uint32_t>(tile.weights->count);
      sums.add(x, verdict.plus, 1, tile.weights->total);
      sums.add(x, verdict.minus, -1, tile.weights->total);
      continue;
    }
    run_simd<TakeLabels<Index>>(map.simd, rows.labels.data(), rows.width, y, x, tile.label);
    if (!kRunnerUp) {
      run_simd<TakeLabels<Index>>(map.simd, rows.adversarial.data(), rows.width, y, x,
                                  tile.adversarial);
    }
    find_winners<T, kRunnerUp>(map, x.low, only, band);
    uint32_t here = 0;
    run_simd<Judge<Real, Index, kRunnerUp>>(map.simd, call.reach, &tile, &here);
    active |= here & kOutOfRangeFlag;
    here &= ~kOutOfRangeFlag;
    active += here;
    if (here) add_seed(map, x, here, band, sums);
  }
  return active;
}

// What a thread needs to seed bands, one after the other.
template <typename T, bool kRunnerUp>
struct Workshop {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  Band<T> band;
  LabelRows<Index, kRunnerUp> rows;
  std::vector<Real> sums[2];  // of the rows of the cells' upper and lower corners, (C, w)

  Workshop(const Map<T>& map, int64_t width)
      : band(map.classes, map.width, map.padded),
        rows(width),
        sums{std::vector<Real>(map.classes * map.width),
             std::vector<Real>(map.classes * map.width)} {}
};

// One band of one image: counts its active pixels and seeds its low-resolution rows.
template <typename T, bool kRunnerUp>
uint32_t seed_band(const BilinearCall& call, const Map<T>& map, const LabelSource& labels,
                   const LabelSource& adversarial, int64_t n, int64_t index,
                   Workshop<T, kRunnerUp>* workshop, SharedRows<T>* shared) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  const size_t begin = map.band_begin[index], end = map.band_begin[index + 1];
  LabelRows<Index, kRunnerUp>& rows = workshop->rows;
  std::vector<Real>(&sums)[2] = workshop->sums;
  for (std::vector<Real>& sum : sums) std::fill(sum.begin(), sum.end(), Real{0});
  const auto read = [&](auto reader, const LabelSource& source, const Tensor& maps,
                        const Segment& y, bool first, Index* into) {
    for (int i = 0; i < y.count; ++i) {
      run_simd<decltype(reader)>(map.simd, source.at(n, (y.begin + i) * maps.stride(1)),
                                 source.type, maps.stride(2), static_cast<int>(rows.width),
                                 call.rule, into + i * rows.width);
    }
    if (kRunnerUp) return;  // every pixel has its own
    run_simd<FindChanges<Index>>(map.simd, into, rows.width, y.count, first, rows.down.data(),
                                 rows.across.data());
  };

  uint32_t active = 0;
  for (size_t s = begin; s < end; ++s) {
    const Segment& y = map.ys[s];
    if (s == begin || y.low != map.ys[s - 1].low) {
      open_row<T, kRunnerUp>(map, n, y, s == begin ? -1 : map.ys[s - 1].high, &workshop->band);
    }
    read(ReadLabels<Index, false>{}, labels, call.labels, y, true, rows.labels.data());
    if (!kRunnerUp) {
      read(ReadLabels<Index, true>{}, adversarial, call.adversarial, y, false,
           rows.adversarial.data());
    }
    const uint32_t here = seed_segment(call, map, rows, y, &workshop->band,
                                       {sums[0].data(), sums[y.high != y.low].data(), map.width});
    active = (active + (here & ~kOutOfRangeFlag)) | (here & kOutOfRangeFlag);
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
    const auto workshop = std::make_unique<Workshop<T, kRunnerUp>>(map, call.labels.size(2));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands;
      const uint32_t sum = seed_band<T, kRunnerUp>(call, map, labels, adversarial, n, item % bands,
                                                   workshop.get(), &shared);
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
    const auto band = std::make_unique<Band<T>>(map.classes, map.width, map.padded);
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
          tile.weights = &band->weights_of(map.simd, y, x);
          find_winners<T, false>(map, x.low, only_winner(map, x.low, *band), band.get());
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
