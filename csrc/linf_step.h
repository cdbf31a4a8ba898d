// The part of linf_step_ that is the same on every device: checks, output, how to walk the pixels.
#pragma once

#include "checks.h"
#include "strided.h"

namespace dagcore {

enum StepOperand { kImages, kOrigin, kGradient, kStepOperands };

// images, origin, gradient (N, *); active (N,) int32. Returns what the norms go into: (N,) float32,
// or float64 for float64 images; zero so far.
inline Tensor check_step(const Tensor& images, const Tensor& origin, const Tensor& gradient,
                         const Tensor& active) {
  STD_TORCH_CHECK(images.dim() >= 1, "images must have a batch dimension, got ", shape(images));
  const auto check_like_images = [&](const char* name, const Tensor& tensor) {
    check_same_device(name, tensor, "images", images);
    STD_TORCH_CHECK(tensor.scalar_type() == images.scalar_type(), name,
                    " must have the dtype of images");
    STD_TORCH_CHECK(tensor.sizes() == images.sizes(), name, " must have the shape of images ",
                    shape(images), ", got ", shape(tensor));
  };
  check_like_images("origin", origin);
  check_like_images("gradient", gradient);
  check_same_device("active", active, "images", images);
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Int && active.dim() == 1 &&
                      active.size(0) == images.size(0),
                  "active must be int32 of shape (", images.size(0), "), got ", shape(active));
  for (int64_t d = 0; images.numel() > 0 && d < images.dim(); ++d) {
    STD_TORCH_CHECK(images.size(d) <= 1 || images.stride(d) != 0,
                    "images must not be an expanded tensor: it is written in place");
  }
  const bool wide = images.scalar_type() == ScalarType::Double;
  return torch::stable::new_zeros(images, {images.size(0)},
                                  wide ? ScalarType::Double : ScalarType::Float);
}

// What the kernels work on; the walk is over the pixels of one image.
struct StepArgs {
  void* images;
  const void *origin, *gradient;
  const int32_t* active;
  int64_t active_stride;
  void* norms;
  Walk<kStepOperands> walk;

  StepArgs(const Tensor& images, const Tensor& origin, const Tensor& gradient, const Tensor& active,
           const Tensor& norms)
      : images(images.mutable_data_ptr()),
        origin(origin.const_data_ptr()),
        gradient(gradient.const_data_ptr()),
        active(static_cast<const int32_t*>(active.const_data_ptr())),
        active_stride(active.stride(0)),
        norms(norms.mutable_data_ptr()),
        walk({images, origin, gradient}) {}

  DAGCORE_INLINE bool is_active(int64_t n) const { return active[n * active_stride] > 0; }
};

}  // namespace dagcore
