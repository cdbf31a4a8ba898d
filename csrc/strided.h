// Walking several tensors of one shape together, whatever their strides.
#pragma once

#include <cstdint>

#include "checks.h"

namespace dagcore {

constexpr int kMaxDims = 16;

// The dimensions of one image in K tensors, ordered so that the last has the first tensor's
// smallest stride, and merged wherever all K tensors allow it. Most layouts end as a single one.
template <int K>
struct Walk {
  int dims = 0;
  int64_t batch[K];  // strides from one image to the next
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims][K];

  // The last tensor's shape, (N, *), is walked; the others' last dimensions are the same.
  explicit Walk(const Tensor (&tensors)[K]) {
    const Tensor& shape = tensors[K - 1];
    for (int k = 0; k < K; ++k) batch[k] = tensors[k].stride(0);
    for (int64_t d = 1; d < shape.dim(); ++d) {
      if (shape.size(d) == 1) continue;
      STD_TORCH_CHECK(dims < kMaxDims, "at most ", kMaxDims, " dimensions are supported");
      const int64_t before = tensors[0].dim() - shape.dim();
      int at = dims++;
      for (; at > 0 && stride[at - 1][0] < tensors[0].stride(d + before); --at) copy(at - 1, at);
      size[at] = shape.size(d);
      for (int k = 0; k < K; ++k)
        stride[at][k] = tensors[k].stride(d + tensors[k].dim() - shape.dim());
    }
    merge();
  }

  DAGCORE_INLINE int64_t inner() const { return size[dims - 1]; }
  DAGCORE_INLINE int64_t inner_stride(int k) const { return stride[dims - 1][k]; }
  DAGCORE_INLINE int64_t rows() const {
    int64_t rows = 1;
    for (int d = 0; d < dims - 1; ++d) rows *= size[d];
    return rows;
  }

  DAGCORE_INLINE int64_t count() const { return rows() * inner(); }

  // Where element `index` of image n lies in each tensor, in elements.
  DAGCORE_INLINE void locate(int64_t n, int64_t index, int64_t (&at)[K]) const {
    int64_t row = dims == 1 ? 0 : index / inner();
    const int64_t column = index - row * inner();
    for (int k = 0; k < K; ++k) at[k] = n * batch[k] + column * inner_stride(k);
    for (int d = dims - 2; d >= 0; --d) {
      const int64_t i = row % size[d];
      row /= size[d];
      for (int k = 0; k < K; ++k) at[k] += i * stride[d][k];
    }
  }

  // Whether the first `operands` tensors consist of packs: `pack` neighbours in memory, aligned if
  // the tensor is.
  bool in_packs(int64_t pack, int operands) const {
    bool whole = inner() % pack == 0;
    for (int k = 0; k < operands; ++k) {
      whole = whole && inner_stride(k) == 1 && batch[k] % pack == 0;
      for (int d = 0; d < dims - 1; ++d) whole = whole && stride[d][k] % pack == 0;
    }
    return whole;
  }

 private:
  void copy(int from, int to) {
    size[to] = size[from];
    for (int k = 0; k < K; ++k) stride[to][k] = stride[from][k];
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
      const int64_t merged = nested ? size[last] * size[d] : size[d];
      copy(d, nested ? last : ++last);
      size[last] = merged;
    }
    dims = last + 1;
  }
};

}  // namespace dagcore
