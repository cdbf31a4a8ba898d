// Bilinear interpolation without enlarging: the low-resolution cell of a pixel, and its weights.
// The same on every device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "target.h"

namespace dagcore {

// Where a pixel of the enlarged map reads along one axis: (1 - weight) at `low`, weight at `high`.
struct Source {
  int64_t low, high;
  double weight;
};

// Places pixels as torch.nn.functional.interpolate does, in double precision.
DAGCORE_INLINE Source source_of(int64_t pixel, int64_t from, int64_t to, bool align_corners) {
  if (from == to) return {pixel, pixel, 0};
  double at = 0;
  if (align_corners) {
    at = to > 1 ? static_cast<double>(pixel) * (from - 1) / (to - 1) : 0;
  } else {
    at = (static_cast<double>(pixel) + 0.5) * from / to - 0.5;
    at = at < 0 ? 0 : at;
  }
  int64_t low = static_cast<int64_t>(at);
  low = low < from - 1 ? low : from - 1;
  const double weight = at - static_cast<double>(low);
  return {low, low < from - 1 ? low + 1 : low, weight < 1 ? weight : 1};
}

// The weights of a pixel's four corners, the upper ones first. `v` is the weight of the lower row,
// `u` that of the right column.
template <typename Real>
DAGCORE_INLINE void corner_weights(double v, double u, Real (&weights)[4]) {
  weights[0] = static_cast<Real>((1 - v) * (1 - u));
  weights[1] = static_cast<Real>((1 - v) * u);
  weights[2] = static_cast<Real>(v * (1 - u));
  weights[3] = static_cast<Real>(v * u);
}

// The value of a class at a pixel. Every operation is monotone in the corners, rounding included,
// so `dominated` can rule classes out without evaluating them.
template <typename Real>
DAGCORE_INLINE Real blend(const Real (&weights)[4], const Real (&scores)[4]) {
  return ((product(weights[0], scores[0]) + product(weights[1], scores[1])) +
          product(weights[2], scores[2])) +
         product(weights[3], scores[3]);
}

// Whether a class whose largest corner is `most` loses everywhere in a cell, by at least the
// margin, to one whose smallest corner is `floor`. The slack, some twenty units in the last place
// and a few of the smallest numbers there are, exceeds what rounding can change in either value, so
// that they cannot even tie. False if anything is not finite.
template <typename Real>
DAGCORE_INLINE bool dominated(Real most, Real floor, Real margin = 0) {
  constexpr Real kUnit = std::numeric_limits<Real>::epsilon() / 2;
  constexpr Real kSmallest = std::numeric_limits<Real>::denorm_min();
  const Real size = (most < 0 ? -most : most) + (floor < 0 ? -floor : floor) + margin;
  return most + (20 * kUnit * size + 16 * kSmallest) + margin < floor;
}

}  // namespace dagcore
