// dag_seed_bilinear and argmax_bilinear on CUDA. A warp works on a patch of one low-resolution
// cell's pixels: lanes first look at classes, to rule out those that cannot win in the cell, then
// at pixels, to evaluate the rest. Gradients are summed in fixed point, so that atomics in any
// order give the same bits.
#include <limits>

#include "../dag_seed_bilinear.h"
#include "labels.cuh"
#include "launch.h"

namespace dagcore {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kPatch = 8;                        // pixels of a patch's side
constexpr int kSlots = kPatch * kPatch / 32;     // pixels of a lane
constexpr double kFixedPoint = 1099511627776.0;  // 2^40: room for 2^22 weights of 1

template <typename T>
using Real = typename Pixel<T>::Real;

// Low-resolution scores and the size of the map that reads them.
struct Map {
  const void* scores;
  int64_t batch, class_stride, row_stride, column_stride;
  int64_t images, classes, height, width, out_height, out_width;
  int64_t patches_y, patches_x;  // of a cell, at most
  bool align_corners;

  Map(const Tensor& scores, int64_t out_height, int64_t out_width, bool align_corners)
      : scores(scores.data_ptr()),
        batch(scores.stride(0)),
        class_stride(scores.stride(1)),
        row_stride(scores.stride(2)),
        column_stride(scores.stride(3)),
        images(scores.size(0)),
        classes(scores.size(1)),
        height(scores.size(2)),
        width(scores.size(3)),
        out_height(out_height),
        out_width(out_width),
        patches_y(patches(height, out_height)),
        patches_x(patches(width, out_width)),
        align_corners(align_corners) {}

  // The outermost cells hold up to half as many pixels again as the others.
  static int64_t patches(int64_t from, int64_t to) {
    const int64_t most = from < 3 ? to : std::min(to, ceil_div(3 * to, 2 * (from - 1)) + 2);
    return ceil_div(most, kPatch);
  }
  DAGCORE_INLINE int64_t warps() const { return images * height * width * patches_y * patches_x; }
};

// The first pixel that reads low-resolution index `low` or a later one.
__device__ int64_t first_pixel(int64_t low, int64_t from, int64_t to, bool align_corners) {
  if (low <= 0) return 0;
  if (low >= from) return to;
  const double ratio =
      align_corners ? static_cast<double>(to - 1) / (from - 1) : static_cast<double>(to) / from;
  const double at = align_corners ? low * ratio : (low + 0.5) * ratio - 0.5;
  int64_t pixel = min(max(static_cast<int64_t>(at), int64_t{0}), to);
  while (pixel > 0 && source_of(pixel - 1, from, to, align_corners).low >= low) --pixel;
  while (pixel < to && source_of(pixel, from, to, align_corners).low < low) ++pixel;
  return pixel;
}

// A warp's patch: a cell, and the part of its pixels that lanes take, kSlots each.
struct Patch {
  int64_t n, low_y, low_x, high_y, high_x;
  int64_t begin_y, begin_x;
  int rows, columns;

  __device__ Patch(const Map& map, int64_t warp) {
    const int64_t px = warp % map.patches_x;
    warp /= map.patches_x;
    const int64_t py = warp % map.patches_y;
    warp /= map.patches_y;
    low_x = warp % map.width;
    warp /= map.width;
    low_y = warp % map.height;
    n = warp / map.height;
    high_y = map.height == map.out_height ? low_y : min(low_y + 1, map.height - 1);
    high_x = map.width == map.out_width ? low_x : min(low_x + 1, map.width - 1);
    rows = part(low_y, map.height, map.out_height, py, map.align_corners, &begin_y);
    columns = part(low_x, map.width, map.out_width, px, map.align_corners, &begin_x);
  }
  __device__ static int part(int64_t low, int64_t from, int64_t to, int64_t index, bool corners,
                             int64_t* begin) {
    *begin = first_pixel(low, from, to, corners) + index * kPatch;
    const int64_t end = first_pixel(low + 1, from, to, corners);
    return static_cast<int>(max(int64_t{0}, min(end - *begin, int64_t{kPatch})));
  }
  __device__ int pixels() const { return rows * columns; }
};

// A class's scores at the corners of a cell.
template <typename T>
struct Corners {
  Real<T> s00, s01, s10, s11;

