// Which pixels of an image a thread works on.
#pragma once

#include <algorithm>

#include "launch.h"

namespace dagcore {

constexpr int kPixelThreads = 256;

// A thread's packs of V pixels in its image: the first one, the end, and the step from one to the
// next. Packs lie within a row, and a block works on one image.
template <int V>
struct Share {
  int64_t n, begin, end, step;

  template <int K>
  __device__ Share(const Walk<K>& walk, ImageBlocks blocks)
      : n(blocks.image()),
        begin(blocks.index() * kPixelThreads + static_cast<int64_t>(threadIdx.x)),
        end(walk.count() / V),
        step(static_cast<int64_t>(blocks.per_image) * kPixelThreads) {}
};

// Blocks for packs of V pixels: at least one per image, and at most `most` over all images, beyond
// which threads take several packs each.
template <int V, int K>
ImageBlocks pixel_blocks(int64_t images, const Walk<K>& walk, int64_t most) {
  const int64_t needed = ceil_div(walk.count(), kPixelThreads * V);
  return ImageBlocks(std::max<int64_t>(1, std::min(needed, most / images)));
}

}  // namespace dagcore
