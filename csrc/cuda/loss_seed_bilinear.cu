// loss_seed_bilinear on CUDA: one warp per cell, which adds to the sums at its four corners. Cells
// that share a corner run in different launches, so that no sum has two writers and the order is
// fixed.
#include "../loss_seed_bilinear.h"
#include "bilinear.cuh"
#include "losses.cuh"

namespace dagcore {
namespace {

struct BilinearLossArgs : LossTargets {
  PatchGrid grid;
  int64_t label_stride[3], adversarial_stride[3];  // of (N, H, W)
  double* sums;                                    // (N, C, h, w)
  double* losses;                                  // (N, h, w), of the cells
};

template <typename Value>
__device__ Value warp_sum(Value value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Adds a patch's gradients at the corners of its cell, class by class: each of four lanes has one
// corner. If two corners are the same low-resolution pixel, the first gets the sum of both.
template <typename T, Loss kLoss>
__device__ void add_patch(const BilinearLossArgs& args, const Patch& patch,
                          const PixelWeights<T> (&weights)[kSlots],
                          const Judged<kLoss, RealOf<T>> (&judged)[kSlots]) {
  using Real = RealOf<T>;
  const PatchGrid& grid = args.grid;
  const int lane = threadIdx.x % 32;
  const bool below = patch.high_y != patch.low_y, right = patch.high_x != patch.low_x;
  const bool adds = lane < 4 && (below || lane < 2) && (right || lane % 2 == 0);
  const int64_t y = lane < 2 ? patch.low_y : patch.high_y;
  const int64_t x = lane % 2 == 0 ? patch.low_x : patch.high_x;
  const int64_t plane = grid.height * grid.width;
  double* sum = args.sums + patch.n * grid.classes * plane + y * grid.width + x;
  for (int32_t c = 0; c < grid.classes; ++c, sum += plane) {
    const Corners<T> corners = Corners<T>::load(grid, patch, c);
    Real total[4] = {};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      const Real gradient = judged[k].gradient(blend(weights[k].corner, corners.score), c);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        total[corner] += product(weights[k].corner[corner], gradient);
      }
    }
#pragma unroll
    for (Real& value : total) value = warp_sum(value);
    if (!right) total[0] += total[1], total[2] += total[3];
    if (!below) total[0] += total[2], total[1] += total[3];
    const Real own =
        lane < 2 ? (lane == 0 ? total[0] : total[1]) : (lane == 2 ? total[2] : total[3]);
    if (adds) *sum += own;
  }
}

// The cells whose rows and columns are odd or even, as given.
template <typename T, Loss kLoss>
__global__ void __launch_bounds__(kPatchThreads, 4)
    seed_cells(const __grid_constant__ BilinearLossArgs args, int odd_y, int odd_x) {
  using Real = RealOf<T>;
  const PatchGrid& grid = args.grid;
  const int64_t columns = (grid.width + 1 - odd_x) / 2, rows = (grid.height + 1 - odd_y) / 2;
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kPatchWarps) + threadIdx.x / 32;
  if (warp >= grid.images * rows * columns) return;
  const int64_t n = warp / (rows * columns);
  const int64_t y = 2 * (warp / columns % rows) + odd_y, x = 2 * (warp % columns) + odd_x;
  const int64_t cell = (n * grid.height + y) * grid.width + x;
  const int64_t patches = grid.patches_y * grid.patches_x;
  const LossRule<Real> rule = args.template rule_of<Real>(n);
  double loss = 0;
  Count count;
  for (int64_t p = 0; p < patches; ++p) {
    const Patch patch(grid, cell * patches + p);
    if (patch.pixels() == 0) continue;
    PixelWeights<T> weights[kSlots];
    weigh<T>(grid, patch, weights);
    Judged<kLoss, Real> judged[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      int64_t row = 0, column = 0;
      judged[k] = {};
      if (!pixel_at(patch, k, &row, &column)) continue;
      const auto& strides = args.label_stride;
      const auto& others = args.adversarial_stride;
      const auto load = [&](int32_t c) {
        return blend(weights[k].corner, Corners<T>::load(grid, patch, c).score);
      };
      judged[k] =
          judge_loss<kLoss>(args, rule, n * strides[0] + row * strides[1] + column * strides[2],
                            n * others[0] + row * others[1] + column * others[2], load, &count);
      judged[k].for_parts([](Real part) { return summable(part); });
      loss += judged[k].loss;
    }
    add_patch<T, kLoss>(args, patch, weights, judged);
  }
  count.add_to(args.hits + n);
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0) args.losses[cell] = loss;
}

