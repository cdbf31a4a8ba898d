// pgd_step_ on CUDA: a pass for each sum that the step needs, then one that moves the pixels. In a
// pass each block writes its part of the sum; every block of the later passes adds up the parts.
#include <string>

#include "../pgd_step.h"
#include "pack.cuh"
#include "pixels.cuh"
#include "sums.cuh"

namespace dagcore {
namespace {

// Over all images: enough for the largest GPUs, and not more, as every block reads the parts of all
// blocks of its image.
constexpr int64_t kBlocks = 1024;

// The parts of the sums, (kPgdSums, N, blocks of an image), and where those of an image begin.
struct Parts {
  double* part;
  int64_t images;
  ImageBlocks blocks;

  __device__ double* of(int sum, int64_t n) const {
    return part + (sum * images + n) * blocks.per_image;
  }
};

// Sets up the step of image n from the sums before `which`; returns whether to step it. All threads
// of the block must call this.
template <typename Real>
__device__ bool begin(const PgdArgs& args, const Parts& parts, int64_t n, int which,
                      PgdStep<Real>* step) {
  bool moves = args.begin(n, step);
  for (int known = 0; known < which && moves; ++known) {
    if (!args.needs(known)) continue;
    const double* part = parts.of(known, n);
    double sum = 0;
    for (uint32_t i = threadIdx.x; i < parts.blocks.per_image; i += kPixelThreads) sum += part[i];
    moves = step->learn(known, sum_of_block<kPixelThreads>(sum));
  }
  return moves;
}

// A pack of pixels, and where it lies.
template <typename T, int V>
struct Pixels {
  using Real = RealOf<T>;
  int64_t at[kPgdOperands];
  Pack<T, V> image, origin;
  Pack<Real, V> momentum;
  Real value[V];

  __device__ Pack<T, V> load(const void* from, int operand) const {
    return load_pack<V>(static_cast<const T*>(from) + at[operand]);
  }
  __device__ void store(const Pack<T, V>& pack, void* to, int operand) const {
    store_pack(pack, static_cast<T*>(to) + at[operand]);
  }

  // Computes the values that `sum` adds up or, for kPgdSums, the new images.
  template <bool kL2>
  __device__ void compute(const PgdArgs& args, const PgdStep<Real>& step, int sum) {
    const Pack<T, V> gradient = load(args.gradient, kGradient);
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] = Pixel<T>::load(gradient.value[v]);
    if (sum == kGradientSum) return;
    if (step.momentum) {
      momentum = load_pack<V>(static_cast<const Real*>(args.momentum) + at[kMomentum]);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        momentum.value[v] = value[v] = step.direction(value[v], momentum.value[v]);
      }
    }
    if (sum == kDirectionSum) return;
    image = load(args.images, kImages);
    origin = load(args.origin, kOrigin);
    Pack<T, V> previous = image;
    const bool mixed = args.previous && sum != kBallSum;
    if (mixed) previous = load(args.previous, kPrevious);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Real from = Pixel<T>::load(image.value[v]), around = Pixel<T>::load(origin.value[v]);
      Real to = step.template move<kL2>(from, value[v]);
      if (sum != kBallSum) to = step.template project<kL2>(to, around, step.shrink);
      if (mixed) to = step.mix(from, to, Pixel<T>::load(previous.value[v]));
      if (sum != kPgdSums) {
        to -= around;
      } else if (mixed) {
        to = step.template project<kL2>(to, around, step.second_shrink);
      }
      value[v] = to;
    }
  }
};

