// The device-independent part of linf_step_: outputs, and the arguments of the kernels.
#pragma once

#include <tuple>

#include "step_args.h"

namespace dagcore {

// Outputs of linf_step_: the norms (N,), float32 or float64 for float64 images, and whether each
// image has moved, (N,) bool.
using LinfOutputs = std::tuple<Tensor, Tensor>;

// The outputs, zero at first.
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
