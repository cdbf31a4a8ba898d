// The device-independent part of dag_seed: checks, and the walk over the targets.
#pragma once

#include "seed.h"
#include "strided.h"

namespace dagcore {

enum SeedOperand { kScores, kSeed, kLabels, kAdversarial, kSeedOperands };

// Arguments of the kernels; the walk covers the targets of one image.
struct SeedArgs : Targets {
  const void* scores;
  void* seed;
  int64_t scores_class, seed_class;  // strides
  Walk<kSeedOperands> walk;
};

// scores (N, C, *T), labels and adversarial (N, *T)
struct TargetSeedCall : SeedCall {
  TargetSeedCall(const Tensor& scores, const Tensor& labels,
                 const std::optional<Tensor>& adversarial, const std::string& objective,
                 int64_t ignore_index, double margin)
      : SeedCall(with_classes(scores), labels, adversarial, objective, ignore_index, margin) {
    check_target_shape("labels", this->labels, this->scores);
    if (adversarial) check_target_shape("adversarial_labels", *adversarial, this->scores);
  }

  SeedArgs args() const {
    return {targets(),
            scores.const_data_ptr(),
            seed.mutable_data_ptr(),
            scores.stride(1),
            seed.stride(1),
            Walk<kSeedOperands>({scores, seed, labels, adversarial})};
  }
};

}  // namespace dagcore
