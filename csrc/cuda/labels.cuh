// Labels of any integer type, and the counting of active targets.
#pragma once

#include "../checks.h"

namespace dagcore {

enum class LabelType : int { kByte, kInt, kLong };

// (N, *T) uint8, int32 or int64; the offset of a target within its image is the caller's.
struct Labels {
  const void* data;
  LabelType type;
  int64_t batch_stride;

  explicit Labels(const Tensor& labels)
      : data(labels.data_ptr()),
        type(labels.scalar_type() == ScalarType::Byte  ? LabelType::kByte
             : labels.scalar_type() == ScalarType::Int ? LabelType::kInt
                                                       : LabelType::kLong),
        batch_stride(labels.stride(0)) {}

  __device__ int64_t at(int64_t n, int64_t offset) const {
    const int64_t i = n * batch_stride + offset;
    if (type == LabelType::kByte) return static_cast<const uint8_t*>(data)[i];
    if (type == LabelType::kInt) return static_cast<const int32_t*>(data)[i];
    return static_cast<const int64_t*>(data)[i];
  }
};

// The raw labels of a target, as class indices.
struct TargetLabels {
  int32_t label, adversarial;  // adversarial: kUncounted where the runner-up is asked for

  __device__ bool bad() const { return is_out_of_range(label, adversarial); }
};

__device__ inline TargetLabels read_labels(const Labels& labels, const Labels& adversarial,
                                           bool runner_up, LabelRule rule, int64_t n,
                                           int64_t label_at, int64_t adversarial_at) {
  const int64_t label = read_label(labels.at(n, label_at), rule);
  const int64_t other =
      runner_up ? kUncounted : read_adversarial(adversarial.at(n, adversarial_at), rule);
  return {static_cast<int32_t>(label), static_cast<int32_t>(other)};
}

// Adds a warp's count to its image's: integers, so the order does not matter. All lanes call.
__device__ inline void add_active(uint32_t* active, uint32_t sum, bool bad) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  bad = __any_sync(~0u, bad);
  if (threadIdx.x % 32 != 0) return;
  if (bad) atomicOr(active, kOutOfRangeFlag);
  if (sum) atomicAdd(active, sum);
}

}  // namespace dagcore
