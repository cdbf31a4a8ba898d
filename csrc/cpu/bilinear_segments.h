// Where the pixels of an enlarged axis read: in runs that share their two low-resolution
// neighbours.
#pragma once

#include <algorithm>
#include <vector>

#include "../bilinear.h"

namespace dagcore {

// Pixels of a tile's side, at most. A tile of 32 x 32 pixels stays in the first-level cache, and
// the usual enlargements, by 4, 8, 16 and 32, make tiles that are whole cells.
constexpr int kSide = 32;

// Neighbouring pixels of one axis that read the same two low-resolution neighbours.
struct Segment {
  int64_t low, high;     // low-resolution indices
  int64_t begin;         // first pixel
  int count;             // at most kSide
  int weights;           // segments of equal weights share this number
  double weight[kSide];  // of `high`
};

inline std::vector<Segment> segments(int64_t from, int64_t to, bool align_corners) {
  std::vector<Segment> all;
  for (int64_t pixel = 0; pixel < to; ++pixel) {
    const Source source = source_of(pixel, from, to, align_corners);
    if (all.empty() || all.back().low != source.low || all.back().count == kSide) {
      all.push_back({source.low, source.high, pixel, 0, 0, {}});
    }
    Segment& last = all.back();
    last.weight[last.count++] = source.weight;
  }
  for (size_t i = 0; i < all.size(); ++i) {
    Segment& segment = all[i];
    segment.weights = static_cast<int>(i);
    for (size_t j = i; j-- > 0 && i - j <= 4;) {  // whole factors repeat at once
      if (all[j].count == segment.count &&
          std::equal(segment.weight, segment.weight + segment.count, all[j].weight)) {
        segment.weights = all[j].weights;
        break;
      }
    }
  }
  return all;
}

}  // namespace dagcore
