// argmax_bilinear on CUDA: one kernel over the patches of all cells.
#include "bilinear.cuh"

namespace dagcore {
namespace {

template <typename T>
__global__ void __launch_bounds__(kPatchThreads, 4)
    argmax_cells(const __grid_constant__ PatchGrid grid, int64_t* labels) {
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kPatchWarps) + threadIdx.x / 32;
  if (warp >= grid.warps()) return;
  const Patch patch(grid, warp);
  if (patch.pixels() == 0) return;
  PixelWeights<T> weights[kSlots];
  weigh<T>(grid, patch, weights);
  Top<RealOf<T>, int32_t, false> top[kSlots];
  find_patch_winners<T, false>(grid, patch, weights, top);
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    int64_t y = 0, x = 0;
    if (!pixel_at(patch, k, &y, &x)) continue;
    labels[(patch.n * grid.out_height + y) * grid.out_width + x] = top[k].best_class;
  }
}

// scores (N, C, h, w) -> the winning class at each pixel of (N, height, width), int64.
Tensor argmax_bilinear(Tensor scores, int64_t height, int64_t width, bool align_corners) {
  const Launcher launch("argmax_bilinear", scores);
  const PatchGrid grid(ScoreMaps(scores, height, width, align_corners));
  Tensor labels = torch::stable::new_empty(scores, {grid.images, height, width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  int64_t* out = static_cast<int64_t*>(labels.mutable_data_ptr());
  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    launch(argmax_cells<decltype(type)>, grid.blocks(), kPatchThreads, grid, out);
  });
  return labels;
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "argmax_bilinear", argmax_bilinear)

}  // namespace dagcore
