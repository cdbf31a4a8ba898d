// The part of argmax_bilinear that is the same on every device: checks and output.
#pragma once

#include "bilinear.h"
#include "score_maps.h"

namespace dagcore {

// scores (N, C, h, w)
struct ArgmaxCall {
  Tensor scores;
  bool align_corners;
  Tensor labels;  // (N, height, width) int64, contiguous

  ArgmaxCall(const Tensor& scores, int64_t height, int64_t width, bool align_corners)
      : scores(scores), align_corners(align_corners) {
    check_score_maps(scores);
    STD_TORCH_CHECK(height >= 0 && width >= 0, "size must not be negative, got (", height, ", ",
                    width, ")");
    labels = torch::stable::new_empty(scores, {scores.size(0), height, width}, ScalarType::Long);
  }

  ScoreMaps maps() const { return {scores, labels.size(1), labels.size(2), align_corners}; }
};

}  // namespace dagcore