template <typename T, int V, bool kL2>
__global__ void __launch_bounds__(kPixelThreads, 2)
    add_up(const __grid_constant__ PgdArgs args, Parts parts, int which) {
  using Real = RealOf<T>;
  const Share<V> share(args.walk, parts.blocks);
  PgdStep<Real> step;
  if (!begin(args, parts, share.n, which, &step)) return;
  const bool only_largest = !kL2 && which == kDirectionSum;
  typename Pixel<Real>::Bits largest = 0;
  double sum = 0;
  for (int64_t i = share.begin; i < share.end; i += share.step) {
    Pixels<T, V> pixels;
    args.walk.locate(share.n, i * V, pixels.at);
    pixels.template compute<kL2>(args, step, which);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const double value = pixels.value[v];
      if (only_largest) {
        const auto bits = magnitude_bits(pixels.value[v]);
        largest = bits > largest ? bits : largest;
      } else {
        sum += which != kGradientSum ? value * value : value < 0 ? -value : value;
      }
    }
    if (only_largest && step.momentum && largest > 0) break;
  }
  if (only_largest) sum = direction_sum<Real>(largest, step.momentum);
  sum = sum_of_block<kPixelThreads>(sum);
  if (threadIdx.x == 0) parts.of(which, share.n)[parts.blocks.index()] = sum;
}

template <typename T, int V, bool kL2>
__global__ void __launch_bounds__(kPixelThreads, 2)
    update(const __grid_constant__ PgdArgs args, Parts parts, Grid<RealOf<T>> grid) {
  using Real = RealOf<T>;
  const Share<V> share(args.walk, parts.blocks);
  PgdStep<Real> step;
  if (!begin(args, parts, share.n, kPgdSums, &step)) return;
  if (share.begin == 0) args.moved[share.n] = true;
  grid.reach = static_cast<Real>(std::floor(args.radius(share.n)));
  for (int64_t i = share.begin; i < share.end; i += share.step) {
    Pixels<T, V> pixels;
    args.walk.locate(share.n, i * V, pixels.at);
    pixels.template compute<kL2>(args, step, kPgdSums);
    if (step.momentum) {
      store_pack(pixels.momentum, static_cast<Real*>(args.momentum) + pixels.at[kMomentum]);
    }
    if (args.previous) pixels.store(pixels.image, args.previous, kPrevious);
    Pack<T, V> next;
#pragma unroll
    for (int v = 0; v < V; ++v) next.value[v] = Pixel<T>::store(pixels.value[v]);
    pixels.store(next, args.images, kImages);
    if (args.levels == 0 || kL2) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      next.value[v] = Pixel<T>::store(show_pixel<true>(
          Pixel<T>::load(next.value[v]), Pixel<T>::load(pixels.origin.value[v]), grid));
    }
    pixels.store(next, args.shown, kShown);
  }
}

