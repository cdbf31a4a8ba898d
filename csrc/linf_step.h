// The part of linf_step_ that is the same on every device: output, what the kernels work on.
#pragma once

#include <tuple>

#include "step_args.h"

namespace dagcore {

// What linf_step_ tells of its images: their norms (N,), float32 or, of float64 images, float64;
// and whether they have moved, (N,) bool.
using LinfOutputs = std::tuple<Tensor, Tensor>;

// The outputs, zero so far.
inline LinfOutputs linf_outputs(const Tensor& images) {
  const bool wide = images.scalar_type() == ScalarType::Double;
  return {torch::stable::new_zeros(images, {images.size(0)},
                                   wide ? ScalarType::Double : ScalarType::Float),
          torch::stable::new_zeros(images, {images.size(0)}, ScalarType::Bool)};
}

struct LinfArgs : StepArgs<kStepOperands> {
  void* norms;

  LinfArgs(const Tensor& images, const Tensor& shown, const Tensor& origin, const Tensor& gradient,
           const Tensor& active, const LinfOutputs& outputs)
      : StepArgs({images, shown, origin, gradient}, active, std::get<1>(outputs)),
        norms(std::get<0>(outputs).mutable_data_ptr()) {}
};

}  // namespace dagcore
