// Shared by the seed ops on every device: labels of any integer type, checks, outputs, the choice
// of a kernel.
#pragma once

#include <optional>
#include <tuple>
#include <type_traits>

#include "checks.h"

namespace dagcore {

// uint8, int32 or int64 labels; the caller knows where a target's label lies.
struct LabelSource {
  const void* data;
  ScalarType type;

  explicit LabelSource(const Tensor& labels)
      : data(labels.const_data_ptr()), type(labels.scalar_type()) {}

  DAGCORE_INLINE int64_t read(int64_t at) const {
    if (type == ScalarType::Byte) return static_cast<const uint8_t*>(data)[at];
    if (type == ScalarType::Int) return static_cast<const int32_t*>(data)[at];
    return static_cast<const int64_t*>(data)[at];
  }
};

inline void check_labels(const char* name, const Tensor& labels, const Tensor& scores) {
  check_same_device(name, labels, "scores", scores);
  const ScalarType type = labels.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Int || type == ScalarType::Long,
                  name, " must be uint8, int32 or int64");
}

// Checks scores (N, C, *T), which must have a class.
inline const Tensor& with_classes(const Tensor& scores) {
  STD_TORCH_CHECK(scores.dim() >= 2, "scores must have shape (N, C, *targets), got ",
                  shape(scores));
  STD_TORCH_CHECK(scores.size(1) >= 1, "scores must have at least one class, got ", shape(scores));
  return scores;
}

// Checks labels (N, *T) of scores (N, C, *T).
inline void check_target_shape(const char* name, const Tensor& labels, const Tensor& scores) {
  bool fits = labels.dim() == scores.dim() - 1;
  for (int64_t d = 0; fits && d < labels.dim(); ++d) {
    fits = labels.size(d) == scores.size(d == 0 ? 0 : d + 1);
  }
  STD_TORCH_CHECK(fits, name, " must have the shape of scores ", shape(scores),
                  " without its class dimension, got ", shape(labels));
}

// What a kernel needs to judge targets and to count the active ones.
struct Targets {
  LabelSource labels, adversarial;
  LabelRule rule;
  Objective objective;
  bool runner_up;    // instead of adversarial labels
  double margin;     // a target is active until it is won by this much
  uint32_t* active;  // (N,)

  // Whether the score of each target's own label must be looked up.
  DAGCORE_INLINE bool measures_label() const { return margin > 0 && objective == Objective::leave; }
};

// scores (N, C, *), which must have these dimensions and a class; labels and adversarial (N, *T),
// whose shapes the op checks
struct SeedCall {
  Tensor scores, labels;
  Tensor adversarial;  // labels for the runner-up, not read as adversarial ones
  bool runner_up;
  Objective objective;
  LabelRule rule;
  double margin;
  Tensor seed;    // laid out like scores
  Tensor active;  // (N,) int32, zero at first

  SeedCall(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& adversarial,
           const std::string& objective, int64_t ignore_index, double margin)
      : scores(scores),
        labels(labels),
        adversarial(adversarial ? *adversarial : labels),
        runner_up(!adversarial),
        objective(value_named<Objective>("objective", objective, kObjectives)),
        rule{scores.size(1), ignore_index},
        margin(margin),
        seed(torch::stable::empty_like(scores)),
        active(torch::stable::new_zeros(scores, {scores.size(0)}, ScalarType::Int)) {
    check_class_count(scores);
    check_labels("labels", labels, scores);
    if (adversarial) check_labels("adversarial_labels", *adversarial, scores);
    STD_TORCH_CHECK(adversarial || this->objective != Objective::reach,
                    "adversarial_labels must be given for the objective reach");
    STD_TORCH_CHECK(margin >= 0 && margin - margin == 0,
                    "margin must be a finite number, at least 0, got ", margin);
  }

  Targets targets() const {
    return {LabelSource(labels),
            LabelSource(adversarial),
            rule,
            objective,
            runner_up,
            margin,
            static_cast<uint32_t*>(active.mutable_data_ptr())};
  }

  // Calls kernel(T{}, a constant that says whether to find the second class) if there are targets.
  template <typename Kernel>
  std::tuple<Tensor, Tensor> run(const Kernel& kernel) {
    if (labels.numel() == 0) return {torch::stable::zero_(seed), active};
    const bool second = runner_up || (objective == Objective::reach && margin > 0);
    for_float_type("scores", scores.scalar_type(), [&](auto type) {
      second ? kernel(type, std::true_type{}) : kernel(type, std::false_type{});
    });
    return {seed, active};
  }
};

}  // namespace dagcore
