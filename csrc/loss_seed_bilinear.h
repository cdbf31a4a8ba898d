// The part of loss_seed_bilinear that is the same on every device: checks, and what a tile's pixel
// adds to the seed.
#pragma once

#include "bilinear.h"
#include "loss_seed.h"
#include "score_maps.h"

namespace dagcore {

// scores (N, C, h, w), labels and adversarial (N, H, W)
struct BilinearLossCall : LossCall {
  bool align_corners;

  template <typename... Arguments>
  BilinearLossCall(bool align_corners, const Tensor& scores, const Arguments&... arguments)
      : LossCall(checked_score_maps(scores), arguments...), align_corners(align_corners) {
    check_map("labels", labels, labels, scores);
    check_map("adversarial_labels", adversarial, labels, scores);
  }

  ScoreMaps maps() const { return {scores, labels.size(1), labels.size(2), align_corners}; }
};

// A gradient that is so large that its products and sums may not be finite is cut: to a thousandth
// of the largest number, which the many pixels of a tile or a patch can reach.
template <typename Real>
DAGCORE_INLINE Real summable(Real gradient) {
  constexpr Real kMost = std::numeric_limits<Real>::max() / 1024;
  return clip(gradient, -kMost, kMost);
}

}  // namespace dagcore
