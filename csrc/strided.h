// Walking several tensors of one shape together, whatever their strides.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "checks.h"
#include "target.h"

namespace dagcore {

constexpr int kMaxDims = 16;

// Dimensions of K tensors, ordered so that the last has the first tensor's smallest stride, and
// merged wherever all K tensors allow it. Most layouts end as a single dimension.
template <int K>
struct Walk {
  int dims = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims][K];

  void add(int64_t extent, std::initializer_list<int64_t> strides) {
    if (extent == 1) return;
    STD_TORCH_CHECK(dims < kMaxDims, "at most ", kMaxDims, " dimensions are supported");
    int at = dims++;
    for (; at > 0 && stride[at - 1][0] < *strides.begin(); --at) {
      size[at] = size[at - 1];
      for (int k = 0; k < K; ++k) stride[at][k] = stride[at - 1][k];
    }
    size[at] = extent;
    int k = 0;
    for (int64_t s : strides) stride[at][k++] = s;
  }

  void merge() {
    if (dims == 0) {
      dims = 1;
      size[0] = 1;
      for (int k = 0; k < K; ++k) stride[0][k] = 1;
    }
    int last = 0;
    for (int d = 1; d < dims; ++d) {
      bool nested = true;
      for (int k = 0; k < K; ++k) nested &= stride[last][k] == stride[d][k] * size[d];
      if (nested) {
        size[last] *= size[d];
      } else {
        size[++last] = size[d];
      }
      for (int k = 0; k < K; ++k) stride[last][k] = stride[d][k];
    }
    dims = last + 1;
  }

  DAGCORE_INLINE int64_t inner() const { return size[dims - 1]; }
  DAGCORE_INLINE int64_t inner_stride(int k) const { return stride[dims - 1][k]; }
  DAGCORE_INLINE int64_t rows() const {
    int64_t rows = 1;
    for (int d = 0; d < dims - 1; ++d) rows *= size[d];
    return rows;
  }
  // Where each tensor's row begins, in elements.
  DAGCORE_INLINE void row_offsets(int64_t row, int64_t (&offset)[K]) const {
    for (int k = 0; k < K; ++k) offset[k] = 0;
    for (int d = dims - 2; d >= 0; --d) {
      const int64_t i = row % size[d];
      row /= size[d];
      for (int k = 0; k < K; ++k) offset[k] += i * stride[d][k];
    }
  }
};

}  // namespace dagcore
