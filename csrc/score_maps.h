// Low-resolution scores and the size of the enlarged map: the input of every bilinear op.
#pragma once

#include "checks.h"

namespace dagcore {

inline const Tensor& checked_score_maps(const Tensor& scores) {
  STD_TORCH_CHECK(
      scores.dim() == 4 && scores.size(1) >= 1 && scores.size(2) >= 1 && scores.size(3) >= 1,
      "scores must have shape (N, C, h, w) with at least one class and pixel, got ", shape(scores));
  check_class_count(scores);
  return scores;
}

// Checks a map of labels, or another one of the same size.
inline void check_map(const char* name, const Tensor& given, const Tensor& labels,
                      const Tensor& scores) {
  STD_TORCH_CHECK(
      given.dim() == 3 && given.size(0) == scores.size(0) && given.sizes() == labels.sizes(), name,
      " must have shape (", scores.size(0), ", H, W), got ", shape(given));
}

struct ScoreMaps {
  const void* data;
  int64_t batch_stride, class_stride, row_stride, column_stride;
  int64_t images, classes, height, width;
  int64_t out_height, out_width;
  bool align_corners;

  ScoreMaps(const Tensor& scores,  // (N, C, h, w)
            int64_t out_height, int64_t out_width, bool align_corners)
      : data(checked_score_maps(scores).const_data_ptr()),
        batch_stride(scores.stride(0)),
        class_stride(scores.stride(1)),
        row_stride(scores.stride(2)),
        column_stride(scores.stride(3)),
        images(scores.size(0)),
        classes(scores.size(1)),
        height(scores.size(2)),
        width(scores.size(3)),
        out_height(out_height),
        out_width(out_width),
        align_corners(align_corners) {
    STD_TORCH_CHECK(out_height >= 0 && out_width >= 0, "size must not be negative, got (",
                    out_height, ", ", out_width, ")");
  }
};

}  // namespace dagcore
