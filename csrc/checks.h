// Building blocks of argument checks, for callers that bypass the Python wrappers. Each message
// names the argument, what was required and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <sstream>
#include <string>

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

inline void check_like(const char* name, const Tensor& tensor, const Tensor& images) {
  check_same_device(name, tensor, "images", images);
  STD_TORCH_CHECK(tensor.scalar_type() == images.scalar_type(), name,
                  " must have the dtype of images");
  STD_TORCH_CHECK(tensor.sizes() == images.sizes(), name, " must have the shape of images ",
                  shape(images), ", got ", shape(tensor));
}

inline void check_not_expanded(const char* name, const Tensor& tensor) {
  for (int64_t d = 0; tensor.numel() > 0 && d < tensor.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) <= 1 || tensor.stride(d) != 0, name,
                    " must not be an expanded tensor: it is written in place");
  }
}

inline void check_class_count(const Tensor& scores) {
  STD_TORCH_CHECK(scores.size(1) < (int64_t{1} << 31), "scores must have fewer than 2^31 classes");
}

// Returns the enumerator of this name; `known` lists the names of the values from 0 on.
template <typename Enum, size_t kCount>
Enum value_named(const char* argument, const std::string& name,
                 const char* const (&known)[kCount]) {
  std::string allowed;
  for (size_t value = 0; value < kCount; ++value) {
    if (name == known[value]) return static_cast<Enum>(value);
    allowed += (value ? ", " : "") + std::string(known[value]);
  }
  STD_TORCH_CHECK(false, argument, " must be one of ", allowed, ", got ", name);
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
