// Argument checks of the ops, for callers that come past the Python wrappers: each message names
// the argument, what was required and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>

#include "step.h"

namespace dagcore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& tensor) {
  std::ostringstream out;
  out << "(";
  for (int64_t d = 0; d < tensor.dim(); ++d) out << (d ? ", " : "") << tensor.sizes()[d];
  out << ")";
  return out.str();
}

inline void check_same_device(const char* name, const Tensor& tensor, const char* other_name,
                              const Tensor& other) {
  STD_TORCH_CHECK(tensor.device() == other.device(), name, " must be on the device of ",
                  other_name);
}

inline bool is_label_type(ScalarType type) {
  return type == ScalarType::Byte || type == ScalarType::Int || type == ScalarType::Long;
}

// labels (N, *T) beside scores (N, C, *T)
inline void check_labels(const char* name, const Tensor& labels, const Tensor& scores) {
  check_same_device(name, labels, "scores", scores);
  STD_TORCH_CHECK(is_label_type(labels.scalar_type()), name, " must be uint8, int32 or int64");
  bool fits = labels.dim() == scores.dim() - 1;
  for (int64_t d = 0; fits && d < labels.dim(); ++d) {
    fits = labels.size(d) == scores.size(d == 0 ? 0 : d + 1);
  }
  STD_TORCH_CHECK(fits, name, " must have the shape of scores ", shape(scores),
                  " without its class dimension, got ", shape(labels));
}

inline void check_adversarial_given(const std::optional<Tensor>& adversarial, Objective objective) {
  STD_TORCH_CHECK(adversarial || objective != Objective::reach,
                  "adversarial_labels must be given for the objective reach");
}

inline void check_seed_arguments(const Tensor& scores, const Tensor& labels,
                                 const std::optional<Tensor>& adversarial, Objective objective) {
  STD_TORCH_CHECK(scores.dim() >= 2, "scores must have shape (N, C, *targets), got ",
                  shape(scores));
  STD_TORCH_CHECK(scores.size(1) >= 1, "scores must have at least one class, got ", shape(scores));
  STD_TORCH_CHECK(scores.size(1) < (int64_t{1} << 31), "scores must have fewer than 2^31 classes");
  check_labels("labels", labels, scores);
  if (adversarial) check_labels("adversarial_labels", *adversarial, scores);
  check_adversarial_given(adversarial, objective);
}

inline void check_step_arguments(const Tensor& images, const Tensor& origin, const Tensor& gradient,
                                 const Tensor& active) {
  STD_TORCH_CHECK(images.dim() >= 1, "images must have a batch dimension, got ", shape(images));
  const auto like_images = [&](const char* name, const Tensor& tensor) {
    check_same_device(name, tensor, "images", images);
    STD_TORCH_CHECK(tensor.scalar_type() == images.scalar_type(), name,
                    " must have the dtype of images");
    bool same = tensor.dim() == images.dim();
    for (int64_t d = 0; same && d < images.dim(); ++d) same = tensor.size(d) == images.size(d);
    STD_TORCH_CHECK(same, name, " must have the shape of images ", shape(images), ", got ",
                    shape(tensor));
  };
  like_images("origin", origin);
  like_images("gradient", gradient);
  check_same_device("active", active, "images", images);
  STD_TORCH_CHECK(active.scalar_type() == ScalarType::Int && active.dim() == 1 &&
                      active.size(0) == images.size(0),
                  "active must be int32 of shape (", images.size(0), "), got ", shape(active));
  if (images.numel() == 0) return;
  for (int64_t d = 0; d < images.dim(); ++d) {
    STD_TORCH_CHECK(images.size(d) <= 1 || images.stride(d) != 0,
                    "images must not be an expanded tensor: it is written in place");
  }
}

// Calls body(T{}) with the kernel's type for a floating dtype.
template <typename Body>
void for_float_type(const char* name, ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      STD_TORCH_CHECK(false, name, " must be float16, bfloat16, float32 or float64");
  }
}

}  // namespace dagcore
