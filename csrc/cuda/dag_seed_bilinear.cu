// dag_seed_bilinear on CUDA: one kernel over the patches of all cells, one over the seed. Gradients
// are summed in fixed point, so that atomics in any order give the same bits.
#include <cmath>
#include <vector>

#include "../dag_seed_bilinear.h"
#include "bilinear.cuh"
#include "targets.cuh"

namespace dagcore {
namespace {

struct BilinearSeedArgs : Targets {
  PatchGrid grid;
  int64_t label_stride[3], adversarial_stride[3];  // of (N, H, W)
  double unit;      // of the sums in fixed point: the value of a weight of 1
  long long* sums;  // (N, C, h, w)
};

__device__ long long warp_sum(long long value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Adds the weights of all active pixels of a warp, one pair of classes after the other: inside a
// cell there are few.
template <typename T>
__device__ void add_patch_seed(const BilinearSeedArgs& args, const Patch& patch,
                               const PixelWeights<T> (&weights)[kSlots],
                               const Verdict<int32_t> (&verdict)[kSlots]) {
  const PatchGrid& grid = args.grid;
  const int lane = threadIdx.x % 32;
  bool pending[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) pending[k] = verdict[k].plus >= 0;
  while (true) {
    bool any = false;
    Verdict<int32_t> mine{kUncounted, kUncounted};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (pending[k] && !any) mine = verdict[k];
      any |= pending[k];
    }
    const unsigned waiting = __ballot_sync(~0u, any);
    if (waiting == 0) return;
    const int leader = __ffs(waiting) - 1;
    const int32_t plus = __shfl_sync(~0u, mine.plus, leader);
    const int32_t minus = __shfl_sync(~0u, mine.minus, leader);
    long long sum[4] = {};
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
      if (!pending[k] || verdict[k].plus != plus || verdict[k].minus != minus) continue;
      pending[k] = false;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        sum[corner] += __double2ll_rn(weights[k].corner[corner] * args.unit);
      }
    }
    // Lanes 0 to 3 add at `plus`, lanes 4 to 7 at `minus`, each at one corner.
    long long own = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const long long total = warp_sum(sum[corner]);
      if (lane % 4 == corner) own = lane < 4 ? total : -total;
    }
    if (lane < 8 && own != 0) {
      const int64_t y = lane % 4 < 2 ? patch.low_y : patch.high_y;
      const int64_t x = lane % 2 == 0 ? patch.low_x : patch.high_x;
      const int64_t c = lane < 4 ? plus : minus;
      const int64_t at = ((patch.n * grid.classes + c) * grid.height + y) * grid.width + x;
      atomicAdd(reinterpret_cast<unsigned long long*>(args.sums + at),
                static_cast<unsigned long long>(own));
    }
  }
}

template <typename T, bool kSecond>
__global__ void __launch_bounds__(kPatchThreads, 4)
    seed_cells(const __grid_constant__ BilinearSeedArgs args) {
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kPatchWarps) + threadIdx.x / 32;
  if (warp >= args.grid.warps()) return;
  const Patch patch(args.grid, warp);
  if (patch.pixels() == 0) return;
  PixelWeights<T> weights[kSlots];
  weigh<T>(args.grid, patch, weights);
  Top<RealOf<T>, int32_t, kSecond> top[kSlots];
  find_patch_winners<T, kSecond>(args.grid, patch, weights, top);

  Count count;
  const auto& label_stride = args.label_stride;
  const auto& adversarial_stride = args.adversarial_stride;
  Verdict<int32_t> verdict[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    int64_t y = 0, x = 0;
    verdict[k] = {kUncounted, kUncounted};
    if (!pixel_at(patch, k, &y, &x)) continue;
    const int64_t label_at = patch.n * label_stride[0] + y * label_stride[1] + x * label_stride[2];
    const int64_t adversarial_at =
        patch.n * adversarial_stride[0] + y * adversarial_stride[1] + x * adversarial_stride[2];
    const auto own = [&](int32_t label) {
      return blend(weights[k].corner, Corners<T>::load(args.grid, patch, label).score);
    };
    verdict[k] = judge_target(args, label_at, adversarial_at, top[k], own, &count);
  }
  add_patch_seed<T>(args, patch, weights, verdict);
  count.add_to(args.active + patch.n);
}

