// Rows of labels as class indices, and the counting of active targets.
#pragma once

#include "../seed.h"

namespace dagcore {

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

// Adds to an image's count: integers, so the order of the threads does not matter.
inline void add_active(uint32_t* active, uint32_t sum) {
  if (sum & kOutOfRangeFlag) __atomic_fetch_or(active, kOutOfRangeFlag, __ATOMIC_RELAXED);
  __atomic_fetch_add(active, sum & ~kOutOfRangeFlag, __ATOMIC_RELAXED);
}

}  // namespace dagcore
