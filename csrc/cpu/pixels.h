// The pixels of images in chunks, which threads take one by one.
#pragma once

#include <algorithm>

#include "../strided.h"

namespace dagcore {

constexpr int64_t kChunk = 1 << 14;  // pixels

// `count` pixels in a row: where the first lies in each operand, in elements.
template <int K>
struct ChunkOf {
  int64_t at[K];
  int64_t count;
};

template <int K>
struct Chunks {
  const Walk<K>& walk;
  int64_t images, per_row, per_image;

  Chunks(int64_t images, const Walk<K>& walk)
      : walk(walk),
        images(images),
        per_row((walk.inner() + kChunk - 1) / kChunk),
        per_image(walk.rows() * per_row) {}

  int64_t count() const { return images * per_image; }

  // Calls body(image, item, chunk) for the chunks of images that are wanted(image), in parallel.
  template <typename Wanted, typename Body>
  void for_each(const Wanted& wanted, const Body& body) const {
    const int64_t inner = walk.inner();
    const int64_t grain = std::max<int64_t>(1, kChunk / std::min(kChunk, inner));
    torch::stable::parallel_for(0, count(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / per_image, row = item % per_image / per_row;
        if (!wanted(n)) continue;
        const int64_t first = item % per_row * kChunk;
        ChunkOf<K> chunk{{}, std::min(kChunk, inner - first)};
        walk.locate(n, row * inner + first, chunk.at);
        body(n, item, chunk);
      }
    });
  }
};

}  // namespace dagcore
