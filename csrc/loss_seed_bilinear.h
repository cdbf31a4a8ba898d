// The device-independent part of loss_seed_bilinear: checks, and the clipping of gradients.
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

// Clips a part of a pixel's gradient, so that weighted sums of such parts stay finite.
template <typename Real>
DAGCORE_INLINE Real summable(Real part) {
  constexpr Real kMost = std::numeric_limits<Real>::max() / (1 << 16);
  return clip(part, -kMost, kMost);
}

}  // namespace dagcore
