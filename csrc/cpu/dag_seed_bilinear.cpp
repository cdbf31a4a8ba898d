// dag_seed_bilinear on the CPU: bands of an image in parallel, in each of them cell by cell.
#include "../dag_seed_bilinear.h"

#include <memory>

#include "../registration.h"
#include "bilinear_labels.h"
#include "bilinear_sums.h"
#include "read_labels.h"

namespace dagcore {
namespace {

// Counts the active pixels of the cells' part in one segment of rows, and adds their seed.
template <typename T, bool kRunnerUp>
uint32_t seed_segment(const BilinearSeedCall& call, const Cells<T>& cells,
                      const LabelRows<typename Arithmetic<T>::Index, kRunnerUp>& rows,
                      const Segment& y, CellRow<T>* cell_row, ClassSums<T>* rest,
                      const CornerSums<typename Arithmetic<T>::Real>& sums) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  Tile<Real, Index>& tile = cell_row->tile;
  uint32_t active = 0;
  for (const Segment& x : cells.xs) {
    tile.weights = &cell_row->weights_of(cells.simd, y, x);
    const int32_t only = kRunnerUp ? kUncounted : only_winner(cells, x.low, *cell_row);
    if (only >= 0 && rows.uniform(x)) {  // one verdict for all pixels
      const Index label = rows.labels[x.begin], adversarial = rows.adversarial[x.begin];
      const Verdict<Index> verdict =
          judge(call.objective, label, adversarial, static_cast<Index>(only), false);
      if (is_out_of_range(label, adversarial)) active |= kOutOfRangeFlag;
      if (verdict.plus < 0) continue;
      active += static_cast<uint32_t>(tile.weights->count);
      sums.add(x, verdict.plus, 1, tile.weights->total);
      sums.add(x, verdict.minus, -1, tile.weights->total);
      continue;
    }
    run_simd<TakeLabels<Index>>(cells.simd, rows.labels.data(), rows.width, y, x, tile.label);
    if (!kRunnerUp) {
      run_simd<TakeLabels<Index>>(cells.simd, rows.adversarial.data(), rows.width, y, x,
                                  tile.adversarial);
    }
    find_tile_winners<T, kRunnerUp>(cells, x.low, only, cell_row);
    uint32_t here = 0;
    run_simd<JudgeTile<Real, Index, kRunnerUp>>(cells.simd, call.objective, &tile, &here);
    active |= here & kOutOfRangeFlag;
    here &= ~kOutOfRangeFlag;
    active += here;
    if (here) add_tile_seed(cells.simd, x, here, &tile, rest, sums);
  }
  return active;
}

// What a thread needs to seed bands, one after the other.
template <typename T, bool kRunnerUp>
struct Workshop {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  CellRow<T> cell_row;
  ClassSums<T> rest;
  LabelRows<Index, kRunnerUp> rows;
  std::vector<Real> sums[2];  // of the rows of the cells' upper and lower corners, (C, w)

