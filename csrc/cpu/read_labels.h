// Rows of labels of any integer type, as class indices.
#pragma once

#include "../labels.h"

namespace dagcore {

// `count` labels in a row, `stride` apart, through read_label or read_adversarial.
template <typename Index, bool kIsAdversarial>
struct ReadLabels {
  template <typename Raw>
  DAGCORE_INLINE static void read(const void* data, int64_t stride, int count, LabelRule rule,
                                  Index* out) {
    const Raw* raw = static_cast<const Raw*>(data);
    for (int i = 0; i < count; ++i) {
      const int64_t label = static_cast<int64_t>(raw[i * stride]);
      out[i] = static_cast<Index>(kIsAdversarial ? read_adversarial(label, rule)
                                                 : read_label(label, rule));
    }
  }
  DAGCORE_INLINE static void run(const void* data, ScalarType type, int64_t stride, int count,
                                 LabelRule rule, Index* out) {
    switch (type) {
      case ScalarType::Byte:
        return read<uint8_t>(data, stride, count, rule, out);
      case ScalarType::Int:
        return read<int32_t>(data, stride, count, rule, out);
      default:
        return read<int64_t>(data, stride, count, rule, out);
    }
  }
};

}  // namespace dagcore
