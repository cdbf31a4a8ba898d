// The part of linf_step_ that is the same on every device: checks, output, how to walk the pixels.
#pragma once

#include <cmath>
#include <optional>
#include <tuple>

#include "checks.h"
#include "strided.h"

namespace dagcore {

enum StepOperand { kImages, kShown, kOrigin, kGradient, kStepOperands };

constexpr int64_t kMostLevels = 1 << 17;

// What a step tells of its images: their norms (N,), float32 or, of float64 images, float64; and
// whether they have moved, (N,) bool.
using StepOutputs = std::tuple<Tensor, Tensor>;

// images, origin, gradient, grid (N, *); active (N,) int32. Returns the outputs, zero so far.
inline StepOutputs check_step(const Tensor& images, const Tensor& origin, const Tensor& gradient,
                              const Tensor& active, double lower, double upper,
                              const std::optional<Tensor>& grid, int64_t levels) {
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
  const auto check_not_expanded = [&](const char* name, const Tensor& tensor) {
    for (int64_t d = 0; tensor.numel() > 0 && d < tensor.dim(); ++d) {
      STD_TORCH_CHECK(tensor.size(d) <= 1 || tensor.stride(d) != 0, name,
                      " must not be an expanded tensor: it is written in place");
    }
  };
  check_not_expanded("images", images);
  if (grid) {
    check_like_images("grid", *grid);
    check_not_expanded("grid", *grid);
    STD_TORCH_CHECK(levels >= 2 && levels <= kMostLevels, "levels must be from 2 to ", kMostLevels,
                    " with a grid, got ", levels);
    STD_TORCH_CHECK(upper - lower > 0 && std::isfinite(upper - lower),
                    "lower and upper must be finite with a grid, got ", lower, " and ", upper);
  }
  const bool wide = images.scalar_type() == ScalarType::Double;
  return {torch::stable::new_zeros(images, {images.size(0)},
                                   wide ? ScalarType::Double : ScalarType::Float),
          torch::stable::new_zeros(images, {images.size(0)}, ScalarType::Bool)};
}

// What the kernels work on; the walk is over the pixels of one image.
struct StepArgs {
  void *images, *shown;  // shown: the images on the grid; the images themselves without one
  const void *origin, *gradient;
  const int32_t* active;
  int64_t active_stride;
  void* norms;
  bool* moved;
  Walk<kStepOperands> walk;

  StepArgs(const Tensor& images, const Tensor& shown, const Tensor& origin, const Tensor& gradient,
           const Tensor& active, const StepOutputs& outputs)
      : images(images.mutable_data_ptr()),
        shown(shown.mutable_data_ptr()),
        origin(origin.const_data_ptr()),
        gradient(gradient.const_data_ptr()),
        active(static_cast<const int32_t*>(active.const_data_ptr())),
        active_stride(active.stride(0)),
        norms(std::get<0>(outputs).mutable_data_ptr()),
        moved(static_cast<bool*>(std::get<1>(outputs).mutable_data_ptr())),
        walk({images, shown, origin, gradient}) {}

  DAGCORE_INLINE bool is_active(int64_t n) const { return active[n * active_stride] > 0; }
};

}  // namespace dagcore
