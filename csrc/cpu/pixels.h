// The pixels of images in chunks, which threads take one by one.
#pragma once

#include <algorithm>

#include "../step.h"
#include "../strided.h"

namespace dagcore {

constexpr int64_t kChunk = 1 << 14;  // pixels
constexpr int kBlock = 128;          // pixels that are read before any of them is written

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

template <typename T>
__attribute__((noinline)) void gather(const T* from, int64_t stride, int size, T* to) {
  for (int i = 0; i < size; ++i) to[i] = from[i * stride];
}
template <typename T>
__attribute__((noinline)) void scatter(const T* from, int size, T* to, int64_t stride) {
  for (int i = 0; i < size; ++i) to[i * stride] = from[i];
}

// `size` pixels of one tensor, from the chunk's `first` on: in a row, so that loops need not be
// compiled for every combination of strides. Unless they are to be `read`, they can only be stored.
template <typename T>
struct Row {
  T *memory, *pixels;
  int64_t stride;
  int size;
  T room[kBlock];  // where the pixels are if they are not in a row in memory

  template <typename Args, int K>
  DAGCORE_INLINE Row(const Args& args, const void* data, int operand, const ChunkOf<K>& chunk,
                     int64_t first, bool read = true)
      : memory(static_cast<T*>(const_cast<void*>(data))),
        stride(args.walk.inner_stride(operand)),
        size(static_cast<int>(std::min<int64_t>(kBlock, chunk.count - first))) {
    memory += chunk.at[operand] + first * stride;
    pixels = stride == 1 ? memory : room;
    if (read && stride != 1) gather(memory, stride, size, room);
  }
  Row(const Row&) = delete;

  DAGCORE_INLINE RealOf<T> operator[](int i) const { return Pixel<T>::load(pixels[i]); }
  DAGCORE_INLINE void store(const RealOf<T>* values) const {
#pragma GCC ivdep
    for (int i = 0; i < size; ++i) pixels[i] = Pixel<T>::store(values[i]);
    if (stride != 1) scatter(pixels, size, memory, stride);
  }
  DAGCORE_INLINE void copy(const Row& other) const {
#pragma GCC ivdep
    for (int i = 0; i < size; ++i) pixels[i] = other.pixels[i];
    if (stride != 1) scatter(pixels, size, memory, stride);
  }
};

}  // namespace dagcore
