// One pixel of a step, X <- clip(X + gamma / ||r||_inf * r) and others: shared by the CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "target.h"

namespace dagcore {

template <typename Out, typename In>
DAGCORE_INLINE Out bit_cast(In in) {
  static_assert(sizeof(Out) == sizeof(In), "bit_cast between sizes");
  Out out;
  __builtin_memcpy(&out, &in, sizeof(out));
  return out;
}

// Arithmetic is done in `Real`; |r| is compared as `Bits`, the float's own bits without the sign,
// where a NaN is larger than infinity and so survives the maximum.
template <typename T>
struct Pixel;

template <typename Float, typename Int>
struct FloatPixel {
  using Real = Float;
  using Bits = Int;
  DAGCORE_INLINE static Real load(Float value) { return value; }
  DAGCORE_INLINE static Float store(Real value) { return value; }
};
template <>
struct Pixel<float> : FloatPixel<float, uint32_t> {};
template <>
struct Pixel<double> : FloatPixel<double, uint64_t> {};

template <>
struct Pixel<BFloat16> {
  using Real = float;
  using Bits = uint32_t;
  DAGCORE_INLINE static float load(BFloat16 value) {
    return bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
  }
  DAGCORE_INLINE static BFloat16 store(float value) {  // round to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return BFloat16(static_cast<uint16_t>(value != value ? 0x7fc0u : rounded),
                    BFloat16::from_bits());
  }
};

template <>
struct Pixel<Half> {
  using Real = float;
  using Bits = uint32_t;
  DAGCORE_INLINE static float load(Half value) {
    const uint32_t sign = static_cast<uint32_t>(value.x & 0x8000u) << 16;
    const uint32_t magnitude = value.x & 0x7fffu;
    // Normal, infinite and NaN: move the fields, then rebias the exponent (twice where it is full).
    const uint32_t moved = (magnitude << 13) + 0x38000000u;
    const uint32_t large = magnitude >= 0x7c00u ? moved + 0x38000000u : moved;
    // Subnormal: the magnitude counts units of 2^-24.
    const uint32_t small = bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
    return bit_cast<float>(sign | (magnitude < 0x0400u ? small : large));
  }
  DAGCORE_INLINE static Half store(float value) {  // round to nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts a subnormal's units of 2^-24 at the bottom of the sum, rounded.
    const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t finite = magnitude < 0x38800000u ? small : normal;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return Half(static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? special : finite)),
                Half::from_bits());
  }
};

template <typename T>
using RealOf = typename Pixel<T>::Real;

// The score that a key stands for.
template <typename T>
DAGCORE_INLINE RealOf<T> value_of(typename Score<T>::Key key) {
  if constexpr (sizeof(T) == 2) {
    const int magnitude = key < 0 ? -key : key;
    const int bits = key < 0 ? magnitude | 0x8000 : magnitude;
    return Pixel<T>::load(T(static_cast<uint16_t>(bits), T::from_bits()));
  } else {
    return key;
  }
}

template <typename T>
DAGCORE_INLINE typename Pixel<T>::Bits magnitude_bits(T value) {
  using Bits = typename Pixel<T>::Bits;
  return bit_cast<Bits>(Pixel<T>::load(value)) & (~Bits{0} >> 1);
}

template <typename Real>
DAGCORE_INLINE Real clip(Real value, Real lower, Real upper) {
  value = value < lower ? lower : value;
  return value > upper ? upper : value;
}

template <typename Real>
struct Step {
  Real gamma, lower, upper, epsilon;  // infinities where there is no bound

  template <typename Other>
  Step<Other> as() const {
    return {static_cast<Other>(gamma), static_cast<Other>(lower), static_cast<Other>(upper),
            static_cast<Other>(epsilon)};
  }
};

// A ball's radius in levels, with a little for rounding: 8 / 255 is 8 levels, however computed.
DAGCORE_INLINE double radius_in_levels(double epsilon, int64_t levels, double lower, double upper) {
  constexpr double kRounding = 1 + 1e-6;
  return epsilon * static_cast<double>(levels - 1) / (upper - lower) * kRounding;
}

