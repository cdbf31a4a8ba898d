// loss_seed_bilinear on the CPU: bands of an image in parallel, each of them a few tiles at a time.
// The scores of their pixels are interpolated into the cache, become features and gradients there,
// and are summed at the four corners of each tile's cell.
#include "../loss_seed_bilinear.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../registration.h"
#include "bilinear_labels.h"
#include "bilinear_sums.h"
#include "loss_strips.h"

namespace dagcore {
namespace {

constexpr int64_t kStripBytes = 20 << 10;  // of a strip's scores, roughly
constexpr int kTileColumns = 16;           // at most
// Minimum number of rows of cells in a band: each band keeps two rows of sums for itself, and
// together they must not take more memory than the scores.
template <typename T>
constexpr int64_t kBandRows = 2 * sizeof(RealOf<T>) / sizeof(T);

// Adjacent tiles, either all in a segment of rows or the few of a strip: where the lanes of each
// begin, and the weights of their pixels.
template <typename Real>
struct TileRow {
  std::vector<int64_t> begin;  // and where the last ones end
  std::vector<Real> weights;   // of the four corners, (4, pitch)
  int64_t pitch;
  int y_weights = -1;  // those of their segment of rows

  TileRow(const std::vector<Segment>& ys, const std::vector<Segment>& xs)
      : begin(xs.size() + 1), pitch(kLanes) {
    int rows = 0;
    for (const Segment& y : ys) rows = std::max(rows, y.count);
    for (const Segment& x : xs) pitch += padded(rows, x);
    weights.resize(4 * pitch);
  }
  static int64_t padded(int rows, const Segment& x) {
    return (rows * x.count + kLanes - 1) / kLanes * kLanes;
  }
};

template <typename Real>
DAGCORE_INLINE void fill_row(const Segment& y, const std::vector<Segment>& xs, TileRow<Real>* row) {
  if (row->y_weights == y.weights) return;
  row->y_weights = y.weights;
  for (size_t k = 0; k < xs.size(); ++k) {
    row->begin[k + 1] = row->begin[k] + row->padded(y.count, xs[k]);
    fill_corners(y, xs[k], row->pitch, row->weights.data() + row->begin[k]);
  }
}

// The scores at a cell's corners: rows of scores, (C, padded), from its left corners on.
template <typename Real>
struct CellScores {
  const Real *above, *below;
  int64_t padded, right;  // from one class to the next, from the left to the right corners
};

// The scores of a vector of pixels, and the largest of them, all kept in registers.
template <int kTops, typename Real, typename Index>
struct Blend {
  CellScores<Real> cell;
  Real* out;
  Real w0[kLanes], w1[kLanes], w2[kLanes], w3[kLanes], top[kTops][kLanes];
  Index top_at[kTops][kLanes];

