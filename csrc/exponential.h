// exp and log as polynomials: the same bits on every device and at any vector width.
#pragma once

#include <cstdint>

#include "step.h"

namespace dagcore {

template <typename Real>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLowest = -87.0f;  // exp counts as 0 below this
  // ln 2 as a sum. The first part ends in zeros, so its product with an exponent is exact.
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.1219444e-4f;
  static constexpr int kExpTerms = 7, kLogTerms = 5;  // omitted terms are below half an ulp
};
template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLowest = -708.0;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kExpTerms = 13, kLogTerms = 11;
};

constexpr double factorial(int n) { return n == 0 ? 1 : n * factorial(n - 1); }

// 1/k! + x/(k+1)! + ... + x^(last-k)/last!, two terms at a time, which halves the chain of
// dependent operations.
template <int k, int last, typename Real>
DAGCORE_INLINE Real exp_series(Real x, Real square) {
  constexpr Real term = static_cast<Real>(1 / factorial(k));
  if constexpr (k == last) {
    return term;
  } else {
    constexpr Real next = static_cast<Real>(1 / factorial(k + 1));
    const Real pair = term + product(x, next);
    if constexpr (k + 1 == last)
      return pair;
    else
      return pair + product(square, exp_series<k + 2, last>(x, square));
  }
}

// 1/(2k+1) + x/(2k+3) + ...: `last` is the last k.
template <int k, int last, typename Real>
DAGCORE_INLINE Real atanh_series(Real x) {
  constexpr Real term = static_cast<Real>(1.0 / (2 * k + 1));
  if constexpr (k == last) {
    return term;
  } else {
    return term + product(x, atanh_series<k + 1, last>(x));
  }
}

// e^x = power * (1 + rest) for x <= 0. power is 0 for NaN, and where e^x is below every normal
// number.
template <typename Real>
struct Exponential {
  Real power, rest;

  DAGCORE_INLINE explicit Exponential(Real x) {
    using Format = FloatFormat<Real>;
    using Bits = typename Format::Bits;
    constexpr Real kLog2E = static_cast<Real>(1.44269504088896340736);
    // Adding this to a small number rounds it to an integer, in the lowest bits of the sum.
    constexpr Real kRounder = static_cast<Real>(int64_t{3} << (Format::kMantissa - 1));
    const bool counts = x >= Format::kLowest;
    const Real kept = counts ? x : Real{0};
    const Real rounded = product(kept, kLog2E) + kRounder;
    const Real exponent = rounded - kRounder;
    const Real fraction =
        (kept - product(exponent, Format::kLn2High)) - product(exponent, Format::kLn2Low);
    const Bits bits = bit_cast<Bits>(rounded) - bit_cast<Bits>(kRounder) + Format::kBias;
    power = counts ? bit_cast<Real>(bits << Format::kMantissa) : Real{0};
    const Real square = product(fraction, fraction);
    rest = product(fraction, exp_series<1, Format::kExpTerms>(fraction, square));
  }
};

template <typename Real>
DAGCORE_INLINE Real exp_nonpositive(Real x) {
  const Exponential<Real> exponential(x);
  return product(exponential.power, 1 + exponential.rest);
}

// e^x - 1, without loss of digits near 0.
template <typename Real>
DAGCORE_INLINE Real expm1_nonpositive(Real x) {
  const Exponential<Real> exponential(x);
  return (exponential.power - 1) + product(exponential.power, exponential.rest);
}

// ln x for finite x >= 1; an arbitrary number otherwise.
template <typename Real>
DAGCORE_INLINE Real log_from_one(Real x) {
  using Format = FloatFormat<Real>;
  using Bits = typename Format::Bits;
  constexpr Real kRootHalf = static_cast<Real>(0.70710678118654752440);
  const Bits bits = bit_cast<Bits>(x);
  const Bits exponent = (bits - bit_cast<Bits>(kRootHalf)) >> Format::kMantissa;
  const Real fraction = bit_cast<Real>(bits - (exponent << Format::kMantissa));
  const Real ratio = (fraction - 1) / (fraction + 1);  // ln(fraction) is 2 atanh(ratio)
  const Real tail =
      product(product(ratio, ratio), atanh_series<1, Format::kLogTerms>(product(ratio, ratio)));
  const Real log = product(Real{2}, ratio + product(ratio, tail));
  const Real power = static_cast<Real>(static_cast<int32_t>(exponent));
  return product(power, Format::kLn2High) + (product(power, Format::kLn2Low) + log);
}

}  // namespace dagcore