template <typename T>
__global__ void __launch_bounds__(kPatchThreads)
    store_seed(const long long* sums, double unit, T* seed, int64_t count, int64_t classes,
               int64_t height, int64_t width, int64_t batch, int64_t class_stride,
               int64_t row_stride, int64_t column_stride) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kPatchThreads) + threadIdx.x;
  if (i >= count) return;
  const int64_t x = i % width, y = i / width % height, c = i / width / height % classes;
  const int64_t n = i / width / height / classes;
  seed[n * batch + c * class_stride + y * row_stride + x * column_stride] =
      Pixel<T>::store(static_cast<RealOf<T>>(static_cast<double>(sums[i]) / unit));
}

// The largest sum of weights that one low-resolution index has along an axis.
double largest_weight(int64_t from, int64_t to, bool align_corners) {
  std::vector<double> sums(from);
  for (int64_t pixel = 0; pixel < to; ++pixel) {
    const Source source = source_of(pixel, from, to, align_corners);
    sums[source.low] += 1 - source.weight;
    sums[source.high] += source.weight;
  }
  return *std::max_element(sums.begin(), sums.end());
}

// 2^40, which leaves room for 2^23 weights of 1 in 64 bits, or less if the weights at one
// low-resolution pixel can sum to more.
double fixed_point_unit(const ScoreMaps& maps) {
  constexpr int kUnitBits = 40, kRoomBits = 23;
  constexpr double kRounding = 1 + 1e-6;  // the sum of the weights as rounded is not much larger
  if (maps.out_height * maps.out_width < int64_t{1} << kRoomBits) return std::ldexp(1, kUnitBits);
  const double most = largest_weight(maps.height, maps.out_height, maps.align_corners) *
                      largest_weight(maps.width, maps.out_width, maps.align_corners) * kRounding;
  int bits = kUnitBits;
  while (std::ldexp(most, bits) >= std::ldexp(1, kUnitBits + kRoomBits)) --bits;
  return std::ldexp(1, bits);
}

template <typename T, bool kSecond>
void seed_maps(const BilinearSeedCall& call, const Launcher& launch) {
  const Tensor &scores = call.scores, &seed = call.seed;
  const Tensor sums = torch::stable::new_zeros(
      scores, {scores.size(0), scores.size(1), scores.size(2), scores.size(3)}, ScalarType::Long);
  long long* data = static_cast<long long*>(sums.mutable_data_ptr());
  const double unit = fixed_point_unit(call.maps());
  const Tensor &labels = call.labels, &adversarial = call.adversarial;
  const BilinearSeedArgs args{call.targets(),
                              PatchGrid(call.maps()),
                              {labels.stride(0), labels.stride(1), labels.stride(2)},
                              {adversarial.stride(0), adversarial.stride(1), adversarial.stride(2)},
                              unit,
                              data};
  launch(seed_cells<T, kSecond>, args.grid.blocks(), kPatchThreads, args);
  launch(store_seed<T>, ceil_div(scores.numel(), kPatchThreads), kPatchThreads, data, unit,
         static_cast<T*>(seed.mutable_data_ptr()), scores.numel(), scores.size(1), scores.size(2),
         scores.size(3), seed.stride(0), seed.stride(1), seed.stride(2), seed.stride(3));
}

// scores (N, C, h, w), labels and adversarial (N, H, W); see the CPU op.
std::tuple<Tensor, Tensor> dag_seed_bilinear(Tensor scores, Tensor labels,
                                             std::optional<Tensor> adversarial,
                                             std::string objective, int64_t ignore_index,
                                             double margin, bool align_corners) {
  const Launcher launch("dag_seed_bilinear", scores);
  BilinearSeedCall call(scores, labels, adversarial, objective, ignore_index, margin,
                        align_corners);
  return call.run(
      [&](auto type, auto second) { seed_maps<decltype(type), second.value>(call, launch); });
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "dag_seed_bilinear", dag_seed_bilinear)

}  // namespace dagcore
