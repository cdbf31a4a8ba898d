// Labels of any integer type, on any device.
#pragma once

#include "checks.h"

namespace dagcore {

// (N, *T) uint8, int32 or int64; the offset of a target within its image is the caller's.
struct LabelSource {
  const void* data;
  ScalarType type;
  int64_t batch_stride;

  explicit LabelSource(const Tensor& labels)
      : data(labels.const_data_ptr()), type(labels.scalar_type()), batch_stride(labels.stride(0)) {}

  // Where the label of a target lies.
  const void* at(int64_t n, int64_t offset) const {
    const int64_t width = type == ScalarType::Byte ? 1 : type == ScalarType::Int ? 4 : 8;
    return static_cast<const char*>(data) + (n * batch_stride + offset) * width;
  }
  // The label itself.
  DAGCORE_INLINE int64_t read(int64_t n, int64_t offset) const {
    const int64_t i = n * batch_stride + offset;
    if (type == ScalarType::Byte) return static_cast<const uint8_t*>(data)[i];
    if (type == ScalarType::Int) return static_cast<const int32_t*>(data)[i];
    return static_cast<const int64_t*>(data)[i];
  }
};

}  // namespace dagcore
