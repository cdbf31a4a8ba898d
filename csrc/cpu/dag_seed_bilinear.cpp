// dag_seed_bilinear on the CPU: bands of an image in parallel, each of them cell by cell.
#include "../dag_seed_bilinear.h"

#include <memory>

#include "../registration.h"
#include "bilinear_labels.h"
#include "bilinear_sums.h"
#include "targets.h"

namespace dagcore {
namespace {

template <typename Index>
DAGCORE_INLINE void read_rows(const BilinearSeedCall& call, const Targets& targets, int64_t n,
                              const Segment& y, LabelRows<Index>* rows) {
  const bool marks = !targets.runner_up;  // else every pixel has its own adversarial label
  if (marks) {
    std::fill(rows->down.begin(), rows->down.end(), Index{0});
    std::fill(rows->across.begin(), rows->across.end(), Index{0});
    read_label_rows<Index, true>(call.adversarial, targets.adversarial, call.rule, n, y, true,
                                 rows->adversarial.get(), rows);
  }
  read_label_rows<Index, false>(call.labels, targets.labels, call.rule, n, y, marks,
                                rows->labels.get(), rows);
}

// Working memory of a thread, which seeds one band after another.
template <typename T, bool kSecond>
struct Workshop {
  using Real = RealOf<T>;
  CellRow<T> cell_row;
  ClassSums<Real> rest;
  LabelRows<IndexOf<Real>> rows;
  std::vector<Real> sums[2];  // of the rows of the cells' upper and lower corners, (C, w)

