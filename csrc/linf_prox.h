// The device-independent part of linf_prox_: checks, one pixel, the search for t.
//
// The excess, the sum of H (|d| - t) over the pixels whose |p| is above t, falls as t rises. |p| is
// mapped linearly to an integer key, from 0 to the largest. The key of t is found digit by digit:
// each pass sums H and H |d| over the pixels that share all digits so far, separately for each
// value of the next digit.
#pragma once

#include <limits>
#include <type_traits>

#include "step_args.h"

namespace dagcore {

enum ProxOperand { kProxImages, kProxOrigin, kProxGradient, kProxMetric, kProxOperands };

constexpr int kDigitBits = 6;
constexpr int kDigits = 1 << kDigitBits;  // values of a digit
template <typename Real>
constexpr int kPasses = sizeof(Real) == 8 ? 8 : 4;  // digits of a key
template <typename Real>
using KeyOf = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;

// images, origin, gradient (N, *) of one dtype; metric (N, *) float32, or float64 for float64
// images; active (N,) int32; alpha, epsilon (N,) float64. Returns flags (N,) bool of images that
// have moved, all false at first.
inline Tensor check_prox(const Tensor& images, const Tensor& origin, const Tensor& gradient,
                         const Tensor& metric, const Tensor& active, const Tensor& alpha,
                         const Tensor& epsilon, double lower, double upper) {
  check_step(images, origin, gradient, active, lower, upper, std::nullopt, 0);
  check_real("metric", metric, images);
  check_number("alpha", alpha, images);
  check_number("epsilon", epsilon, images);
  return torch::stable::new_zeros(images, {images.size(0)}, ScalarType::Bool);
}

// A pixel of d = x - x_0 + alpha g / H: unclipped, and clipped to the bounds.
template <typename Real>
struct Perturbed {
  Real free, inside;
};

// Arguments of the kernels; the walk covers the pixels of one image.
struct ProxArgs {
  void* images;
  const void *origin, *gradient, *metric;
  const int32_t* active;
  int64_t active_stride;
  const double *alpha, *epsilon;  // (N,)
  bool* moved;
  double weight, lower, upper;
  Walk<kProxOperands> walk;

  ProxArgs(const Tensor& images, const Tensor& origin, const Tensor& gradient, const Tensor& metric,
           const Tensor& active, const Tensor& alpha, const Tensor& epsilon, const Tensor& moved,
           double weight, double lower, double upper)
      : images(images.mutable_data_ptr()),
        origin(origin.const_data_ptr()),
        gradient(gradient.const_data_ptr()),
        metric(metric.const_data_ptr()),
        active(static_cast<const int32_t*>(active.const_data_ptr())),
        active_stride(active.stride(0)),
        alpha(static_cast<const double*>(alpha.const_data_ptr())),
        epsilon(static_cast<const double*>(epsilon.const_data_ptr())),
        moved(static_cast<bool*>(moved.mutable_data_ptr())),
        weight(weight),
        lower(lower),
        upper(upper),
        walk({images, origin, gradient, metric}) {}

  // Whether to move an image, as far as that is known without its pixels.
  DAGCORE_INLINE bool is_active(int64_t n) const {
    return active[n * active_stride] > 0 && is_positive(alpha[n]) && epsilon[n] > 0;
  }
  // The limit of |p| in an image, given the t that the search has found.
  template <typename Real>
  DAGCORE_INLINE Real largest(int64_t n, double t) const {
    return static_cast<Real>(t < epsilon[n] ? t : epsilon[n]);
  }

  // The pixel at these positions; `length` is the step length of the image.
  template <typename T, typename Real>
  DAGCORE_INLINE Perturbed<Real> perturbed(const int64_t (&at)[kProxOperands], Real length) const {
    const Real x = Pixel<T>::load(static_cast<const T*>(images)[at[kProxImages]]);
    const Real origin = start<T>(at);
    const Real r = Pixel<T>::load(static_cast<const T*>(gradient)[at[kProxGradient]]);
    const Real free = x - origin + product(length, r) / metric_at<Real>(at);
    return {free, clip(free, static_cast<Real>(lower) - origin, static_cast<Real>(upper) - origin)};
  }
  template <typename Real>
  DAGCORE_INLINE Real metric_at(const int64_t (&at)[kProxOperands]) const {
    return static_cast<const Real*>(metric)[at[kProxMetric]];
  }
  // Writes x_0 + p, where p is d clipped to the bounds and to [-t, t].
  template <typename T, typename Real>
  DAGCORE_INLINE void put(const int64_t (&at)[kProxOperands], Perturbed<Real> d, Real t) const {
    const Real moved = start<T>(at) + clip(d.inside, -t, t);
    static_cast<T*>(images)[at[kProxImages]] =
        Pixel<T>::store(clip(moved, static_cast<Real>(lower), static_cast<Real>(upper)));
  }

