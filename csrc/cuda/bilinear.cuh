// A warp works on a patch of one low-resolution cell's pixels: lanes first look at classes, to rule
// out those that cannot win in the cell, then at pixels, to evaluate the rest.
#pragma once

#include <algorithm>
#include <limits>

#include "../bilinear.h"
#include "../score_maps.h"
#include "../step.h"
#include "launch.h"

namespace dagcore {

constexpr int kPatchThreads = 128;  // per block
constexpr int kPatchWarps = kPatchThreads / 32;
constexpr int kPatch = 8;                     // side of a patch, in pixels
constexpr int kSlots = kPatch * kPatch / 32;  // pixels per lane

// The patches of all cells, one per warp.
struct PatchGrid : ScoreMaps {
  int64_t patches_y, patches_x;  // of a cell, at most

  explicit PatchGrid(const ScoreMaps& maps)
      : ScoreMaps(maps),
        patches_y(patches(height, out_height)),
        patches_x(patches(width, out_width)) {}

  // The outermost cells hold up to half as many pixels again as the others.
  static int64_t patches(int64_t from, int64_t to) {
    const int64_t most = from < 3 ? to : std::min(to, ceil_div(3 * to, 2 * (from - 1)) + 2);
    return ceil_div(most, kPatch);
  }
  DAGCORE_INLINE int64_t warps() const { return images * height * width * patches_y * patches_x; }
  int64_t blocks() const { return ceil_div(warps(), kPatchWarps); }
};

// The first pixel that reads low-resolution index `low` or a later one.
__device__ inline int64_t first_pixel(int64_t low, int64_t from, int64_t to, bool align_corners) {
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

  __device__ Patch(const PatchGrid& grid, int64_t warp) {
    const int64_t px = warp % grid.patches_x;
    warp /= grid.patches_x;
    const int64_t py = warp % grid.patches_y;
    warp /= grid.patches_y;
    low_x = warp % grid.width;
    warp /= grid.width;
    low_y = warp % grid.height;
    n = warp / grid.height;
    high_y = grid.height == grid.out_height ? low_y : min(low_y + 1, grid.height - 1);
    high_x = grid.width == grid.out_width ? low_x : min(low_x + 1, grid.width - 1);
    rows = part(low_y, grid.height, grid.out_height, py, grid.align_corners, &begin_y);
    columns = part(low_x, grid.width, grid.out_width, px, grid.align_corners, &begin_x);
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
  RealOf<T> score[4];

  __device__ static Corners load(const PatchGrid& grid, const Patch& patch, int64_t c) {
    const T* scores =
        static_cast<const T*>(grid.data) + patch.n * grid.batch_stride + c * grid.class_stride;
    const T* above = scores + patch.low_y * grid.row_stride;
    const T* below = scores + patch.high_y * grid.row_stride;
    const int64_t left = patch.low_x * grid.column_stride;
    const int64_t right = patch.high_x * grid.column_stride;
    return {{Pixel<T>::load(above[left]), Pixel<T>::load(above[right]), Pixel<T>::load(below[left]),
             Pixel<T>::load(below[right])}};
  }
  __device__ bool finite() const {
    const RealOf<T> sum = (score[0] + score[1]) + (score[2] + score[3]);
    return sum - sum == 0;
  }
  __device__ RealOf<T> least() const {
    return min(min(score[0], score[1]), min(score[2], score[3]));
  }
  __device__ RealOf<T> most() const {
    return max(max(score[0], score[1]), max(score[2], score[3]));
  }
  __device__ Corners from_lane(int lane) const {
    Corners theirs;
#pragma unroll
    for (int k = 0; k < 4; ++k) theirs.score[k] = __shfl_sync(~0u, score[k], lane);
    return theirs;
  }
};

// The weights of a pixel's four corners; zero for a slot without a pixel.
template <typename T>
struct PixelWeights {
  RealOf<T> corner[4];
};

// The best (or with kSecond, second best) of the classes' smallest corners: a bar that a class
// must reach with its largest to be worth evaluating.
template <typename T, bool kSecond>
__device__ RealOf<T> bar_of(const PatchGrid& grid, const Patch& patch) {
  RealOf<T> best = -std::numeric_limits<RealOf<T>>::infinity(), second = best;
  for (int64_t c = threadIdx.x % 32; c < grid.classes; c += 32) {
    const Corners<T> corners = Corners<T>::load(grid, patch, c);
    if (!corners.finite()) continue;
    const RealOf<T> floor = corners.least();
    second = max(second, min(best, floor));
    best = max(best, floor);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const RealOf<T> other = __shfl_xor_sync(~0u, best, offset);
    const RealOf<T> other_second = __shfl_xor_sync(~0u, second, offset);
    second = max(min(best, other), max(second, other_second));
    best = max(best, other);
  }
  return kSecond ? second : best;
}

// The winners at a lane's pixels, over the classes that can win, in rising order.
template <typename T, bool kSecond>
__device__ void find_patch_winners(const PatchGrid& grid, const Patch& patch,
                                   const PixelWeights<T> (&weights)[kSlots],
                                   Top<RealOf<T>, int32_t, kSecond> (&top)[kSlots]) {
  const RealOf<T> bar = bar_of<T, kSecond>(grid, patch);
  const int lane = threadIdx.x % 32;
  bool first = true;
  for (int64_t base = 0; base < grid.classes; base += 32) {
    const bool there = base + lane < grid.classes;
    const Corners<T> mine = Corners<T>::load(grid, patch, there ? base + lane : 0);
    const bool keep = there && !(mine.finite() && dominated(mine.most(), bar));
    for (unsigned left = __ballot_sync(~0u, keep); left != 0; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const Corners<T> q = mine.from_lane(from);
      const int32_t c = static_cast<int32_t>(base) + from;
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const RealOf<T> value = blend(weights[k].corner, q.score);
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

// Where slot k of this lane lies in the enlarged grid; false if the slot has no pixel.
__device__ inline bool pixel_at(const Patch& patch, int k, int64_t* y, int64_t* x) {
  const int p = static_cast<int>(threadIdx.x % 32) + 32 * k;
  if (p >= patch.pixels()) return false;
  *y = patch.begin_y + p / patch.columns;
  *x = patch.begin_x + p % patch.columns;
  return true;
}

template <typename T>
__device__ void weigh(const PatchGrid& grid, const Patch& patch,
                      PixelWeights<T> (&weights)[kSlots]) {
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    int64_t y = 0, x = 0;
    weights[k] = {};
    if (!pixel_at(patch, k, &y, &x)) continue;
    const Source v = source_of(y, grid.height, grid.out_height, grid.align_corners);
    const Source u = source_of(x, grid.width, grid.out_width, grid.align_corners);
    corner_weights(v.weight, u.weight, weights[k].corner);
  }
}

}  // namespace dagcore