  __device__ static Corners load(const Map& map, const Patch& patch, int64_t c) {
    const T* scores =
        static_cast<const T*>(map.scores) + patch.n * map.batch + c * map.class_stride;
    const T* above = scores + patch.low_y * map.row_stride;
    const T* below = scores + patch.high_y * map.row_stride;
    const int64_t left = patch.low_x * map.column_stride, right = patch.high_x * map.column_stride;
    return {Pixel<T>::load(above[left]), Pixel<T>::load(above[right]), Pixel<T>::load(below[left]),
            Pixel<T>::load(below[right])};
  }
  __device__ bool finite() const {
    const Real<T> sum = (s00 + s01) + (s10 + s11);
    return sum - sum == 0;
  }
  __device__ Real<T> least() const { return min(min(s00, s01), min(s10, s11)); }
  __device__ Real<T> most() const { return max(max(s00, s01), max(s10, s11)); }
  __device__ Corners from_lane(int lane) const {
    return {__shfl_sync(~0u, s00, lane), __shfl_sync(~0u, s01, lane), __shfl_sync(~0u, s10, lane),
            __shfl_sync(~0u, s11, lane)};
  }
};

// Weights of a pixel's four corners; zero for a slot without a pixel.
template <typename T>
struct Weights {
  Real<T> w00, w01, w10, w11;

  __device__ static Weights at(const Map& map, int64_t y, int64_t x) {
    const double v = source_of(y, map.height, map.out_height, map.align_corners).weight;
    const double u = source_of(x, map.width, map.out_width, map.align_corners).weight;
    return {static_cast<Real<T>>((1 - v) * (1 - u)), static_cast<Real<T>>((1 - v) * u),
            static_cast<Real<T>>(v * (1 - u)), static_cast<Real<T>>(v * u)};
  }
};

// The best (or with kRunnerUp, second best) of the classes' smallest corners: a bar that a class
// must reach with its largest to be worth evaluating.
template <typename T, bool kRunnerUp>
__device__ Real<T> bar_of(const Map& map, const Patch& patch) {
  Real<T> best = -std::numeric_limits<Real<T>>::infinity(), second = best;
  for (int64_t c = threadIdx.x % 32; c < map.classes; c += 32) {
    const Corners<T> corners = Corners<T>::load(map, patch, c);
    if (!corners.finite()) continue;
    const Real<T> floor = corners.least();
    second = max(second, min(best, floor));
    best = max(best, floor);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const Real<T> other = __shfl_xor_sync(~0u, best, offset);
    const Real<T> other_second = __shfl_xor_sync(~0u, second, offset);
    second = max(min(best, other), max(second, other_second));
    best = max(best, other);
  }
  return kRunnerUp ? second : best;
}

// The winners at a lane's pixels, over the classes that can win, in rising order.
template <typename T, bool kRunnerUp>
__device__ void find_winners(const Map& map, const Patch& patch,
                             const Weights<T> (&weights)[kSlots],
                             Top<Real<T>, int32_t, kRunnerUp> (&top)[kSlots]) {
  const Real<T> bar = bar_of<T, kRunnerUp>(map, patch);
  const int lane = threadIdx.x % 32;
  bool first = true;
  for (int64_t base = 0; base < map.classes; base += 32) {
    const bool there = base + lane < map.classes;
    const Corners<T> mine = Corners<T>::load(map, patch, there ? base + lane : 0);
    const bool keep = there && !(mine.finite() && dominated(mine.most(), bar));
    for (unsigned left = __ballot_sync(~0u, keep); left != 0; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const Corners<T> q = mine.from_lane(from);
      const int32_t c = static_cast<int32_t>(base) + from;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const Weights<T>& w = weights[k];
        const Real<T> value = blend(w.w00, w.w01, w.w10, w.w11, q.s00, q.s01, q.s10, q.s11);
        if (first) {
          top[k].first(value);
          top[k].best_class = c;
          top[k].second = value;
        } else {
          top[k].next(value, c);
        }
      }
      first = false;
    }
  }
}

