// The part of dag_seed that is the same on every device: checks, and how to walk the targets.
#pragma once

#include "seed.h"
#include "strided.h"

namespace dagcore {

enum SeedOperand { kScores, kSeed, kLabels, kAdversarial, kSeedOperands };

// What the kernels work on; the walk is over the targets of one image.
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
    check_shape("labels", this->labels);
    if (adversarial) check_shape("adversarial_labels", *adversarial);
  }

  SeedArgs args() const {
    return {targets(),
            scores.const_data_ptr(),
            seed.mutable_data_ptr(),
            scores.stride(1),
            seed.stride(1),
            Walk<kSeedOperands>({scores, seed, labels, adversarial})};
  }

 private:
  static const Tensor& with_classes(const Tensor& scores) {
    STD_TORCH_CHECK(scores.dim() >= 2, "scores must have shape (N, C, *targets), got ",
                    shape(scores));
    STD_TORCH_CHECK(scores.size(1) >= 1, "scores must have at least one class, got ",
                    shape(scores));
    return scores;
  }
  void check_shape(const char* name, const Tensor& given) const {
    bool fits = given.dim() == scores.dim() - 1;
    for (int64_t d = 0; fits && d < given.dim(); ++d) {
      fits = given.size(d) == scores.size(d == 0 ? 0 : d + 1);
    }
    STD_TORCH_CHECK(fits, name, " must have the shape of scores ", shape(scores),
                    " without its class dimension, got ", shape(given));
  }
};

}  // namespace dagcore