 private:
  template <typename T>
  DAGCORE_INLINE RealOf<T> start(const int64_t (&at)[kProxOperands]) const {
    return Pixel<T>::load(static_cast<const T*>(origin)[at[kProxOrigin]]);
  }
};

// Sums over pixels.
struct Excess {
  double mass, moment;  // of H, and of H |d|
};

// State of the search for an image's t; zero at first.
struct Search {
  uint64_t farthest, largest;  // bits of the largest |d|, and of that within the bounds
  Excess above;                // of the pixels whose first digits are above those of t
  int64_t prefix;              // first digits of t
  double t;
  int64_t found;  // whether t is known

  // Whether the image can be moved.
  template <typename Real>
  DAGCORE_INLINE bool usable() const {
    const Real most = as_real<Real>(farthest);
    return most > 0 && most - most == 0;
  }
  // Factor from |p| to keys; infinite if all |p| are too small for one.
  template <typename Real>
  DAGCORE_INLINE Real scale() const {
    return last_key<Real>() / as_real<Real>(largest);
  }
  template <typename Real>
  DAGCORE_INLINE static KeyOf<Real> key(Real size, Real scale) {
    const Real scaled = size * scale;
    return static_cast<KeyOf<Real>>(scaled < last_key<Real>() ? scaled : last_key<Real>());
  }
  // The next digit of a pixel's key; -1 if its earlier digits differ from those of t.
  template <typename Real>
  DAGCORE_INLINE int digit(KeyOf<Real> key, int pass) const {
    const int below = kDigitBits * (kPasses<Real> - 1 - pass);
    return key >> below >> kDigitBits == prefix ? static_cast<int>(key >> below & (kDigits - 1))
                                                : -1;
  }

  // Fixes the next digit, given the sums over the pixels with each of its values.
  template <typename Real>
  DAGCORE_INLINE void narrow(int pass, const Excess* sums, double wanted) {
    const double limit = scale<Real>();
    if (found) return;
    if (pass == 0 && !(wanted > 0 && limit < std::numeric_limits<Real>::infinity())) {
      found = true;
      t = wanted > 0 ? 0 : std::numeric_limits<double>::infinity();
      return;
    }
    double width = 1 / limit;
    for (int k = pass + 1; k < kPasses<Real>; ++k) width *= kDigits;
    Excess sum = above;
    for (int value = kDigits - 1; value >= 0; --value) {
      above = sum;
      sum.mass += sums[value].mass;
      sum.moment += sums[value].moment;
      const int64_t next = prefix * kDigits + value;
      const double edge = static_cast<double>(next) * width;
      // After the first pass, the last value must be it, whatever rounding has done to the sums.
      if (!(sum.moment - edge * sum.mass > wanted) && (value > 0 || pass == 0)) continue;
      prefix = next;
      if (pass + 1 < kPasses<Real>) return;
      const double exact = (sum.moment - wanted) / sum.mass;
      found = true;
      t = exact > edge ? (exact < edge + width ? exact : edge + width) : edge;
      return;
    }
    found = true;
    t = 0;
  }

 private:
  template <typename Real>
  DAGCORE_INLINE static Real as_real(uint64_t bits) {
    if constexpr (sizeof(Real) == 8) {
      return bit_cast<Real>(bits);
    } else {
      return bit_cast<Real>(static_cast<uint32_t>(bits));
    }
  }
  template <typename Real>
  DAGCORE_INLINE static constexpr Real last_key() {
    return static_cast<Real>((int64_t{1} << (kDigitBits * kPasses<Real>)) - 1);
  }
};
static_assert(sizeof(Search) == 7 * sizeof(double));

}  // namespace dagcore