  DAGCORE_INLINE Blend(const CellScores<Real>& cell, const Real* weights, int64_t pitch, Real* out)
      : cell(cell), out(out) {
    for (int j = 0; j < kLanes; ++j) {
      w0[j] = weights[j];
      w1[j] = weights[j + pitch];
      w2[j] = weights[j + 2 * pitch];
      w3[j] = weights[j + 3 * pitch];
    }
  }
  template <bool kFirst>
  DAGCORE_INLINE void next(Index c, int64_t pitch) {
    const Real s0 = cell.above[0], s1 = cell.above[cell.right];
    const Real s2 = cell.below[0], s3 = cell.below[cell.right];
#pragma GCC unroll 1
    for (int j = 0; j < kLanes; ++j) {
      const Real value = blend({w0[j], w1[j], w2[j], w3[j]}, {s0, s1, s2, s3});
      out[j] = value;
      Tops<Real, Index, kTops> tops;
      if (kFirst) {
        tops.first(value);
      } else {
        for (int t = 0; t < kTops; ++t) {
          tops.score[t] = top[t][j];
          tops.at[t] = top_at[t][j];
        }
        tops.next(value, c);
      }
      for (int t = 0; t < kTops; ++t) {
        top[t][j] = tops.score[t];
        top_at[t][j] = tops.at[t];
      }
    }
    cell.above += cell.padded;
    cell.below += cell.padded;
    out += pitch;
  }
  DAGCORE_INLINE void close(int64_t at, LossRow<Real, Index>* row) const {
    for (int t = 0; t < kTops; ++t) {
      for (int j = 0; j < kLanes; ++j) {
        row->top[t][at + j] = top[t][j];
        row->top_at[t][at + j] = top_at[t][j];
      }
    }
  }
};

// Two vectors of pixels at a time, so that one need not wait for the other.
template <int kTops, typename Real, typename Index>
DAGCORE_INLINE void blend_strip(const CellScores<Real>* cells, int64_t classes, const Real* weights,
                                int64_t pitch, const Strip<Real>& strip,
                                LossRow<Real, Index>* row) {
  int64_t at = 0;
  for (; at + kLanes < strip.count; at += 2 * kLanes) {
    Blend<kTops, Real, Index> one(cells[at / kLanes], weights + at, pitch, strip.work + at);
    Blend<kTops, Real, Index> two(cells[at / kLanes + 1], weights + at + kLanes, pitch,
                                  strip.work + at + kLanes);
    one.template next<true>(0, strip.pitch);
    two.template next<true>(0, strip.pitch);
    for (Index c = 1; c < classes; ++c) {
      one.template next<false>(c, strip.pitch);
      two.template next<false>(c, strip.pitch);
    }
    one.close(at, row);
    two.close(at + kLanes, row);
  }
  if (at < strip.count) {
    Blend<kTops, Real, Index> one(cells[at / kLanes], weights + at, pitch, strip.work + at);
    one.template next<true>(0, strip.pitch);
    for (Index c = 1; c < classes; ++c) one.template next<false>(c, strip.pitch);
    one.close(at, row);
  }
}

// Working memory of a thread, which seeds one band after another.
template <typename T>
struct LossWorkshop {
  using Real = RealOf<T>;
  using Index = IndexOf<Real>;
  std::vector<Real> above, below;  // scores of the cells' upper and lower corners, (C, padded)
  LabelRows<Index> labels;
  TileRow<Real> tiles;
  int64_t pitch;
  std::unique_ptr<Real[], AlignedDelete> work;
  LossRow<Real, Index> row;
  std::vector<double> sums[2];  // of the rows of the cells' upper and lower corners, (C, w + 1)

