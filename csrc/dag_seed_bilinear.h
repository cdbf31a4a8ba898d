// The part of dag_seed_bilinear that is the same on every device: checks and outputs.
#pragma once

#include "bilinear.h"
#include "score_maps.h"

namespace dagcore {

// scores (N, C, h, w), labels and adversarial (N, H, W)
struct BilinearSeedCall {
  Tensor scores, labels;
  Tensor adversarial;  // where the runner-up is asked for: labels, not read as adversarial ones
  bool runner_up, align_corners;
  Objective objective;
  LabelRule rule;
  Tensor seed;    // laid out like scores
  Tensor active;  // (N,) int32, zero so far

  BilinearSeedCall(const Tensor& scores, const Tensor& labels,
                   const std::optional<Tensor>& adversarial, Objective objective,
                   int64_t ignore_index, bool align_corners)
      : scores(scores),
        labels(labels),
        adversarial(adversarial ? *adversarial : labels),
        runner_up(!adversarial),
        align_corners(align_corners),
        objective(objective) {
    check_score_maps(scores);
    check_label_maps("labels", labels, scores, labels);
    if (adversarial) check_label_maps("adversarial_labels", *adversarial, scores, labels);
    check_adversarial_given(adversarial, objective);
    rule = {scores.size(1), ignore_index};
    seed = torch::stable::empty_like(scores);
    active = torch::stable::new_zeros(scores, {scores.size(0)}, ScalarType::Int);
  }

  ScoreMaps maps() const { return {scores, labels.size(1), labels.size(2), align_corners}; }

  static void check_label_maps(const char* name, const Tensor& maps, const Tensor& scores,
                               const Tensor& labels) {
    check_same_device(name, maps, "scores", scores);
    STD_TORCH_CHECK(is_label_type(maps.scalar_type()), name, " must be uint8, int32 or int64");
    STD_TORCH_CHECK(maps.dim() == 3 && maps.size(0) == scores.size(0) &&
                        maps.size(1) == labels.size(1) && maps.size(2) == labels.size(2),
                    name, " must have shape (", scores.size(0), ", H, W), got ", shape(maps));
  }
};

}  // namespace dagcore