// The levels that results lie on, such as those of an 8-bit file: `last` + 1 levels from `lower`
// on. Steps accumulate in a shadow between the levels, which is shown at the nearest level.
template <typename Real>
struct Grid {
  Real lower, width, last, per_unit;
  Real reach;  // the ball's radius in levels, rounded inward

  Grid() = default;
  Grid(int64_t levels, double lower, double upper, double epsilon)
      : lower(static_cast<Real>(lower)),
        width(static_cast<Real>(upper - lower)),
        last(static_cast<Real>(levels - 1)),
        per_unit(static_cast<Real>((levels - 1) / (upper - lower))) {
    reach = static_cast<Real>(std::floor(radius_in_levels(epsilon, levels, lower, upper)));
  }

  // The nearest level; ties go to the even one.
  DAGCORE_INLINE Real nearest(Real value) const {
    constexpr Real kRound = Real{1.5} / std::numeric_limits<Real>::epsilon();
    return (product(value - lower, per_unit) + kRound) - kRound;
  }
  DAGCORE_INLINE Real at(Real level) const { return lower + level * width / last; }
};

// Position of a shadow relative to the level of its origin.
template <typename Real>
struct Offset {
  Real middle, side;  // the origin's level; 1 or -1
  int32_t whole;      // whole levels between the two, at most those that exist on that side,
  Real rest;          // and the fraction of a level beyond them

  DAGCORE_INLINE Offset(Real shadow, Real origin, Grid<Real> grid)
      : middle(clip(grid.nearest(origin), Real{0}, grid.last)) {
    const Real away = product(shadow - grid.lower, grid.per_unit) - middle;
    side = away < 0 ? Real{-1} : Real{1};
    const Real room = away < 0 ? middle : grid.last - middle;
    Real distance = side * away;
    distance = distance <= room ? distance : room;
    whole = distance >= 0 ? static_cast<int32_t>(distance) : 0;  // false for NaN
    rest = distance - static_cast<Real>(whole);
  }

  // The level at which it is shown, if a rest above `threshold` counts as a whole level.
  DAGCORE_INLINE Real level(Real threshold) const {
    return middle + side * static_cast<Real>(whole + static_cast<int32_t>(rest > threshold));
  }
};

// In an L2 ball a shadow is shown at the first of these thresholds that keeps the image in the
// ball. 1/2 gives the nearest levels; above it, more pixels move towards the origin. At 1 all do,
// so the image is in the ball if the shadow is.
constexpr int kThresholds = 9;
template <typename Real>
DAGCORE_INLINE Real threshold_at(int k) {
  return static_cast<Real>(8 + k) / 16;
}

// The first threshold at which the sum of squared distances, in levels, fits the ball.
template <typename Real>
DAGCORE_INLINE Real threshold_within(const uint64_t* squares, double radius) {
  int k = 0;
  while (k < kThresholds - 1 && !(static_cast<double>(squares[k]) <= radius * radius)) ++k;
  return threshold_at<Real>(k);
}

// gamma / norm, or 0 if the image must stay: the norm is 0, not finite, or so small that the
// quotient overflows.
template <typename Real>
DAGCORE_INLINE Real step_scale(Real gamma, Real norm) {
  const Real scale = gamma / norm;
  return norm - norm == 0 && scale - scale == 0 ? scale : Real{0};
}

template <typename Real>
DAGCORE_INLINE Real step_pixel(Real image, Real origin, Real gradient, Real scale,
                               Step<Real> step) {
  const Real moved = image + product(scale, gradient);
  const Real inside = clip(moved, origin - step.epsilon, origin + step.epsilon);
  return clip(inside, step.lower, step.upper);
}

// The value at which a shadow is shown.
template <bool kBall, typename Real>
DAGCORE_INLINE Real show_pixel(Real shadow, Real origin, Grid<Real> grid) {
  Real level = grid.nearest(shadow);
  if (kBall) {
    const Real middle = grid.nearest(origin);
    level = clip(level, middle - grid.reach, middle + grid.reach);
  }
  return grid.at(clip(level, Real{0}, grid.last));
}

}  // namespace dagcore