  LossWorkshop(const Cells<T>& cells, int64_t lanes)
      : above(cells.classes * cells.padded + kLanes),
        below(above.size()),
        labels(cells.out_width),
        tiles(cells.ys, cells.xs),
        pitch(lanes),
        work(aligned_array<Real>(cells.classes * lanes)),
        sums{std::vector<double>(cells.classes * (cells.width + 1)),
             std::vector<double>(cells.classes * (cells.width + 1))} {}
};

// The labels and scores of the tiles from `begin` to `end`.
template <int kTops, typename T>
DAGCORE_INLINE void open_strip(const Cells<T>& cells, const Segment& y, bool targeted, size_t begin,
                               size_t end, const Strip<RealOf<T>>& strip, LossWorkshop<T>* shop) {
  using Index = IndexOf<RealOf<T>>;
  const auto& tiles = shop->tiles;
  const LabelRows<Index>& labels = shop->labels;
  auto& row = shop->row;
  CellScores<RealOf<T>> corners[kStrip / kLanes];
  for (size_t k = begin; k < end; ++k) {
    const Segment& x = cells.xs[k];
    const int64_t at = tiles.begin[k] - tiles.begin[begin];
    const int64_t last = tiles.begin[k + 1] - tiles.begin[begin];
    take_labels(labels.labels.get(), labels.stride, y, x, row.label + at);
    if (targeted) {
      take_labels(labels.adversarial.get(), labels.stride, y, x, row.adversarial + at);
    }
    for (int64_t p = at + y.count * x.count; p < last; ++p) {
      row.label[p] = row.adversarial[p] = kUncounted;
    }
    for (int64_t p = at; p < last; p += kLanes) {
      corners[p / kLanes] = {&shop->above[x.low], &shop->below[x.low], cells.padded,
                             cells.column_step};
    }
  }
  blend_strip<kTops>(corners, cells.classes, &tiles.weights[tiles.begin[begin]], tiles.pitch, strip,
                     &row);
}

template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void cut_gradients(int count, LossRow<Real, Index>* row) {
  for (int i = 0; i < count; ++i) {
    if constexpr (is_sparse(kLoss)) {
      for (int t = 0; t < terms_of(kLoss); ++t) row->value[t][i] = summable(row->value[t][i]);
    } else {
      row->scale[i] = summable(row->scale[i]);
      row->at_aim[i] = summable(row->at_aim[i]);
    }
  }
}

// Adds the gradients of the tiles from `begin` to `end`: those of each class, weighed and summed at
// the corners of each tile's cell.
template <Loss kLoss, typename T>
DAGCORE_INLINE void add_strip(const Cells<T>& cells, size_t begin, size_t end,
                              const Strip<RealOf<T>>& strip, const LossWorkshop<T>& shop,
                              const CornerSums<double>& sums) {
  using Real = RealOf<T>;
  using Index = IndexOf<Real>;
  const LossRow<Real, Index>& row = shop.row;
  const int64_t first = shop.tiles.begin[begin], pitch = shop.tiles.pitch;
  const Real* weights = &shop.tiles.weights[first];
  const auto classes = static_cast<Index>(cells.classes);
  for (size_t k = begin; k < end; ++k) {
    const int64_t at = shop.tiles.begin[k] - first, last = shop.tiles.begin[k + 1] - first;
    double* above = sums.above + cells.xs[k].low;
    double* below = sums.below + cells.xs[k].low;
    const auto add = [&](const Real(&total)[4]) __attribute__((always_inline)) {
      above[0] += total[0];
      above[1] += total[1];
      below[0] += total[2];
      below[1] += total[3];
      above += sums.width;
      below += sums.width;
    };
    Index c = 0;
    // If a tile is one vector, sums across lanes are most of the work: two classes at a time.
    for (; last - at == kLanes && c + 1 < classes; c += 2) {
      const Real *work = strip.row(c) + at, *next = strip.row(c + 1) + at;
      Real one[kLanes], two[kLanes], total[2][4];
      for (int64_t j = 0; j < kLanes; ++j) {
        one[j] = gradient_at<kLoss>(row, work[j], at + j, c);
        two[j] = gradient_at<kLoss>(row, next[j], at + j, static_cast<Index>(c + 1));
      }
      add_lanes(one, two, weights + at, pitch, total);
      add(total[0]);
      add(total[1]);
    }
    for (; c < classes; ++c) {
      const Real* work = strip.row(c);
      Lanes<Real> s0, s1, s2, s3;
      for (int64_t p = at; p < last; p += kLanes) {
        const Real* corner = weights + p;
#pragma GCC unroll 1
        for (int64_t j = 0; j < kLanes; ++j) {
          const Real gradient = gradient_at<kLoss>(row, work[p + j], p + j, c);
          s0.lane[j] += corner[j] * gradient;
          s1.lane[j] += corner[j + pitch] * gradient;
          s2.lane[j] += corner[j + 2 * pitch] * gradient;
          s3.lane[j] += corner[j + 3 * pitch] * gradient;
        }
      }
      Real total[4];
      add_lanes(s0, s1, s2, s3, total);
      add(total);
    }
  }
}

struct LossOfBand {
  double sum = 0;
  uint32_t hits = 0;
};

// Computes losses and hits of the cells in one segment of rows, and adds their seed.
template <typename T, Loss kLoss>
void seed_segment(const BilinearLossCall& call, const LossTargets& targets, const Cells<T>& cells,
                  int64_t n, const Segment& y, const CornerSums<double>& sums,
                  LossWorkshop<T>* shop, LossOfBand* band) {
  using Real = RealOf<T>;
  using Index = IndexOf<Real>;
  const Simd simd = cells.simd;
  const auto rule = targets.rule_of<Real>(n);
  auto& labels = shop->labels;
  run_simd<read_label_rows<Index, false>>(simd, call.labels, targets.labels, targets.labelling, n,
                                          y, false, labels.labels.get(), &labels);
  if (rule.targeted) {
    run_simd<read_label_rows<Index, true>>(simd, call.adversarial, targets.adversarial,
                                           targets.labelling, n, y, false, labels.adversarial.get(),
                                           &labels);
  }
  auto& tiles = shop->tiles;
  run_simd<fill_row<Real>>(simd, y, cells.xs, &tiles);
  for (size_t begin = 0, end; begin < cells.xs.size(); begin = end) {
    end = begin + 1;
    while (end < cells.xs.size() && tiles.begin[end + 1] - tiles.begin[begin] <= shop->pitch) ++end;
    const Strip<Real> strip{static_cast<int>(tiles.begin[end] - tiles.begin[begin]),
                            shop->work.get(), shop->pitch};
    run_simd<open_strip<tops_of(kLoss), T>>(simd, cells, y, rule.targeted, begin, end, strip, shop);
    double sum = 0;
    const uint32_t hits = judge_strip<kLoss>(simd, targets, rule, strip, &shop->row, &sum);
    band->sum += sum;
    band->hits = (band->hits + (hits & ~kOutOfRangeFlag)) | (hits & kOutOfRangeFlag);
    run_simd<cut_gradients<kLoss, Real, Index>>(simd, strip.count, &shop->row);
    run_simd<add_strip<kLoss, T>>(simd, cells, begin, end, strip, *shop, sums);
  }
  // The last column is its own neighbour.
  const int64_t last = cells.width;
  for (int64_t c = 0; c < cells.classes; ++c) {
    for (double* row : {sums.above + c * sums.width, sums.below + c * sums.width}) {
      row[last - 1] += row[last];
      row[last] = 0;
    }
  }
}

// Maximum number of pixels in a strip.
template <typename Real>
int64_t strip_lanes(int64_t classes) {
  const int64_t fits = kStripBytes / (classes * static_cast<int64_t>(sizeof(Real)));
  return std::clamp<int64_t>(fits / kLanes * kLanes, 2 * kLanes, kStrip);
}

template <typename T>
using SeedSegment = void(const BilinearLossCall&, const LossTargets&, const Cells<T>&, int64_t,
                         const Segment&, const CornerSums<double>&, LossWorkshop<T>*, LossOfBand*);

template <typename T>
void seed_maps(const BilinearLossCall& call, SeedSegment<T>* seed_segment) {
  using Real = RealOf<T>;
  const ScoreMaps maps = call.maps();
  const int64_t lanes = strip_lanes<Real>(maps.classes);
  int64_t columns = 1;
  for (const Segment& x : segments(maps.width, maps.out_width, maps.align_corners, kTileColumns)) {
    columns = std::max<int64_t>(columns, x.count);
  }
  const int rows = static_cast<int>(std::min<int64_t>(lanes / columns, kSide));
  const Cells<T> cells(maps, rows, kTileColumns, kBandRows<T>);
  const LossTargets targets = call.targets();
  const int64_t bands = cells.bands();
  SeedRows<T> seed(call.seed, cells,
                   Pixel<T>::load(store_seed<T>(std::numeric_limits<Real>::max())),
                   cells.width + 1);
  std::vector<double> band_sums(cells.images * bands);
  torch::stable::parallel_for(0, cells.images * bands, 1, [&](int64_t begin, int64_t end) {
    LossWorkshop<T> shop(cells, lanes);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands;
      LossOfBand band;
      const auto open = [&](const Segment& y, int64_t previous_high) {
        if (y.low == previous_high) {
          shop.above.swap(shop.below);
        } else {
          cells.read(n, y.low, &shop.above);
        }
        cells.read(n, y.high, &shop.below);
      };
      const auto add = [&](const Segment& y, const CornerSums<double>& sums) {
        seed_segment(call, targets, cells, n, y, sums, &shop, &band);
      };
      seed_rows(n, item % bands, shop.sums, &seed, open, add);
      add_active(targets.hits + n, band.hits);
      band_sums[item] = band.sum;
    }
  });
  torch::stable::parallel_for(0, cells.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) seed.join(n);
  });
  double* sums = static_cast<double*>(call.sums.mutable_data_ptr());
  for (int64_t item = 0; item < cells.images * bands; ++item) sums[item / bands] += band_sums[item];
}

// scores (N, C, h, w), labels and adversarial (N, H, W), blend (N,), class_weights (C,); see
// dagcore/ops. Returns the seed at the low-resolution scores, laid out like them, the sums of the
// losses (N,), double, and the hits (N,), int32.
std::tuple<Tensor, Tensor, Tensor> loss_seed_bilinear(Tensor scores, Tensor labels,
                                                      std::optional<Tensor> adversarial,
                                                      std::string loss, std::optional<Tensor> blend,
                                                      double q, double kappa,
                                                      std::optional<Tensor> class_weights,
                                                      int64_t ignore_index, bool align_corners) {
  BilinearLossCall call(align_corners, scores, labels, adversarial, loss, blend, q, kappa,
                        class_weights, ignore_index);
  return call.run([&](auto type, auto loss) {
    using T = decltype(type);
    seed_maps<T>(call, seed_segment<T, loss.value>);
  });
}

}  // namespace

DAGCORE_REGISTER(CPU, "loss_seed_bilinear", loss_seed_bilinear)

}  // namespace dagcore
