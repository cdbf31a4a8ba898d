// argmax_bilinear on the CPU: bands of an image in parallel, each of them cell by cell.
#include <algorithm>
#include <memory>

#include "../registration.h"
#include "bilinear_cells.h"

namespace dagcore {
namespace {

template <typename T>
void argmax_maps(const ScoreMaps& maps, int64_t* out) {
  const Cells<T> cells(maps);
  const int64_t bands = cells.bands();
  torch::stable::parallel_for(0, cells.images * bands, 1, [&](int64_t begin, int64_t end) {
    const auto row = std::make_unique<CellRow<T>>(cells);
    Tile<RealOf<T>>& tile = row->tile;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / bands, index = item % bands;
      const size_t first = cells.band_begin[index];
      for (size_t s = first; s < cells.band_begin[index + 1]; ++s) {
        const Segment& y = cells.ys[s];
        if (s == first || y.low != cells.ys[s - 1].low) {
          open_row<T, false>(cells, n, y, s == first ? -1 : cells.ys[s - 1].high, row.get());
        }
        for (const Segment& x : cells.xs) {
          tile.weights = row->weights_of(cells.simd, y, x);
          find_tile_winners<T, false>(cells, x.low, only_winner(cells, x.low, *row), row.get());
          for (int i = 0; i < y.count; ++i) {
            std::copy_n(tile.best_class + i * x.count, x.count,
                        out + (n * cells.out_height + y.begin + i) * cells.out_width + x.begin);
          }
        }
      }
    }
  });
}

// scores (N, C, h, w) -> the winning class at each pixel of (N, height, width), int64.
Tensor argmax_bilinear(Tensor scores, int64_t height, int64_t width, bool align_corners) {
  const ScoreMaps maps(scores, height, width, align_corners);
  Tensor labels = torch::stable::new_empty(scores, {maps.images, height, width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  int64_t* out = static_cast<int64_t*>(labels.mutable_data_ptr());
  for_float_type("scores", scores.scalar_type(),
                 [&](auto type) { argmax_maps<decltype(type)>(maps, out); });
  return labels;
}

}  // namespace

DAGCORE_REGISTER(CPU, "argmax_bilinear", argmax_bilinear)

}  // namespace dagcore
