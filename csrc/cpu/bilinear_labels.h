// Labels of rows of pixels, and of the tiles in them.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "bilinear_tiles.h"

namespace dagcore {

// The labels of the rows of pixels that one row of cells holds, and which tiles are uniform. Rows
// are padded so that a whole vector can be read from any pixel.
template <typename Index>
struct LabelRows {
  int64_t width, stride;
  std::unique_ptr<Index[]> labels, adversarial;  // not zeroed: written before they are read
  std::vector<Index> down, across;  // where labels differ from the first row's, from the left ones

  explicit LabelRows(int64_t width)
      : width(width),
        stride(width + 2 * kLanes - width % kLanes),
        labels(new Index[kSide * stride]),
        adversarial(new Index[kSide * stride]),
        down(stride),
        across(stride) {}

  bool uniform(const Segment& x) const {
    Index changes = down[x.begin];
    for (int j = 1; j < x.count; ++j) changes |= down[x.begin + j] | across[x.begin + j];
    return changes == 0;
  }
};

// Prefetches a row of labels that is read soon. The processor itself does not prefetch beyond the
// page that it reads from, and a row of int64 is often a page long.
DAGCORE_INLINE void fetch_row(const LabelSource& labels, int64_t at, int64_t width) {
  const int64_t size = labels.type == ScalarType::Byte ? 1 : labels.type == ScalarType::Int ? 4 : 8;
  const char* row = static_cast<const char*>(labels.data) + at * size;
  for (int64_t i = 0; i < width * size; i += 64) __builtin_prefetch(row + i);
}

template <typename Index, bool kIsAdversarial>
DAGCORE_INLINE void read_label_rows(const Tensor& maps, const LabelSource& source, LabelRule rule,
                                    int64_t n, const Segment& y, bool marks, Index* out,
                                    LabelRows<Index>* rows) {
  constexpr int64_t kAhead = 2;
  const int64_t width = rows->width, stride = maps.stride(1), column_stride = maps.stride(2);
  const int64_t first = n * maps.stride(0), last = first + (maps.size(1) - 1) * stride;
  Index *down = rows->down.data(), *across = rows->across.data();
  for (int i = 0; i < y.count; ++i) {
    const int64_t at = first + (y.begin + i) * stride;
    if (column_stride == 1) fetch_row(source, std::min(at + kAhead * stride, last), width);
    Index* row = out + i * rows->stride;
    read_labels<Index, kIsAdversarial>(source, at, column_stride, static_cast<int>(width), rule,
                                       row);
    if (!marks) continue;
    if (i == 0) {
      for (int64_t x = 1; x < width; ++x) across[x] |= row[x] ^ row[x - 1];
    } else {
      for (int64_t x = 0; x < width; ++x) down[x] |= row[x] ^ out[x];
    }
  }
}

// Copies the labels of a tile from its rows of pixels: whole vectors, each over the end of the one
// before.
template <typename Index>
DAGCORE_INLINE void take_labels(const Index* rows, int64_t stride, const Segment& y,
                                const Segment& x, Index* out) {
  const Index* from = rows + x.begin;
  for (int i = 0; i < y.count; ++i, from += stride, out += x.count) {
    for (int j = 0; j < x.count; j += kLanes) {
      __builtin_memcpy(out + j, from + j, kLanes * sizeof(Index));
    }
  }
}

}  // namespace dagcore