  explicit Workshop(const Cells<T>& cells)
      : cell_row(cells),
        rest(cells.classes),
        rows(cells.out_width),
        sums{std::vector<Real>(cells.classes * cells.width),
             std::vector<Real>(cells.classes * cells.width)} {}
};

// One band of one image: counts its active pixels and seeds its low-resolution rows.
template <typename T, bool kRunnerUp>
uint32_t seed_band(const BilinearSeedCall& call, const Cells<T>& cells, const LabelSource& labels,
                   const LabelSource& adversarial, int64_t n, int64_t index,
                   Workshop<T, kRunnerUp>* workshop, SharedRows<T>* shared) {
  using Real = typename Arithmetic<T>::Real;
  using Index = typename Arithmetic<T>::Index;
  const size_t begin = cells.band_begin[index], end = cells.band_begin[index + 1];
  LabelRows<Index, kRunnerUp>& rows = workshop->rows;
  std::vector<Real>(&sums)[2] = workshop->sums;
  for (std::vector<Real>& sum : sums) std::fill(sum.begin(), sum.end(), Real{0});
  const auto read = [&](auto reader, const LabelSource& source, const Tensor& maps,
                        const Segment& y, bool first, Index* into) {
    for (int i = 0; i < y.count; ++i) {
      run_simd<decltype(reader)>(cells.simd, source.at(n, (y.begin + i) * maps.stride(1)),
                                 source.type, maps.stride(2), static_cast<int>(rows.width),
                                 call.rule, into + i * rows.width);
    }
    if (kRunnerUp) return;  // every pixel has its own
    run_simd<FindChanges<Index>>(cells.simd, into, rows.width, y.count, first, rows.down.data(),
                                 rows.across.data());
  };

  uint32_t active = 0;
  for (size_t s = begin; s < end; ++s) {
    const Segment& y = cells.ys[s];
    if (s == begin || y.low != cells.ys[s - 1].low) {
      open_row<T, kRunnerUp>(cells, n, y, s == begin ? -1 : cells.ys[s - 1].high,
                             &workshop->cell_row);
    }
    read(ReadLabels<Index, false>{}, labels, call.labels, y, true, rows.labels.data());
    if (!kRunnerUp) {
      read(ReadLabels<Index, true>{}, adversarial, call.adversarial, y, false,
           rows.adversarial.data());
    }
    const uint32_t here = seed_segment(call, cells, rows, y, &workshop->cell_row, &workshop->rest,
                                       {sums[0].data(), sums[y.high != y.low].data(), cells.width});
    active = (active + (here & ~kOutOfRangeFlag)) | (here & kOutOfRangeFlag);
    if (s + 1 < end && cells.ys[s + 1].low == y.low) continue;
    if (y.low == cells.ys[begin].low) {
      std::copy(sums[0].begin(), sums[0].end(), shared->first(n, index));
    } else {
      store_row<T>(call.seed, n, y.low, cells, sums[0].data());
    }
    sums[0].swap(sums[1]);
    if (s + 1 == end) {
      std::copy(sums[0].begin(), sums[0].end(), shared->last(n, index));
    } else if (cells.ys[s + 1].low != y.high && y.high != y.low) {  // no cell begins at this row
      store_row<T>(call.seed, n, y.high, cells, sums[0].data());
      std::fill(sums[0].begin(), sums[0].end(), Real{0});
    }
    std::fill(sums[1].begin(), sums[1].end(), Real{0});
  }
  return active;
}

template <typename T, bool kRunnerUp>
void seed_maps(const BilinearSeedCall& call) {
  const Cells<T> cells(call.maps());
  const LabelSource labels(call.labels), adversarial(call.adversarial);
  uint32_t* active = static_cast<uint32_t*>(call.active.mutable_data_ptr());
  SharedRows<T> shared(cells);
  const int64_t bands = cells.bands();
  torch::stable::parallel_for(0, cells.images * bands, 1, [&](int64_t begin, int64_t end) {
    const auto workshop = std::make_unique<Workshop<T, kRunnerUp>>(cells);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands;
      const uint32_t sum = seed_band<T, kRunnerUp>(call, cells, labels, adversarial, n,
                                                   item % bands, workshop.get(), &shared);
      if (sum & kOutOfRangeFlag) __atomic_fetch_or(&active[n], kOutOfRangeFlag, __ATOMIC_RELAXED);
      __atomic_fetch_add(&active[n], sum & ~kOutOfRangeFlag, __ATOMIC_RELAXED);
    }
  });
  torch::stable::parallel_for(0, cells.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) join_bands<T>(call.seed, cells, n, &shared);
  });
}

// scores (N, C, h, w), labels and adversarial (N, H, W); without adversarial labels the
// runner-up's. Returns the seed at the low-resolution scores, laid out like them, and the number of
// active targets (N,), int32.
std::tuple<Tensor, Tensor> dag_seed_bilinear(Tensor scores, Tensor labels,
                                             std::optional<Tensor> adversarial,
                                             std::string objective, int64_t ignore_index,
                                             bool align_corners) {
  BilinearSeedCall call(scores, labels, adversarial, objective_named(objective), ignore_index,
                        align_corners);
  if (labels.numel() == 0) {
    torch::stable::zero_(call.seed);
    return {call.seed, call.active};
  }
  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    call.runner_up ? seed_maps<T, true>(call) : seed_maps<T, false>(call);
  });
  return {call.seed, call.active};
}

}  // namespace

DAGCORE_REGISTER(CPU, "dag_seed_bilinear", dag_seed_bilinear)

}  // namespace dagcore
