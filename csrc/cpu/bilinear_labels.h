// The labels of the enlarged cells, row by row and tile by tile.
#pragma once

#include <vector>

#include "bilinear_segments.h"

namespace dagcore {

// The labels of a tile, out of those of its rows of pixels, (rows, width).
template <typename Index>
struct TakeLabels {
  template <int kCount>
  DAGCORE_INLINE static void take(const Index* rows, int64_t width, int count, Index* out) {
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < kCount; ++j) out[i * kCount + j] = rows[i * width + j];
    }
  }
  DAGCORE_INLINE static void run(const Index* rows, int64_t width, const Segment& y,
                                 const Segment& x, Index* out) {
    const Index* from = rows + x.begin;
    switch (x.count) {
      case 4:
        return take<4>(from, width, y.count, out);
      case 8:
        return take<8>(from, width, y.count, out);
      case 16:
        return take<16>(from, width, y.count, out);
      case 32:
        return take<32>(from, width, y.count, out);
    }
    for (int i = 0; i < y.count; ++i) {
      for (int j = 0; j < x.count; ++j) out[i * x.count + j] = from[i * width + j];
    }
  }
};

// Where a column of labels (rows, width) is not the same all the way down, or not the same as the
// column before it: what is nowhere so, but for its first column's latter, is all of one label.
template <typename Index>
struct FindChanges {
  DAGCORE_INLINE static void run(const Index* rows, int64_t width, int count, bool first,
                                 Index* down, Index* across) {
    if (first) {
      for (int64_t x = 0; x < width; ++x) down[x] = across[x] = 0;
    }
    for (int i = 1; i < count; ++i) {
      for (int64_t x = 0; x < width; ++x) down[x] |= rows[i * width + x] ^ rows[x];
    }
    for (int64_t x = 1; x < width; ++x) across[x] |= rows[x] ^ rows[x - 1];
  }
};

// The labels of the rows of pixels that one row of cells holds, and of which tiles are uniform.
template <typename Index, bool kRunnerUp>
struct LabelRows {
  int64_t width;
  std::vector<Index> labels, adversarial, down, across;

  explicit LabelRows(int64_t width)
      : width(width),
        labels(kSide * width),
        adversarial(kRunnerUp ? 0 : kSide * width),
        down(width),
        across(width) {}

  bool uniform(const Segment& x) const {
    Index changes = down[x.begin];
    for (int j = 1; j < x.count; ++j) changes |= down[x.begin + j] | across[x.begin + j];
    return changes == 0;
  }
};

}  // namespace dagcore
