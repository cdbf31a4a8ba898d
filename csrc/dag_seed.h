// The part of dag_seed that is the same on every device: checks, outputs, how to walk the targets.
#pragma once

#include "checks.h"
#include "strided.h"

namespace dagcore {

enum SeedOperand { kScores, kSeed, kLabels, kAdversarial, kSeedOperands };

// scores (N, C, *T), labels and adversarial (N, *T); the walk is over the targets of one image.
struct SeedCall {
  Tensor scores, labels;
  Tensor adversarial;  // where the runner-up is asked for: labels, not read as adversarial ones
  bool runner_up;
  Objective objective;
  LabelRule rule;
  Tensor seed;    // laid out like scores
  Tensor active;  // (N,) int32, zero so far
  Walk<kSeedOperands> walk;

  SeedCall(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& adversarial,
           Objective objective, int64_t ignore_index)
      : scores(scores),
        labels(labels),
        adversarial(adversarial ? *adversarial : labels),
        runner_up(!adversarial),
        objective(objective) {
    check_seed_arguments(scores, labels, adversarial, objective);
    rule = {scores.size(1), ignore_index};
    seed = torch::stable::empty_like(scores);
    active = torch::stable::new_zeros(scores, {scores.size(0)}, ScalarType::Int);
    for (int64_t d = 2; d < scores.dim(); ++d) {
      walk.add(scores.size(d), {scores.stride(d), seed.stride(d), labels.stride(d - 1),
                                this->adversarial.stride(d - 1)});
    }
    walk.merge();
  }
};

}  // namespace dagcore