// In an L2 ball, the squared distances of the shown image at each threshold, (N, kThresholds): sums
// of integers, so the order does not matter.
template <typename T, int V>
__global__ void __launch_bounds__(kPixelThreads)
    add_squares(const __grid_constant__ PgdArgs args, ImageBlocks blocks, Grid<RealOf<T>> grid,
                unsigned long long* squares) {
  using Real = RealOf<T>;
  const Share<V> share(args.walk, blocks);
  if (!args.moved[share.n]) return;
  unsigned long long sums[kThresholds] = {};
  for (int64_t i = share.begin; i < share.end; i += share.step) {
    Pixels<T, V> pixels;
    args.walk.locate(share.n, i * V, pixels.at);
    pixels.image = pixels.load(args.images, kImages);
    pixels.origin = pixels.load(args.origin, kOrigin);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Offset<Real> offset(Pixel<T>::load(pixels.image.value[v]),
                                Pixel<T>::load(pixels.origin.value[v]), grid);
      const int64_t whole = offset.whole, inward = whole * whole;
#pragma unroll
      for (int k = 0; k < kThresholds; ++k) {
        sums[k] += inward + (offset.rest > threshold_at<Real>(k) ? 2 * whole + 1 : 0);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kThresholds; ++k) {
    for (int by = 16; by > 0; by /= 2) sums[k] += __shfl_down_sync(~0u, sums[k], by);
    if (threadIdx.x % 32 == 0) atomicAdd(squares + share.n * kThresholds + k, sums[k]);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kPixelThreads)
    show(const __grid_constant__ PgdArgs args, ImageBlocks blocks, Grid<RealOf<T>> grid,
         const uint64_t* squares) {
  using Real = RealOf<T>;
  const Share<V> share(args.walk, blocks);
  if (!args.moved[share.n]) return;
  const Real threshold =
      threshold_within<Real>(squares + share.n * kThresholds, args.radius(share.n));
  for (int64_t i = share.begin; i < share.end; i += share.step) {
    Pixels<T, V> pixels;
    args.walk.locate(share.n, i * V, pixels.at);
    pixels.image = pixels.load(args.images, kImages);
    pixels.origin = pixels.load(args.origin, kOrigin);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Offset<Real> offset(Pixel<T>::load(pixels.image.value[v]),
                                Pixel<T>::load(pixels.origin.value[v]), grid);
      pixels.image.value[v] = Pixel<T>::store(grid.at(offset.level(threshold)));
    }
    pixels.store(pixels.image, args.shown, kShown);
  }
}

template <typename T, int V, bool kL2>
void step_packs(const Tensor& images, const PgdArgs& args, const Launcher& launch) {
  const int64_t count = images.size(0);
  const ImageBlocks blocks = pixel_blocks<V>(count, args.walk, kBlocks);
  const int64_t all = count * blocks.per_image;
  const Tensor memory = torch::stable::new_empty(images, {kPgdSums, all}, ScalarType::Double);
  const Parts parts{static_cast<double*>(memory.mutable_data_ptr()), count, blocks};
  for (int sum = 0; sum < kPgdSums; ++sum) {
    if (args.needs(sum)) launch(add_up<T, V, kL2>, all, kPixelThreads, args, parts, sum);
  }
  const auto grid = args.levels == 0
                        ? Grid<RealOf<T>>()
                        : Grid<RealOf<T>>(args.levels, args.lower, args.upper, /*epsilon=*/0);
  launch(update<T, V, kL2>, all, kPixelThreads, args, parts, grid);
  if (args.levels == 0 || !kL2) return;
  const Tensor zeros = torch::stable::new_zeros(images, {count, kThresholds}, ScalarType::Long);
  void* squares = zeros.mutable_data_ptr();
  launch(add_squares<T, V>, all, kPixelThreads, args, blocks, grid,
         static_cast<unsigned long long*>(squares));
  launch(show<T, V>, all, kPixelThreads, args, blocks, grid, static_cast<const uint64_t*>(squares));
}

// images, origin, gradient, momentum, previous, grid (N, *); active, alpha, epsilon, share (N,):
// see the CPU op.
Tensor pgd_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, std::string norm,
                Tensor alpha, Tensor epsilon, double lower, double upper,
                std::optional<Tensor> momentum, double decay, std::optional<Tensor> previous,
                std::optional<Tensor> share, std::optional<Tensor> grid, int64_t levels) {
  const Launcher launch("pgd_step_", images);
  check_pgd_step(images, origin, gradient, active, alpha, epsilon, lower, upper, momentum, previous,
                 share, grid, levels);
  const Norm in = value_named<Norm>("norm", norm, kNorms);
  const Tensor moved = torch::stable::new_zeros(images, {images.size(0)}, ScalarType::Bool);
  if (images.numel() == 0) return moved;
  const PgdArgs args(images, origin, gradient, active, in, alpha, epsilon, lower, upper, momentum,
                     decay, previous, share, grid, levels, moved);
  for_float_type("images", images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int V = kPackSize<T>;
    const bool packs = aligned(args.images) && aligned(args.shown) && aligned(args.origin) &&
                       aligned(args.gradient) && aligned(args.previous) &&
                       aligned(args.momentum, V * sizeof(RealOf<T>)) &&
                       args.walk.in_packs(V, kPgdOperands);
    const auto run = args.l2 ? (packs ? step_packs<T, V, true> : step_packs<T, 1, true>)
                             : (packs ? step_packs<T, V, false> : step_packs<T, 1, false>);
    run(images, args, launch);
  });
  return moved;
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "pgd_step_", pgd_step)

}  // namespace dagcore
