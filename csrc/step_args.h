// What the steps share on every device: checks, and what their kernels work on.
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

// The tensors of a step, K of them, which begin with the operands above; the walk is over the
// pixels of one image.
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