template <typename T>
__global__ void __launch_bounds__(kPatchThreads)
    store_sums(const double* sums, T* seed, int64_t count, int64_t classes, int64_t height,
               int64_t width, int64_t batch, int64_t class_stride, int64_t row_stride,
               int64_t column_stride) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kPatchThreads) + threadIdx.x;
  if (i >= count) return;
  const int64_t x = i % width, y = i / width % height, c = i / width / height % classes;
  const int64_t n = i / width / height / classes;
  seed[n * batch + c * class_stride + y * row_stride + x * column_stride] =
      store_seed<T>(static_cast<RealOf<T>>(sums[i]));
}

template <typename T, Loss kLoss>
void seed_maps(const BilinearLossCall& call, const Launcher& launch) {
  const Tensor &scores = call.scores, &seed = call.seed;
  const PatchGrid grid(call.maps());
  const Tensor sums = torch::stable::new_zeros(
      scores, {grid.images, grid.classes, grid.height, grid.width}, ScalarType::Double);
  const int64_t cells = grid.height * grid.width;
  const Tensor losses = torch::stable::new_empty(scores, {grid.images * cells}, ScalarType::Double);
  double* parts = static_cast<double*>(losses.mutable_data_ptr());
  const Tensor &labels = call.labels, &adversarial = call.adversarial;
  const BilinearLossArgs args{call.targets(),
                              grid,
                              {labels.stride(0), labels.stride(1), labels.stride(2)},
                              {adversarial.stride(0), adversarial.stride(1), adversarial.stride(2)},
                              static_cast<double*>(sums.mutable_data_ptr()),
                              parts};
  for (int odd_y = 0; odd_y < 2; ++odd_y) {
    for (int odd_x = 0; odd_x < 2; ++odd_x) {
      const int64_t warps =
          grid.images * ((grid.height + 1 - odd_y) / 2) * ((grid.width + 1 - odd_x) / 2);
      if (warps == 0) continue;
      launch(seed_cells<T, kLoss>, ceil_div(warps, kPatchWarps), kPatchThreads, args, odd_y, odd_x);
    }
  }
  launch(store_sums<T>, ceil_div(scores.numel(), kPatchThreads), kPatchThreads,
         static_cast<const double*>(sums.const_data_ptr()),
         static_cast<T*>(seed.mutable_data_ptr()), scores.numel(), grid.classes, grid.height,
         grid.width, seed.stride(0), seed.stride(1), seed.stride(2), seed.stride(3));
  launch(sum_losses, grid.images, kLossThreads, static_cast<const double*>(parts), cells,
         static_cast<double*>(call.sums.mutable_data_ptr()));
}

// scores (N, C, h, w), labels and adversarial (N, H, W), blend (N,), class_weights (C,); see the
// CPU op.
std::tuple<Tensor, Tensor, Tensor> loss_seed_bilinear(Tensor scores, Tensor labels,
                                                      std::optional<Tensor> adversarial,
                                                      std::string loss, std::optional<Tensor> blend,
                                                      double q, double kappa,
                                                      std::optional<Tensor> class_weights,
                                                      int64_t ignore_index, bool align_corners) {
  const Launcher launch("loss_seed_bilinear", scores);
  BilinearLossCall call(align_corners, scores, labels, adversarial, loss, blend, q, kappa,
                        class_weights, ignore_index);
  return call.run(
      [&](auto type, auto loss) { seed_maps<decltype(type), loss.value>(call, launch); });
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "loss_seed_bilinear", loss_seed_bilinear)

}  // namespace dagcore
