// The part of linf_step_ that is the same on every device: checks, output, how to walk the pixels.
#pragma once

#include "checks.h"
#include "strided.h"

namespace dagcore {

enum StepOperand { kImages, kOrigin, kGradient, kStepOperands };

// images, origin, gradient (N, *); active (N,) int32; the walk is over the pixels of one image.
struct StepCall {
  Tensor images, origin, gradient, active;
  Step<double> step;
  Tensor norms;  // (N,) float32, or float64 for float64 images; zero so far
  Walk<kStepOperands> walk;

  StepCall(const Tensor& images, const Tensor& origin, const Tensor& gradient, const Tensor& active,
           Step<double> step)
      : images(images), origin(origin), gradient(gradient), active(active), step(step) {
    check_step_arguments(images, origin, gradient, active);
    const bool wide = images.scalar_type() == ScalarType::Double;
    norms = torch::stable::new_zeros(images, {images.size(0)},
                                     wide ? ScalarType::Double : ScalarType::Float);
    for (int64_t d = 1; d < images.dim(); ++d) {
      walk.add(images.size(d), {images.stride(d), origin.stride(d), gradient.stride(d)});
    }
    walk.merge();
  }

  template <typename Real>
  Step<Real> step_as() const {
    return {static_cast<Real>(step.gamma), static_cast<Real>(step.lower),
            static_cast<Real>(step.upper), static_cast<Real>(step.epsilon)};
  }
};

}  // namespace dagcore
