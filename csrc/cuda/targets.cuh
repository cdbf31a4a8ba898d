// The verdict of a target, and the counting of active targets.
#pragma once

#include "../seed.h"

namespace dagcore {

// What a thread has counted over its targets, all in one image.
struct Count {
  uint32_t active = 0;
  bool bad = false;  // a label is out of range

  // Adds a warp's counts to those of the image: integers, so the order does not matter. All lanes
  // must call this.
  __device__ void add_to(uint32_t* image) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      active += __shfl_down_sync(~0u, active, offset);
    }
    bad = __any_sync(~0u, bad);
    if (threadIdx.x % 32 != 0) return;
    if (bad) atomicOr(image, kOutOfRangeFlag);
    if (active) atomicAdd(image, active);
  }
};

// `label_at` and `adversarial_at` are the positions of the target's labels; own(c) is its score of
// class c.
template <typename T, bool kSecond, typename Own>
__device__ Verdict<int32_t> judge_target(const Targets& targets, int64_t label_at,
                                         int64_t adversarial_at,
                                         const Top<T, int32_t, kSecond>& top, const Own& own,
                                         Count* count) {
  const LabelRule rule = targets.rule;
  const int32_t label = static_cast<int32_t>(read_label(targets.labels.read(label_at), rule));
  const int32_t adversarial =
      kSecond && targets.runner_up
          ? top.runner_up(label)
          : static_cast<int32_t>(read_adversarial(targets.adversarial.read(adversarial_at), rule));
  bool near = false;
  if (targets.margin > 0) {
    const bool reach = kSecond && targets.objective == Objective::reach;
    if (reach || label >= 0) {
      const RealOf<T> rival = value_of<T>(reach ? top.second : Score<T>::key(own(label)));
      near = value_of<T>(top.best) - rival < static_cast<RealOf<T>>(targets.margin);
    }
  }
  const Verdict<int32_t> verdict =
      judge<int32_t>(targets.objective, label, adversarial, top.best_class,
                     Score<T>::is_nan(top.best), near, top.second_class);
  count->active += verdict.plus >= 0;
  count->bad |= is_out_of_range(label, adversarial);
  return verdict;
}

}  // namespace dagcore