// Where slot k of this lane lies in the enlarged map; false if the slot has no pixel.
__device__ bool pixel_at(const Patch& patch, int k, int64_t* y, int64_t* x) {
  const int p = static_cast<int>(threadIdx.x % 32) + 32 * k;
  if (p >= patch.pixels()) return false;
  *y = patch.begin_y + p / patch.columns;
  *x = patch.begin_x + p % patch.columns;
  return true;
}

template <typename T>
__device__ void weigh(const Map& map, const Patch& patch, Weights<T> (&weights)[kSlots]) {
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    int64_t y = 0, x = 0;
    const bool there = pixel_at(patch, k, &y, &x);
    weights[k] = there ? Weights<T>::at(map, y, x) : Weights<T>{0, 0, 0, 0};
  }
}

struct Args {
  Map map;
  Labels labels, adversarial;
  int64_t label_row, label_column, adversarial_row, adversarial_column;
  LabelRule rule;
  bool reach;
  uint32_t* active;
  long long* sums;  // (N, C, h, w), fixed point

  Args(const BilinearCall& call, long long* sums)
      : map(call.scores, call.labels.size(1), call.labels.size(2), call.align_corners),
        labels(call.labels),
        adversarial(call.adversarial),
        label_row(call.labels.stride(1)),
        label_column(call.labels.stride(2)),
        adversarial_row(call.adversarial.stride(1)),
        adversarial_column(call.adversarial.stride(2)),
        rule(call.rule),
        reach(call.reach),
        active(static_cast<uint32_t*>(call.active.data_ptr())),
        sums(sums) {}
};

__device__ long long warp_sum(long long value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Adds the weights of all active pixels of a warp, one pair of classes after the other: inside a
// cell there are few.
template <typename T>
__device__ void add_seed(const Args& args, const Patch& patch, const Weights<T> (&weights)[kSlots],
                         const Verdict<int32_t> (&verdict)[kSlots]) {
  const Map& map = args.map;
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
      sum[0] += __double2ll_rn(weights[k].w00 * kFixedPoint);
      sum[1] += __double2ll_rn(weights[k].w01 * kFixedPoint);
      sum[2] += __double2ll_rn(weights[k].w10 * kFixedPoint);
      sum[3] += __double2ll_rn(weights[k].w11 * kFixedPoint);
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
      const int64_t at = ((patch.n * map.classes + c) * map.height + y) * map.width + x;
      atomicAdd(reinterpret_cast<unsigned long long*>(args.sums + at),
                static_cast<unsigned long long>(own));
    }
  }
}

template <typename T, bool kRunnerUp>
__global__ void __launch_bounds__(kThreads, 4) seed_cells(const __grid_constant__ Args args) {
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (warp >= args.map.warps()) return;
  const Patch patch(args.map, warp);
  if (patch.pixels() == 0) return;
  Weights<T> weights[kSlots];
  weigh<T>(args.map, patch, weights);
  Top<Real<T>, int32_t, kRunnerUp> top[kSlots];
  find_winners<T, kRunnerUp>(args.map, patch, weights, top);

  uint32_t sum = 0;
  bool bad = false;
  Verdict<int32_t> verdict[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    int64_t y = 0, x = 0;
    verdict[k] = {kUncounted, kUncounted};
    if (!pixel_at(patch, k, &y, &x)) continue;
    const TargetLabels of = read_labels(args.labels, args.adversarial, kRunnerUp, args.rule,
                                        patch.n, y * args.label_row + x * args.label_column,
                                        y * args.adversarial_row + x * args.adversarial_column);
    const int32_t adversarial = kRunnerUp ? top[k].runner_up(of.label) : of.adversarial;
    verdict[k] = judge<int32_t>(args.reach, of.label, adversarial, top[k].best_class,
                                top[k].best != top[k].best);
    sum += verdict[k].plus >= 0;
    bad |= of.bad();
  }
  add_seed<T>(args, patch, weights, verdict);
  add_active(args.active + patch.n, sum, bad);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    store_seed(const long long* sums, T* seed, int64_t count, int64_t classes, int64_t height,
               int64_t width, int64_t batch, int64_t class_stride, int64_t row_stride,
               int64_t column_stride) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (i >= count) return;
  const int64_t x = i % width, y = i / width % height, c = i / width / height % classes;
  const int64_t n = i / width / height / classes;
  seed[n * batch + c * class_stride + y * row_stride + x * column_stride] =
      Pixel<T>::store(static_cast<Real<T>>(static_cast<double>(sums[i]) / kFixedPoint));
}

unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = ceil_div(items, per_block);
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "scores are too large for one launch");
  return static_cast<unsigned>(blocks);
}

template <typename T, bool kRunnerUp>
void seed_all(const BilinearCall& call, cudaStream_t stream) {
  const Tensor &scores = call.scores, &seed = call.seed;
  const Tensor sums = torch::stable::new_zeros(
      scores, {scores.size(0), scores.size(1), scores.size(2), scores.size(3)}, ScalarType::Long);
  long long* data = static_cast<long long*>(sums.data_ptr());
  const Args args(call, data);
  seed_cells<T, kRunnerUp><<<blocks_for(args.map.warps(), kWarps), kThreads, 0, stream>>>(args);
  store_seed<T><<<blocks_for(scores.numel(), kThreads), kThreads, 0, stream>>>(
      data, static_cast<T*>(seed.data_ptr()), scores.numel(), scores.size(1), scores.size(2),
      scores.size(3), seed.stride(0), seed.stride(1), seed.stride(2), seed.stride(3));
}

// scores (N, C, h, w), labels and adversarial (N, H, W); see the CPU's.
std::tuple<Tensor, Tensor> dag_seed_bilinear(Tensor scores, Tensor labels,
                                             std::optional<Tensor> adversarial, bool reach,
                                             int64_t ignore_index, bool align_corners) {
  const Launch on(scores);
  BilinearCall call(scores, labels, adversarial, reach, ignore_index, align_corners);
  if (labels.numel() == 0) {
    torch::stable::zero_(call.seed);
    return {call.seed, call.active};
  }
  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    call.runner_up ? seed_all<T, true>(call, on.stream()) : seed_all<T, false>(call, on.stream());
  });
  on.check("dag_seed_bilinear");
  return {call.seed, call.active};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    argmax_cells(const __grid_constant__ Map map, int64_t* labels) {
  const int64_t warp = blockIdx.x * static_cast<int64_t>(kWarps) + threadIdx.x / 32;
  if (warp >= map.warps()) return;
  const Patch patch(map, warp);
  if (patch.pixels() == 0) return;
  Weights<T> weights[kSlots];
  weigh<T>(map, patch, weights);
  Top<Real<T>, int32_t, false> top[kSlots];
  find_winners<T, false>(map, patch, weights, top);
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    int64_t y = 0, x = 0;
    if (!pixel_at(patch, k, &y, &x)) continue;
    labels[(patch.n * map.out_height + y) * map.out_width + x] = top[k].best_class;
  }
}

// scores (N, C, h, w) -> the winning class at each pixel of (N, height, width), int64.
Tensor argmax_bilinear(Tensor scores, int64_t height, int64_t width, bool align_corners) {
  BilinearCall::check_maps(scores);
  STD_TORCH_CHECK(height >= 0 && width >= 0, "size must not be negative, got (", height, ", ",
                  width, ")");
  const Launch on(scores);
  Tensor labels =
      torch::stable::new_empty(scores, {scores.size(0), height, width}, ScalarType::Long);
  if (labels.numel() == 0) return labels;
  const Map map(scores, height, width, align_corners);
  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    argmax_cells<decltype(type)><<<blocks_for(map.warps(), kWarps), kThreads, 0, on.stream()>>>(
        map, static_cast<int64_t*>(labels.data_ptr()));
  });
  on.check("argmax_bilinear");
  return labels;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dagcore, CUDA, library) {
  library.impl("dag_seed_bilinear", TORCH_BOX(&dag_seed_bilinear));
  library.impl("argmax_bilinear", TORCH_BOX(&argmax_bilinear));
}

}  // namespace dagcore
