// linf_prox_ on CUDA: the largest |d|, two kernels for each digit of t, one pass over the images.
#include <algorithm>

#include "../linf_prox.h"
#include "launch.h"

namespace dagcore {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 2048;     // over all images; every image has at least one
constexpr int64_t kMostBlocks = 256;  // per image: one block adds up their sums

__device__ void atomic_largest(uint64_t* to, uint64_t bits) {
  atomicMax(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(bits));
}

__device__ uint64_t largest_of_warp(uint64_t most) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_down_sync(~0u, most, offset);
    most = other > most ? other : most;
  }
  return most;
}

// Integer maxima: the order of the blocks does not matter.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    find_largest(const __grid_constant__ ProxArgs args, ImageBlocks blocks, Search* searches) {
  const int64_t n = blocks.image(), count = args.walk.count();
  if (!args.is_active(n)) return;
  const auto length = static_cast<RealOf<T>>(args.alpha[n]);
  const int64_t step = static_cast<int64_t>(blocks.per_image) * kThreads;
  uint64_t farthest = 0, largest = 0;
  for (int64_t i = blocks.index() * kThreads + threadIdx.x; i < count; i += step) {
    int64_t at[kProxOperands];
    args.walk.locate(n, i, at);
    const auto d = args.perturbed<T>(at, length);
    const uint64_t free = magnitude_bits(d.free), inside = magnitude_bits(d.inside);
    farthest = free > farthest ? free : farthest;
    largest = inside > largest ? inside : largest;
  }
  farthest = largest_of_warp(farthest);
  largest = largest_of_warp(largest);
  if (threadIdx.x % 32 == 0) {
    atomic_largest(&searches[n].farthest, farthest);
    atomic_largest(&searches[n].largest, largest);
  }
}

// Writes the sums over a block's pixels, in their order, to `sums` (N, blocks, digits). A thread
// has one digit and a part of each tile.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_digits(const __grid_constant__ ProxArgs args, ImageBlocks blocks, int pass,
               const Search* searches, Excess* sums) {
  using Real = RealOf<T>;
  __shared__ int digits[kThreads];
  __shared__ double mass[kThreads], moment[kThreads];
  const int64_t n = blocks.image(), count = args.walk.count();
  const Search& search = searches[n];
  if (!args.is_active(n) || !search.usable<Real>() || search.found) return;
  const auto length = static_cast<Real>(args.alpha[n]);
  const Real scale = search.scale<Real>();
  const int thread = static_cast<int>(threadIdx.x);
  const int own = thread % kDigits, part = thread / kDigits;
  const bool scaled = scale < std::numeric_limits<Real>::infinity();
  Excess sum{};
  const int64_t step = static_cast<int64_t>(blocks.per_image) * kThreads;
  for (int64_t tile = blocks.index() * kThreads; scaled && tile < count; tile += step) {
    digits[thread] = -1;
    if (tile + thread < count) {
      int64_t at[kProxOperands];
      args.walk.locate(n, tile + thread, at);
      const Perturbed<Real> d = args.perturbed<T>(at, length);
      const Real size = d.inside < 0 ? -d.inside : d.inside;
      digits[thread] = search.digit<Real>(Search::key<Real>(size, scale), pass);
      mass[thread] = args.metric_at<Real>(at);
      moment[thread] = mass[thread] * (d.free < 0 ? -d.free : d.free);
    }
    __syncthreads();
    for (int k = part * kDigits; k < (part + 1) * kDigits; ++k) {
      if (digits[k] != own) continue;
      sum.mass += mass[k];
      sum.moment += moment[k];
    }
    __syncthreads();
  }
  mass[thread] = sum.mass;
  moment[thread] = sum.moment;
  __syncthreads();
  if (part > 0) return;
  for (int k = own + kDigits; k < kThreads; k += kDigits) {
    sum.mass += mass[k];
    sum.moment += moment[k];
  }
  sums[blockIdx.x * kDigits + own] = sum;
}

// One block per image, one thread per digit.
template <typename T>
__global__ void __launch_bounds__(kDigits)
    narrow(const __grid_constant__ ProxArgs args, ImageBlocks blocks, int pass, Search* searches,
           const Excess* sums) {
  __shared__ Excess totals[kDigits];
  const int64_t n = blockIdx.x;
  Search& search = searches[n];
  if (!args.is_active(n) || !search.usable<RealOf<T>>() || search.found) return;
  Excess total{};
  for (int64_t block = n * blocks.per_image; block < (n + 1) * blocks.per_image; ++block) {
    total.mass += sums[block * kDigits + threadIdx.x].mass;
    total.moment += sums[block * kDigits + threadIdx.x].moment;
  }
  totals[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x > 0) return;
  args.moved[n] = true;
  search.narrow<RealOf<T>>(pass, totals, args.weight * args.alpha[n]);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ ProxArgs args, ImageBlocks blocks, const Search* searches) {
  using Real = RealOf<T>;
  const int64_t n = blocks.image(), count = args.walk.count();
  if (!args.moved[n]) return;
  const auto length = static_cast<Real>(args.alpha[n]);
  const Real t = args.largest<Real>(n, searches[n].t);
  const int64_t step = static_cast<int64_t>(blocks.per_image) * kThreads;
  for (int64_t i = blocks.index() * kThreads + threadIdx.x; i < count; i += step) {
    int64_t at[kProxOperands];
    args.walk.locate(n, i, at);
    args.put<T>(at, args.perturbed<T>(at, length), t);
  }
}

template <typename T>
void prox_all(const Tensor& images, const ProxArgs& args, const Launcher& launch) {
  const int64_t count = images.size(0), pixels = args.walk.count();
  const int64_t most = std::max<int64_t>(1, std::min(kMostBlocks, kBlocks / count));
  const ImageBlocks blocks(std::min(most, ceil_div(pixels, kThreads)));
  const int64_t all = count * blocks.per_image;
  const Tensor kept = torch::stable::new_zeros(
      images, {count, static_cast<int64_t>(sizeof(Search) / sizeof(double))}, ScalarType::Double);
  const Tensor summed = torch::stable::new_empty(images, {all, kDigits, 2}, ScalarType::Double);
  Search* searches = static_cast<Search*>(kept.mutable_data_ptr());
  Excess* sums = static_cast<Excess*>(summed.mutable_data_ptr());
  launch(find_largest<T>, all, kThreads, args, blocks, searches);
  for (int pass = 0; pass < kPasses<RealOf<T>>; ++pass) {
    launch(sum_digits<T>, all, kThreads, args, blocks, pass, searches, sums);
    launch(narrow<T>, count, kDigits, args, blocks, pass, searches, sums);
  }
  launch(update<T>, all, kThreads, args, blocks, searches);
}

// images, origin, gradient, metric (N, *); active, alpha, epsilon (N,); see the CPU op.
Tensor linf_prox(Tensor images, Tensor origin, Tensor gradient, Tensor metric, Tensor active,
                 Tensor alpha, Tensor epsilon, double weight, double lower, double upper) {
  const Launcher launch("linf_prox_", images);
  const Tensor moved =
      check_prox(images, origin, gradient, metric, active, alpha, epsilon, lower, upper);
  if (images.numel() == 0) return moved;
  const ProxArgs args(images, origin, gradient, metric, active, alpha, epsilon, moved, weight,
                      lower, upper);
  for_float_type("images", images.scalar_type(),
                 [&](auto type) { prox_all<decltype(type)>(images, args, launch); });
  return moved;
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "linf_prox_", linf_prox)

}  // namespace dagcore
