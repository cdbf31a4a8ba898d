// Shared by the steps on every device: checks, and the arguments of their kernels.
#pragma once

#include <cmath>
#include <optional>

#include "checks.h"
#include "strided.h"

namespace dagcore {

enum StepOperand { kImages, kShown, kOrigin, kGradient, kStepOperands };

constexpr int64_t kMostLevels = 1 << 17;

// images, origin, gradient, grid (N, *); active (N,) int32.
inline void check_step(const Tensor& images, const Tensor& origin, const Tensor& gradient,
                       const Tensor& active, double lower, double upper,
                       const std::optional<Tensor>& grid, int64_t levels) {
  STD_TORCH_CHECK(images.dim() >= 1, "images must have a batch dimension, got ", shape(images));
  check_like("origin", origin, images);
  check_like("gradient", gradient, images);
  check_same_device("active", active, "images", images);
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Int && active.dim() == 1 &&
                      active.size(0) == images.size(0),
                  "active must be int32 of shape (", images.size(0), "), got ", shape(active));
  check_not_expanded("images", images);
  if (grid) {
    check_like("grid", *grid, images);
    check_not_expanded("grid", *grid);
    STD_TORCH_CHECK(levels >= 2 && levels <= kMostLevels, "levels must be from 2 to ", kMostLevels,
                    " with a grid, got ", levels);
    STD_TORCH_CHECK(upper - lower > 0 && std::isfinite(upper - lower),
                    "lower and upper must be finite with a grid, got ", lower, " and ", upper);
  }
}

// Checks a tensor with one number per image.
inline void check_number(const char* name, const Tensor& tensor, const Tensor& images) {
  check_same_device(name, tensor, "images", images);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.dim() == 1 &&
                      tensor.size(0) == images.size(0) && tensor.is_contiguous(),
                  name, " must be contiguous float64 of shape (", images.size(0), "), got ",
                  shape(tensor));
}

// Checks a tensor of pixels in the precision in which steps compute.
inline void check_real(const char* name, const Tensor& tensor, const Tensor& images) {
  const bool wide = images.scalar_type() == ScalarType::Double;
  check_same_device(name, tensor, "images", images);
  STD_TORCH_CHECK(tensor.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float), name,
                  " must be ", wide ? "float64" : "float32");
  STD_TORCH_CHECK(tensor.sizes() == images.sizes(), name, " must have the shape of images ",
                  shape(images), ", got ", shape(tensor));
}

template <typename Real>
DAGCORE_INLINE bool is_positive(Real value) {  // and finite
  return value > 0 && value - value == 0;
}

// The K tensors of a step, beginning with the operands above; the walk covers the pixels of one
// image.
template <int K>
struct StepArgs {
  void *images, *shown;  // shown: the images on the grid; the images themselves without one
  const void *origin, *gradient;
  const int32_t* active;
  int64_t active_stride;
  bool* moved;
  Walk<K> walk;

  StepArgs(const Tensor (&tensors)[K], const Tensor& active, const Tensor& moved)
      : images(tensors[kImages].mutable_data_ptr()),
        shown(tensors[kShown].mutable_data_ptr()),
        origin(tensors[kOrigin].const_data_ptr()),
        gradient(tensors[kGradient].const_data_ptr()),
        active(static_cast<const int32_t*>(active.const_data_ptr())),
        active_stride(active.stride(0)),
        moved(static_cast<bool*>(moved.mutable_data_ptr())),
        walk(tensors) {}

  DAGCORE_INLINE bool is_active(int64_t n) const { return active[n * active_stride] > 0; }
};

}  // namespace dagcore
