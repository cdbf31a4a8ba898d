// Low-resolution rows of scores, and which classes can win in the cells between two of them.
#pragma once

#include <limits>
#include <vector>

#include "../bilinear.h"
#include "../step.h"

namespace dagcore {

// Lanes of every sum, whatever the vector's width: the same bits on every processor. As many floats
// as AVX-512 has.
constexpr int kLanes = 16;

// One low-resolution row of every class, (C, padded): its scores, and of each score and its right
// neighbour the smaller and the larger; infinite where their sum is not finite, so that the class
// is never ruled out and rules none out.
template <typename Real>
struct ScoreRow {
  std::vector<Real> scores, least, most;
  ScoreRow(int64_t classes, int64_t padded)
      : scores(classes * padded + kLanes), least(classes * padded), most(classes * padded) {}
};

// `step` columns lie between neighbours; padded is a multiple of kLanes and above the width.
template <typename T>
DAGCORE_INLINE void read_row(const T* scores, int64_t class_stride, int64_t column_stride,
                             int64_t classes, int64_t width, int64_t padded, int64_t step,
                             ScoreRow<RealOf<T>>* row) {
  using Real = RealOf<T>;
  for (int64_t c = 0; c < classes; ++c) {
    const T* from = scores + c * class_stride;
    Real* to = row->scores.data() + c * padded;
    for (int64_t x = 0; x < width; ++x) to[x] = Pixel<T>::load(from[x * column_stride]);
    to[width] = to[width - 1];  // the last column is its own neighbour
  }
  const auto* from = row->scores.data();
  Real *least = row->least.data(), *most = row->most.data();
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  for (int64_t i = 0; i < classes * padded; ++i) {
    const Real a = from[i], b = from[i + step];
    const bool finite = (a + b) - (a + b) == 0;
    least[i] = finite ? (a < b ? a : b) : -kInfinity;
    most[i] = finite ? (a > b ? a : b) : kInfinity;
  }
}

// For each cell of a row: which classes can win (or come second, with kRunnerUp) in it.
// above, below: the rows of the cells' corners; floors (2, padded): scratch; keep (C, padded):
// result, bytes
template <typename Real, bool kRunnerUp>
DAGCORE_INLINE void prune(const ScoreRow<Real>& above, const ScoreRow<Real>& below, int64_t classes,
                          int64_t padded, Real* floors, uint8_t* keep) {
  constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
  Real* best = floors;
  Real* second = floors + padded;
  for (int64_t x = 0; x < padded; ++x) best[x] = second[x] = -kInfinity;
  for (int64_t c = 0; c < classes; ++c) {
    const Real *a = above.least.data() + c * padded, *b = below.least.data() + c * padded;
    for (int64_t block = 0; block < padded; block += kLanes) {
      for (int64_t x = block; x < block + kLanes; ++x) {
        const Real floor = a[x] < b[x] ? a[x] : b[x];
        if (kRunnerUp) {
          const Real lower = best[x] < floor ? best[x] : floor;
          second[x] = second[x] > lower ? second[x] : lower;
        }
        best[x] = best[x] > floor ? best[x] : floor;
      }
    }
  }
  const Real* bar = kRunnerUp ? second : best;
  for (int64_t c = 0; c < classes; ++c) {
    const Real *a = above.most.data() + c * padded, *b = below.most.data() + c * padded;
    uint8_t* k = keep + c * padded;
    for (int64_t block = 0; block < padded; block += kLanes) {
      for (int64_t x = block; x < block + kLanes; ++x) {
        k[x] = !dominated(a[x] > b[x] ? a[x] : b[x], bar[x]);
      }
    }
  }
}

}  // namespace dagcore