  explicit Workshop(const Cells<T>& cells)
      : cell_row(cells),
        rest(cells.classes),
        rows(cells.out_width),
        sums{std::vector<Real>(cells.classes * cells.width),
             std::vector<Real>(cells.classes * cells.width)} {}
};

// The scores of a tile's labels, from which the margin is measured.
template <typename T, typename Index>
void find_own(const Cells<T>& cells, int64_t x, bool uniform, CellRow<T>* row) {
  Tile<RealOf<T>>& tile = row->tile;
  if (uniform) {
    const Index label = std::max<Index>(tile.label[0], 0);
    const auto own = candidate(cells, x, *row, static_cast<int32_t>(label));
    return run_simd<fill_own<RealOf<T>>>(cells.simd, own, &tile);
  }
  const int64_t right = x + 1 < cells.width ? cells.column_step : 0;
  run_simd<gather_own<RealOf<T>>>(cells.simd, &row->above.scores[x], &row->below.scores[x],
                                  cells.padded, right, &tile);
}

// Counts the active pixels of the cells in one segment of rows, and adds their seed.
template <typename T, bool kSecond>
uint32_t seed_segment(const Targets& targets, const Cells<T>& cells, const Segment& y,
                      const CornerSums<RealOf<T>>& sums, Workshop<T, kSecond>* workshop) {
  using Real = RealOf<T>;
  using Index = IndexOf<Real>;
  const LabelRows<Index>& rows = workshop->rows;
  CellRow<T>& cell_row = workshop->cell_row;
  Tile<Real>& tile = cell_row.tile;
  const bool measures_label = targets.measures_label();
  uint32_t active = 0;
  for (const Segment& x : cells.xs) {
    tile.weights = cell_row.weights_of(cells.simd, y, x);
    int32_t only = kSecond ? kUncounted : only_winner(cells, x.low, cell_row);
    const bool uniform = !targets.runner_up && (only >= 0 || measures_label) && rows.uniform(x);
    const Index label = rows.labels[x.begin];
    if (only >= 0 && measures_label) {
      const bool clear = uniform && (label < 0 || label == only ||
                                     is_far(cells, x.low, cell_row, label, only, targets.margin));
      if (!clear) only = kUncounted;  // the winner's lead must be measured
    }
    if (only >= 0 && uniform) {  // one verdict for all pixels
      const Index adversarial = rows.adversarial[x.begin];
      const Verdict<Index> verdict =
          judge<Index>(targets.objective, label, adversarial, only, false);
      if (is_out_of_range(label, adversarial)) active |= kOutOfRangeFlag;
      if (verdict.plus < 0) continue;
      active += static_cast<uint32_t>(tile.weights->count);
      sums.add(x, verdict.plus, 1, cell_row.total_weight(cells.simd));
      sums.add(x, verdict.minus, -1, cell_row.total_weight(cells.simd));
      continue;
    }
    run_simd<take_labels<Index>>(cells.simd, rows.labels.get(), rows.stride, y, x, tile.label);
    if (!targets.runner_up) {
      run_simd<take_labels<Index>>(cells.simd, rows.adversarial.get(), rows.stride, y, x,
                                   tile.adversarial);
    }
    const int count = tile.weights->count, padded = tile.weights->padded;
    for (int p = count; p < padded; ++p) tile.label[p] = tile.adversarial[p] = kUncounted;
    find_tile_winners<T, kSecond>(cells, x.low, only, &cell_row);
    if (measures_label) find_own<T, Index>(cells, x.low, uniform, &cell_row);
    uint32_t here = judge_targets<Real, Index, kSecond>(cells.simd, targets, padded, &tile);
    active |= here & kOutOfRangeFlag;
    here &= ~kOutOfRangeFlag;
    active += here;
    if (here) add_tile_seed(cells.simd, x, here, &tile, &workshop->rest, sums);
  }
  return active;
}

// One band of one image: counts its active pixels and seeds its low-resolution rows.
template <typename T, bool kSecond>
uint32_t seed_band(const BilinearSeedCall& call, const Targets& targets, int64_t n, int64_t index,
                   Workshop<T, kSecond>* workshop, SeedRows<T>* rows) {
  using Real = RealOf<T>;
  const Cells<T>& cells = rows->cells;
  uint32_t active = 0;
  const auto open = [&](const Segment& y, int64_t previous_high) {
    open_row<T, kSecond>(cells, n, y, previous_high, &workshop->cell_row);
  };
  const auto add = [&](const Segment& y, const CornerSums<Real>& sums) {
    run_simd<read_rows<IndexOf<Real>>>(cells.simd, call, targets, n, y, &workshop->rows);
    const uint32_t here = seed_segment(targets, cells, y, sums, workshop);
    active = (active + (here & ~kOutOfRangeFlag)) | (here & kOutOfRangeFlag);
  };
  seed_rows(n, index, workshop->sums, rows, open, add);
  return active;
}

template <typename T, bool kSecond>
void seed_maps(const BilinearSeedCall& call) {
  const Cells<T> cells(call.maps());
  const Targets targets = call.targets();
  const int64_t bands = cells.bands();
  SeedRows<T> rows(call.seed, cells);
  torch::stable::parallel_for(0, cells.images * bands, 1, [&](int64_t begin, int64_t end) {
    const auto workshop = std::make_unique<Workshop<T, kSecond>>(cells);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands, band = item % bands;
      add_active(targets.active + n, seed_band(call, targets, n, band, workshop.get(), &rows));
    }
  });
  torch::stable::parallel_for(0, cells.images, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) rows.join(n);
  });
}

// scores (N, C, h, w), labels and adversarial (N, H, W); without adversarial labels, the runner-up.
// Returns the seed at the low-resolution scores, laid out like them, and the number of active
// targets (N,), int32.
std::tuple<Tensor, Tensor> dag_seed_bilinear(Tensor scores, Tensor labels,
                                             std::optional<Tensor> adversarial,
                                             std::string objective, int64_t ignore_index,
                                             double margin, bool align_corners) {
  BilinearSeedCall call(scores, labels, adversarial, objective, ignore_index, margin,
                        align_corners);
  return call.run([&](auto type, auto second) { seed_maps<decltype(type), second.value>(call); });
}

}  // namespace

DAGCORE_REGISTER(CPU, "dag_seed_bilinear", dag_seed_bilinear)

}  // namespace dagcore
