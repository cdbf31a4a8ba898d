// The labels of a target, and the counting of active targets.
#pragma once

#include "../labels.h"

namespace dagcore {

// A target's labels, as class indices.
struct TargetLabels {
  int32_t label, adversarial;  // adversarial: kUncounted where the runner-up is asked for

  __device__ bool bad() const { return is_out_of_range(label, adversarial); }
};

__device__ inline TargetLabels read_labels(const LabelSource& labels,
                                           const LabelSource& adversarial, bool runner_up,
                                           LabelRule rule, int64_t n, int64_t label_at,
                                           int64_t adversarial_at) {
  const int64_t label = read_label(labels.read(n, label_at), rule);
  const int64_t other =
      runner_up ? kUncounted : read_adversarial(adversarial.read(n, adversarial_at), rule);
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
