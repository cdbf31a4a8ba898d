// The device-independent part of pgd_step_: checks, what a step must know about an image before it
// can move the pixels, and how it moves each.
//
// For an image x with the origin o, the direction d is the gradient, or with momentum m <- decay m
// + gradient / ||gradient||_1:
//
//   v = x + alpha sign(d), or x + alpha d / ||d||_2
//   z = the projection of v
//   y = x + share (z - x) + (1 - share) (x - previous), for APGD, then projected too
//
// A projection in L2 needs the norm of what it projects, so a step takes up to five passes, and two
// more if the image on the levels must lie in an L2 ball.
#pragma once

#include <limits>
#include <optional>

#include "step_args.h"

namespace dagcore {

enum class Norm : int { linf, l2 };
constexpr const char* kNorms[] = {"linf", "l2"};  // in the same order

enum PgdOperand { kMomentum = kStepOperands, kPrevious, kPgdOperands };

// The sums over an image's pixels that a step needs, in the order in which it learns them.
enum PgdSum {
  kGradientSum,    // ||gradient||_1, for momentum
  kDirectionSum,   // ||d||_2^2; in L-infinity 0 if d is, infinite if d is not finite, else above 0
  kBallSum,        // ||v - o||_2^2
  kSecondBallSum,  // ||y - o||_2^2
  kPgdSums         // not a sum: all that are needed are known
};

// kDirectionSum in L-infinity, where `largest` holds the bits of the largest magnitude. With
// momentum it only says whether all pixels are 0, so that not all need to be read.
template <typename Real>
DAGCORE_INLINE double direction_sum(typename Pixel<Real>::Bits largest, bool momentum) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  const bool finite = largest < bit_cast<typename Pixel<Real>::Bits>(kInfinity);
  return largest == 0 ? 0 : momentum || finite ? 1 : kInfinity;
}

// How the pixels of one image move. Numbers are double if a norm still has to be applied to them.
template <typename Real>
struct PgdStep {
  double alpha, epsilon;
  Real share, decay, lower, upper;
  Real inverse, length;        // 1 / ||gradient||_1; alpha, or alpha / ||d||_2
  Real shrink, second_shrink;  // of v - o and y - o, 1 within the ball
  bool l2, momentum;

  // Takes in a sum; returns whether the image can still be stepped.
  DAGCORE_INLINE bool learn(int which, double sum) {
    if (which == kGradientSum) {
      inverse = sum == 0 ? Real{0} : static_cast<Real>(1 / sum);
      return sum == 0 || is_positive(inverse);
    }
    if (which == kDirectionSum) {
      if (l2) length = static_cast<Real>(alpha / std::sqrt(sum));
      return is_positive(length) && is_positive(sum);
    }
    const double norm = std::sqrt(sum);
    const Real shrunk = norm > epsilon ? static_cast<Real>(epsilon / norm) : Real{1};
    if (which == kBallSum) shrink = shrunk;
    if (which == kSecondBallSum) second_shrink = shrunk;
    return true;
  }

  DAGCORE_INLINE Real direction(Real gradient, Real before) const {  // the next momentum
    return product(decay, before) + product(inverse, gradient);
  }
  template <bool kL2>
  DAGCORE_INLINE Real move(Real image, Real direction) const {  // v
    if (kL2) return image + product(length, direction);
    return direction > 0 ? image + length : direction < 0 ? image - length : image;
  }
  template <bool kL2>
  DAGCORE_INLINE Real project(Real value, Real origin, Real shrunk) const {
    const Real radius = static_cast<Real>(epsilon);
    const Real inside = kL2 ? origin + product(shrunk, value - origin)
                            : clip(value, origin - radius, origin + radius);
    return clip(kL2 && shrunk == 1 ? value : inside, lower, upper);
  }
  DAGCORE_INLINE Real mix(Real image, Real projected, Real previous) const {  // y
    return image + product(share, projected - image) + product(1 - share, image - previous);
  }
};

struct PgdArgs : StepArgs<kPgdOperands> {
  void *momentum, *previous;              // null if there is none
  const double *alpha, *epsilon, *share;  // (N,); share is null without `previous`
  double decay, lower, upper;
  bool l2;
  int64_t levels;  // 0 without a grid

  PgdArgs(const Tensor& images, const Tensor& origin, const Tensor& gradient, const Tensor& active,
          Norm norm, const Tensor& alpha, const Tensor& epsilon, double lower, double upper,
          const std::optional<Tensor>& momentum, double decay,
          const std::optional<Tensor>& previous, const std::optional<Tensor>& share,
          const std::optional<Tensor>& grid, int64_t levels, const Tensor& moved)
      : StepArgs({images, grid ? *grid : images, origin, gradient, momentum ? *momentum : images,
                  previous ? *previous : images},
                 active, moved),
        momentum(momentum ? momentum->mutable_data_ptr() : nullptr),
        previous(previous ? previous->mutable_data_ptr() : nullptr),
        alpha(static_cast<const double*>(alpha.const_data_ptr())),
        epsilon(static_cast<const double*>(epsilon.const_data_ptr())),
        share(share ? static_cast<const double*>(share->const_data_ptr()) : nullptr),
        decay(decay),
        lower(lower),
        upper(upper),
        l2(norm == Norm::l2),
        levels(grid ? levels : 0) {}

  DAGCORE_INLINE bool needs(int sum) const {
    return sum == kGradientSum     ? momentum != nullptr
           : sum == kDirectionSum  ? true
           : sum == kBallSum       ? l2
           : sum == kSecondBallSum ? l2 && previous
                                   : false;
  }

  // Sets up the step of image n, as far as possible without its pixels; returns whether to step it.
  template <typename Real>
  DAGCORE_INLINE bool begin(int64_t n, PgdStep<Real>* step) const {
    const double part = share ? share[n] : 1.0;
    *step = {alpha[n],
             epsilon[n],
             static_cast<Real>(part),
             static_cast<Real>(decay),
             static_cast<Real>(lower),
             static_cast<Real>(upper),
             Real{0},
             static_cast<Real>(alpha[n]),
             Real{1},
             Real{1},
             l2,
             momentum != nullptr};
    return is_active(n) && is_positive(step->alpha) && step->epsilon > 0 && part >= 0 && part <= 1;
  }

  DAGCORE_INLINE double radius(int64_t n) const {  // of the ball, in levels
    return radius_in_levels(epsilon[n], levels, lower, upper);
  }
};

// images, origin, gradient, previous, grid (N, *); momentum (N, *), float32 or float64 for float64
// images; active (N,) int32; alpha, epsilon, share (N,) float64.
inline void check_pgd_step(const Tensor& images, const Tensor& origin, const Tensor& gradient,
                           const Tensor& active, const Tensor& alpha, const Tensor& epsilon,
                           double lower, double upper, const std::optional<Tensor>& momentum,
                           const std::optional<Tensor>& previous,
                           const std::optional<Tensor>& share, const std::optional<Tensor>& grid,
                           int64_t levels) {
  check_step(images, origin, gradient, active, lower, upper, grid, levels);
  check_number("alpha", alpha, images);
  check_number("epsilon", epsilon, images);
  if (momentum) {
    check_real("momentum", *momentum, images);
    check_not_expanded("momentum", *momentum);
  }
  STD_TORCH_CHECK(previous.has_value() == share.has_value(),
                  "previous and share must be given together");
  if (previous) {
    check_like("previous", *previous, images);
    check_not_expanded("previous", *previous);
    check_number("share", *share, images);
  }
}

}  // namespace dagcore
