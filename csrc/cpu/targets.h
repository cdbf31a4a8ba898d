// Targets in a row: their labels as class indices, their verdicts, the counting of active ones.
#pragma once

#include "../seed.h"

namespace dagcore {

// Targets that are worked on at once, at most: they stay in the first-level cache.
constexpr int kTargets = 1024;
// Elements of their arrays. Arrays of exactly kTargets floats lie 4096 bytes apart, and then the
// same element of each falls into one set of the first-level cache.
constexpr int kRoom = kTargets + 32;

// Their winners, labels and verdicts, as arrays so that targets are the vector's lanes.
template <typename T, typename Index>
struct alignas(64) TargetRow {
  typename Score<T>::Key best[kRoom], second[kRoom];
  Index best_class[kRoom], second_class[kRoom];
  Index label[kRoom], adversarial[kRoom], plus[kRoom], minus[kRoom];
};

template <typename Raw, bool kIsAdversarial, typename Index>
DAGCORE_INLINE void read_labels_as(const Raw* labels, int64_t stride, int count, LabelRule rule,
                                   Index* out) {
  for (int i = 0; i < count; ++i) {
    const int64_t label = static_cast<int64_t>(labels[i * stride]);
    out[i] = static_cast<Index>(kIsAdversarial ? read_adversarial(label, rule)
                                               : read_label(label, rule));
  }
}

// `count` labels from `at` on, `stride` apart, through read_label or read_adversarial.
template <typename Index, bool kIsAdversarial>
DAGCORE_INLINE void read_labels(const LabelSource& labels, int64_t at, int64_t stride, int count,
                                LabelRule rule, Index* out) {
  if (labels.type == ScalarType::Byte) {
    const uint8_t* from = static_cast<const uint8_t*>(labels.data) + at;
    read_labels_as<uint8_t, kIsAdversarial>(from, stride, count, rule, out);
  } else if (labels.type == ScalarType::Int) {
    const int32_t* from = static_cast<const int32_t*>(labels.data) + at;
    read_labels_as<int32_t, kIsAdversarial>(from, stride, count, rule, out);
  } else {
    const int64_t* from = static_cast<const int64_t*>(labels.data) + at;
    read_labels_as<int64_t, kIsAdversarial>(from, stride, count, rule, out);
  }
}

// Verdicts of the first `count` targets; the number of active ones, flagged if a label is out of
// range. With kRunnerUp the runners-up become the adversarial labels.
template <typename T, typename Index, bool kRunnerUp>
DAGCORE_INLINE void judge_row(Objective objective, int count, TargetRow<T, Index>* row,
                              uint32_t* active) {
  uint32_t sum = 0, bad = 0;
  for (int i = 0; i < count; ++i) {
    const Index label = row->label[i], best_class = row->best_class[i];
    if (kRunnerUp) row->adversarial[i] = best_class == label ? row->second_class[i] : best_class;
    const Index adversarial = row->adversarial[i];
    const Verdict<Index> verdict =
        judge(objective, label, adversarial, best_class, Score<T>::is_nan(row->best[i]));
    row->plus[i] = verdict.plus;
    row->minus[i] = verdict.minus;
    sum += verdict.plus >= 0;
    bad |= is_out_of_range(label, adversarial);
  }
  *active = sum | (bad ? kOutOfRangeFlag : 0);
}

// Adds to an image's count: integers, so the order of the threads does not matter.
inline void add_active(uint32_t* active, uint32_t sum) {
  if (sum & kOutOfRangeFlag) __atomic_fetch_or(active, kOutOfRangeFlag, __ATOMIC_RELAXED);
  __atomic_fetch_add(active, sum & ~kOutOfRangeFlag, __ATOMIC_RELAXED);
}

}  // namespace dagcore
