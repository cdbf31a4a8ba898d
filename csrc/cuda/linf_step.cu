// linf_step_ on CUDA: a reduction of the gradient, then one pass over the images.
#include <limits>

#include "../linf_step.h"
#include "pack.cuh"
#include "pixels.cuh"

namespace dagcore {
namespace {

constexpr int64_t kBlocks = 4096;

__device__ void atomic_largest(uint32_t* to, uint32_t bits) { atomicMax(to, bits); }
__device__ void atomic_largest(uint64_t* to, uint64_t bits) {
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(bits));
}

// ||gradient||_inf as bits, an integer maximum: the order of the blocks does not matter.
template <typename T, int V>
__global__ void __launch_bounds__(kPixelThreads)
    largest_magnitude(const __grid_constant__ LinfArgs args, ImageBlocks blocks) {
  using Bits = typename Pixel<T>::Bits;
  const Share<V> share(args.walk, blocks);
  if (!args.is_active(share.n)) return;
  Bits most = 0;
#pragma unroll 4
  for (int64_t i = share.begin; i < share.end; i += share.step) {
    int64_t at[kStepOperands];
    args.walk.locate(share.n, i * V, at);
    const Pack<T, V> r = load_pack<V>(static_cast<const T*>(args.gradient) + at[kGradient]);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Bits bits = magnitude_bits(r.value[v]);
      most = bits > most ? bits : most;
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Bits other = __shfl_down_sync(~0u, most, offset);
    most = other > most ? other : most;
  }
  if (threadIdx.x % 32 == 0) atomic_largest(static_cast<Bits*>(args.norms) + share.n, most);
}

template <typename T, int V, bool kBall, bool kGrid>
__global__ void __launch_bounds__(kPixelThreads)
    update(const __grid_constant__ LinfArgs args, ImageBlocks blocks, Step<RealOf<T>> step,
           Grid<RealOf<T>> grid) {
  const Share<V> share(args.walk, blocks);
  const auto scale = step_scale(step.gamma, static_cast<const RealOf<T>*>(args.norms)[share.n]);
  if (!args.is_active(share.n) || scale == 0) return;
  if (share.begin == 0) args.moved[share.n] = true;
#pragma unroll 2
  for (int64_t i = share.begin; i < share.end; i += share.step) {
    int64_t at[kStepOperands];
    args.walk.locate(share.n, i * V, at);
    T* image = static_cast<T*>(args.images) + at[kImages];
    const Pack<T, V> now = load_pack<V>(image);
    const Pack<T, V> r = load_pack<V>(static_cast<const T*>(args.gradient) + at[kGradient]);
    Pack<T, V> start = now;
    if (kBall) start = load_pack<V>(static_cast<const T*>(args.origin) + at[kOrigin]);
    Pack<T, V> next, shown;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      next.value[v] =
          Pixel<T>::store(step_pixel(Pixel<T>::load(now.value[v]), Pixel<T>::load(start.value[v]),
                                     Pixel<T>::load(r.value[v]), scale, step));
      if (kGrid) {
        shown.value[v] = Pixel<T>::store(
            show_pixel<kBall>(Pixel<T>::load(next.value[v]), Pixel<T>::load(start.value[v]), grid));
      }
    }
    store_pack(next, image);
    if (kGrid) store_pack(shown, static_cast<T*>(args.shown) + at[kShown]);
  }
}

template <typename T, int V>
void step_packs(int64_t images, const LinfArgs& args, const Step<RealOf<T>>& step,
                const Grid<RealOf<T>>* grid, const Launcher& launch) {
  const ImageBlocks blocks = pixel_blocks<V>(images, args.walk, kBlocks);
  const int64_t all = images * blocks.per_image;
  const bool ball = step.epsilon < std::numeric_limits<RealOf<T>>::infinity();
  launch(largest_magnitude<T, V>, all, kPixelThreads, args, blocks);
  const auto kernel = grid ? (ball ? update<T, V, true, true> : update<T, V, false, true>)
                           : (ball ? update<T, V, true, false> : update<T, V, false, false>);
  launch(kernel, all, kPixelThreads, args, blocks, step, grid ? *grid : Grid<RealOf<T>>());
}

// images, origin, gradient, grid (N, *); active (N,); see the CPU op.
LinfOutputs linf_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, double gamma,
                      double lower, double upper, double epsilon, std::optional<Tensor> grid,
                      int64_t levels) {
  const Launcher launch("linf_step_", images);
  check_step(images, origin, gradient, active, lower, upper, grid, levels);
  const LinfOutputs outputs = linf_outputs(images);
  if (images.numel() == 0) return outputs;
  const LinfArgs args(images, grid ? *grid : images, origin, gradient, active, outputs);
  const Step<double> step{gamma, lower, upper, epsilon};
  for_float_type("images", images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int V = kPackSize<T>;
    const bool packs = aligned(args.images) && aligned(args.shown) && aligned(args.origin) &&
                       aligned(args.gradient) && args.walk.in_packs(V, kStepOperands);
    const auto run = packs ? step_packs<T, V> : step_packs<T, 1>;
    const Grid<RealOf<T>> on(levels, lower, upper, epsilon);
    run(images.size(0), args, step.as<RealOf<T>>(), grid ? &on : nullptr, launch);
  });
  return outputs;
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "linf_step_", linf_step)

}  // namespace dagcore
