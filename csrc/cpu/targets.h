// Targets in a row: their labels as class indices, their verdicts, the counting of active ones.
#pragma once

#include "../seed.h"
#include "simd.h"

namespace dagcore {

// Maximum number of targets worked on at once: they stay in the first-level cache.
constexpr int kTargets = 1024;
// Elements of their arrays. Arrays of exactly kTargets floats lie 4096 bytes apart, and then the
// same element of each falls into one set of the first-level cache.
constexpr int kRoom = kTargets + 32;

// Their winners, labels and verdicts, as arrays so that targets are the vector's lanes.
template <typename T, typename Index>
struct alignas(64) TargetRow {
  typename Score<T>::Key best[kRoom], second[kRoom];
  typename Score<T>::Key own[kRoom];  // of the label, where a margin is measured from it
  Index best_class[kRoom], second_class[kRoom];
  Index label[kRoom], adversarial[kRoom], near[kRoom], plus[kRoom], minus[kRoom];
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

// Which targets are near: less than the margin lies between their winner and their label, or with
// kSecond the second class.
template <typename T, typename Index, bool kSecond>
DAGCORE_INLINE void find_near(RealOf<T> margin, int count, TargetRow<T, Index>* row) {
  for (int i = 0; i < count; ++i) {
    const RealOf<T> rival = value_of<T>(kSecond ? row->second[i] : row->own[i]);
    row->near[i] = value_of<T>(row->best[i]) - rival < margin ? 1 : 0;
  }
}

// The strongest class other than the label, as the adversarial label.
template <typename T, typename Index>
DAGCORE_INLINE void take_runner_up(int count, TargetRow<T, Index>* row) {
  for (int i = 0; i < count; ++i) {
    const Index best_class = row->best_class[i];
    row->adversarial[i] = best_class == row->label[i] ? row->second_class[i] : best_class;
  }
}

template <typename T, typename Index, bool kSecond, bool kMargin>
DAGCORE_INLINE void judge_row(Objective objective, int count, TargetRow<T, Index>* row,
                              uint32_t* active) {
  uint32_t sum = 0, bad = 0;
  for (int i = 0; i < count; ++i) {
    const Index label = row->label[i], adversarial = row->adversarial[i];
    const Index second_class = kSecond ? row->second_class[i] : static_cast<Index>(kUncounted);
    const bool near = kMargin && row->near[i] != 0;
    const Verdict<Index> verdict = judge(objective, label, adversarial, row->best_class[i],
                                         Score<T>::is_nan(row->best[i]), near, second_class);
    row->plus[i] = verdict.plus;
    row->minus[i] = verdict.minus;
    sum += verdict.plus >= 0;
    bad |= is_out_of_range(label, adversarial);
  }
  *active = sum | (bad ? kOutOfRangeFlag : 0);
}

// Judges the first `count` targets; returns the number of active ones, flagged if a label is out of
// range. If runners-up are asked for, they become the adversarial labels.
template <typename T, typename Index, bool kSecond>
uint32_t judge_targets(Simd simd, const Targets& targets, int count, TargetRow<T, Index>* row) {
  uint32_t active = 0;
  const Objective objective = targets.objective;
  if (targets.runner_up) run_simd<take_runner_up<T, Index>>(simd, count, row);
  if (targets.margin > 0) {
    const RealOf<T> margin = static_cast<RealOf<T>>(targets.margin);
    targets.measures_label() ? run_simd<find_near<T, Index, false>>(simd, margin, count, row)
                             : run_simd<find_near<T, Index, true>>(simd, margin, count, row);
    run_simd<judge_row<T, Index, kSecond, true>>(simd, objective, count, row, &active);
  } else {
    run_simd<judge_row<T, Index, kSecond, false>>(simd, objective, count, row, &active);
  }
  return active;
}

// Adds to an image's count: integers, so the order of the threads does not matter.
inline void add_active(uint32_t* active, uint32_t sum) {
  if (sum & kOutOfRangeFlag) __atomic_fetch_or(active, kOutOfRangeFlag, __ATOMIC_RELAXED);
  __atomic_fetch_add(active, sum & ~kOutOfRangeFlag, __ATOMIC_RELAXED);
}

}  // namespace dagcore
