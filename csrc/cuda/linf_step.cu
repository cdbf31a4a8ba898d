// linf_step_ on CUDA: a reduction of the gradient, then one pass over the images.
#include <algorithm>
#include <limits>

#include "../linf_step.h"
#include "launch.h"
#include "pack.cuh"

namespace dagcore {
namespace {

constexpr int kThreads = 256;
// Over all images: beyond, threads take several packs each. Every image has a block at least.
constexpr int64_t kBlocks = 4096;

// A thread's packs of V pixels in its image: the first, the one after the last, from one to the
// next. Packs lie within a row, and a block works on one image.
template <int V>
struct Share {
  int64_t n, begin, end, step;

  __device__ Share(const StepArgs& args, ImageBlocks blocks)
      : n(blocks.image()),
        begin(blocks.index() * kThreads + static_cast<int64_t>(threadIdx.x)),
        end(args.walk.count() / V),
        step(static_cast<int64_t>(blocks.per_image) * kThreads) {}
};

__device__ void atomic_largest(uint32_t* to, uint32_t bits) { atomicMax(to, bits); }
__device__ void atomic_largest(uint64_t* to, uint64_t bits) {
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(bits));
}

// ||gradient||_inf as bits, an integer maximum: the order of the blocks does not matter.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    largest_magnitude(const __grid_constant__ StepArgs args, ImageBlocks blocks) {
  using Bits = typename Pixel<T>::Bits;
  const Share<V> share(args, blocks);
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
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ StepArgs args, ImageBlocks blocks, Step<RealOf<T>> step,
           Grid<RealOf<T>> grid) {
  const Share<V> share(args, blocks);
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
void step_packs(int64_t images, const StepArgs& args, const Step<RealOf<T>>& step,
                const Grid<RealOf<T>>* grid, const Launcher& launch) {
  const int64_t needed = ceil_div(args.walk.count(), kThreads * V);
  const int64_t per_image = std::max<int64_t>(1, std::min(needed, kBlocks / images));
  const ImageBlocks blocks(per_image);
  const bool ball = step.epsilon < std::numeric_limits<RealOf<T>>::infinity();
  launch(largest_magnitude<T, V>, images * per_image, kThreads, args, blocks);
  const auto kernel = grid ? (ball ? update<T, V, true, true> : update<T, V, false, true>)
                           : (ball ? update<T, V, true, false> : update<T, V, false, false>);
  launch(kernel, images * per_image, kThreads, args, blocks, step,
         grid ? *grid : Grid<RealOf<T>>());
}

// images, origin, gradient, grid (N, *); active (N,); see the CPU's.
StepOutputs linf_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, double gamma,
                      double lower, double upper, double epsilon, std::optional<Tensor> grid,
                      int64_t levels) {
  const Launcher launch("linf_step_", images);
  const StepOutputs outputs =
      check_step(images, origin, gradient, active, lower, upper, grid, levels);
  if (images.numel() == 0) return outputs;
  const StepArgs args(images, grid ? *grid : images, origin, gradient, active, outputs);
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
