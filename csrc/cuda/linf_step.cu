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

struct StepArgs {
  void* images;
  const void *origin, *gradient;
  const int32_t* active;
  int64_t active_stride;
  void* norms;
  int64_t batch[kStepOperands];
  int64_t pixels;            // of an image
  int64_t blocks_per_image;  // a block works on one image
  Walk<kStepOperands> walk;

  explicit StepArgs(const StepCall& call)
      : images(call.images.mutable_data_ptr()),
        origin(call.origin.const_data_ptr()),
        gradient(call.gradient.const_data_ptr()),
        active(static_cast<const int32_t*>(call.active.const_data_ptr())),
        active_stride(call.active.stride(0)),
        norms(call.norms.mutable_data_ptr()),
        batch{call.images.stride(0), call.origin.stride(0), call.gradient.stride(0)},
        pixels(call.walk.rows() * call.walk.inner()),
        blocks_per_image(0),
        walk(call.walk) {}

  // A thread's first pack of its image, and from one to the next.
  __device__ int64_t first_pack() const {
    return blockIdx.x % blocks_per_image * kThreads + static_cast<int64_t>(threadIdx.x);
  }
  __device__ int64_t pack_step() const { return blocks_per_image * kThreads; }

  __device__ bool is_active(int64_t n) const { return active[n * active_stride] > 0; }

  // Where pack `index` of image n begins in each operand. Packs lie within a row.
  __device__ void locate(int64_t n, int64_t index, int pack, int64_t (&at)[kStepOperands]) const {
    const int64_t inner = walk.inner();
    const int64_t pixel = index * pack;
    const int64_t row = walk.dims == 1 ? 0 : pixel / inner;
    walk.row_offsets(row, at);
#pragma unroll
    for (int k = 0; k < kStepOperands; ++k) {
      at[k] += n * batch[k] + (pixel - row * inner) * walk.inner_stride(k);
    }
  }
};

__device__ void atomic_largest(uint32_t* to, uint32_t bits) { atomicMax(to, bits); }
__device__ void atomic_largest(uint64_t* to, uint64_t bits) {
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(bits));
}

// ||gradient||_inf as bits, an integer maximum: the order of the blocks does not matter.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    largest_magnitude(const __grid_constant__ StepArgs args) {
  using Bits = typename Pixel<T>::Bits;
  const int64_t n = blockIdx.x / args.blocks_per_image;
  if (!args.is_active(n)) return;
  const T* gradient = static_cast<const T*>(args.gradient);
  const int64_t packs = args.pixels / V;
  Bits most = 0;
#pragma unroll 4
  for (int64_t i = args.first_pack(); i < packs; i += args.pack_step()) {
    int64_t at[kStepOperands];
    args.locate(n, i, V, at);
    const Pack<T, V> r = *reinterpret_cast<const Pack<T, V>*>(gradient + at[kGradient]);
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
  if (threadIdx.x % 32 == 0) atomic_largest(static_cast<Bits*>(args.norms) + n, most);
}

template <typename T, int V, bool kBall>
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ StepArgs args, Step<typename Pixel<T>::Real> step) {
  using Real = typename Pixel<T>::Real;
  const int64_t n = blockIdx.x / args.blocks_per_image;
  const Real scale = step_scale(step.gamma, static_cast<const Real*>(args.norms)[n]);
  if (!args.is_active(n) || scale == 0) return;
  const int64_t packs = args.pixels / V;
#pragma unroll 2
  for (int64_t i = args.first_pack(); i < packs; i += args.pack_step()) {
    int64_t at[kStepOperands];
    args.locate(n, i, V, at);
    Pack<T, V>* image = reinterpret_cast<Pack<T, V>*>(static_cast<T*>(args.images) + at[kImages]);
    const Pack<T, V> now = *image;
    const Pack<T, V> r =
        *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(args.gradient) + at[kGradient]);
    Pack<T, V> start = now;
    if (kBall) {
      start =
          *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(args.origin) + at[kOrigin]);
    }
    Pack<T, V> next;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      next.value[v] =
          Pixel<T>::store(step_pixel(Pixel<T>::load(now.value[v]), Pixel<T>::load(start.value[v]),
                                     Pixel<T>::load(r.value[v]), scale, step));
    }
    *image = next;
  }
}

template <typename T, int V>
void step_packs(const StepCall& call, StepArgs args, const Launcher& launch) {
  const int64_t images = call.images.size(0);
  const int64_t needed = ceil_div(args.pixels, kThreads * V);
  args.blocks_per_image = std::max<int64_t>(1, std::min(needed, kBlocks / images));
  const int64_t blocks = images * args.blocks_per_image;
  const auto step = call.step_as<typename Pixel<T>::Real>();
  launch(largest_magnitude<T, V>, blocks, kThreads, args);
  if (call.step.epsilon < std::numeric_limits<double>::infinity()) {
    launch(update<T, V, true>, blocks, kThreads, args, step);
  } else {
    launch(update<T, V, false>, blocks, kThreads, args, step);
  }
}

template <typename T>
void step_images(const StepCall& call, const Launcher& launch) {
  constexpr int V = kPackSize<T>;
  const StepArgs args(call);
  bool packs = args.walk.inner() % V == 0 && aligned(args.images) && aligned(args.origin) &&
               aligned(args.gradient);
  for (int k = 0; k < kStepOperands; ++k) {
    packs = packs && args.walk.inner_stride(k) == 1 && args.batch[k] % V == 0;
    for (int d = 0; d < args.walk.dims - 1; ++d) packs = packs && args.walk.stride[d][k] % V == 0;
  }
  packs ? step_packs<T, V>(call, args, launch) : step_packs<T, 1>(call, args, launch);
}

// images, origin, gradient (N, *); active (N,); see the CPU's.
Tensor linf_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, double gamma,
                 double lower, double upper, double epsilon) {
  const Launcher launch("linf_step_", images);
  const StepCall call(images, origin, gradient, active, {gamma, lower, upper, epsilon});
  if (images.numel() == 0) return call.norms;
  for_float_type("images", images.scalar_type(),
                 [&](auto type) { step_images<decltype(type)>(call, launch); });
  return call.norms;
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "linf_step_", linf_step)

}  // namespace dagcore
