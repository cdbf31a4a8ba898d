// The device-independent part of dag_seed_bilinear: checks, and the score maps.
#pragma once

#include "bilinear.h"
#include "score_maps.h"
#include "seed.h"

namespace dagcore {

// scores (N, C, h, w), labels and adversarial (N, H, W)
struct BilinearSeedCall : SeedCall {
  bool align_corners;

  BilinearSeedCall(const Tensor& scores, const Tensor& labels,
                   const std::optional<Tensor>& adversarial, const std::string& objective,
                   int64_t ignore_index, double margin, bool align_corners)
      : SeedCall(checked_score_maps(scores), labels, adversarial, objective, ignore_index, margin),
        align_corners(align_corners) {
    check_map("labels", labels, labels, scores);
    if (adversarial) check_map("adversarial_labels", *adversarial, labels, scores);
  }

  ScoreMaps maps() const { return {scores, labels.size(1), labels.size(2), align_corners}; }
};

}  // namespace dagcore
