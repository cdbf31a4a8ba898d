// Segments of an axis, and tiles: a tile is the part of a cell that two segments span and that is
// worked on at once, with its weights, winners and verdicts.
#pragma once

#include <algorithm>
#include <vector>

#include "../bilinear.h"
#include "simd.h"
#include "targets.h"

namespace dagcore {

// Number of lanes of every sum, at any vector width, so that every processor gives the same bits.
// AVX-512 holds as many floats.
constexpr int kLanes = 16;
// Loops over lanes have "unroll 1": gcc would otherwise unroll them first, and then not vectorise.

// Maximum side of a tile, in pixels. A tile of 32 x 32 pixels stays in the first-level cache, and
// the usual enlargements, by 4, 8, 16 and 32, make tiles that are whole cells.
constexpr int kSide = 32;

// Neighbouring pixels of one axis that read the same two low-resolution neighbours.
struct Segment {
  int64_t low, high;     // low-resolution indices
  int64_t begin;         // first pixel
  int count;             // at most `most`, see segments
  int weights;           // segments of equal weights share this number
  double weight[kSide];  // of `high`
};

inline std::vector<Segment> segments(int64_t from, int64_t to, bool align_corners,
                                     int most = kSide) {
  std::vector<Segment> all;
  for (int64_t pixel = 0; pixel < to; ++pixel) {
    const Source source = source_of(pixel, from, to, align_corners);
    if (all.empty() || all.back().low != source.low || all.back().count == most) {
      all.push_back({source.low, source.high, pixel, 0, 0, {}});
    }
    Segment& last = all.back();
    last.weight[last.count++] = source.weight;
  }
  for (size_t i = 0; i < all.size(); ++i) {
    Segment& segment = all[i];
    segment.weights = static_cast<int>(i);
    for (size_t j = i; j-- > 0 && i - j <= 4;) {  // with integer factors weights repeat at once
      if (all[j].count == segment.count &&
          std::equal(segment.weight, segment.weight + segment.count, all[j].weight)) {
        segment.weights = all[j].weights;
        break;
      }
    }
  }
  return all;
}

static_assert(kSide * kSide == kTargets, "a tile is one row of targets");

// The weights of a tile's pixels at the four corners: pixels are lanes of these arrays, row after
// row, padded to whole vectors with weight 0.
template <typename Real>
struct alignas(64) TileWeights {
  Real corner[4][kRoom];
  Real total[4];  // over all pixels, computed on demand
  bool has_total = false;
  int count = 0, padded = 0;
  int y_weights = -1, x_weights = -1;  // the segments they belong to
};

template <typename Real>
struct Tile : TargetRow<Real, IndexOf<Real>> {
  TileWeights<Real>* weights;
};

// Sums in lanes, added up in an order that does not depend on the vector width.
template <typename Value>
struct Lanes {
  Value lane[kLanes] = {};
};

// Four to sixteen values as vectors: the compiler by itself generates poor code for sums across
// lanes.
template <typename Value>
using Quad __attribute__((vector_size(4 * sizeof(Value)))) = Value;
template <typename Value>
using Oct __attribute__((vector_size(8 * sizeof(Value)))) = Value;
template <typename Value>
using Hex __attribute__((vector_size(16 * sizeof(Value)))) = Value;
static_assert(kLanes == 16, "all lanes are two vectors of eight or one of sixteen");

// Picks lanes by their numbers: first those of a, then those of b.
template <typename Index, int... kFrom, typename Vector>
DAGCORE_INLINE void pick(const Vector& a, const Vector& b, Vector* out) {
#if defined(__clang__)
  *out = __builtin_shufflevector(a, b, kFrom...);
#else
  *out = __builtin_shuffle(a, b, Index{kFrom...});
#endif
}

template <typename Value>
DAGCORE_INLINE void fold(const Lanes<Value>& sum, Oct<Value>* out) {
  Oct<Value> half[2];
  __builtin_memcpy(half, sum.lane, sizeof(half));
  *out = half[0] + half[1];
}
// Folds two sums, the second result after the first.
template <typename Value>
DAGCORE_INLINE void fold_two(const Hex<Value>& one, const Hex<Value>& two, Hex<Value>* out) {
  using Index = Hex<IndexOf<Value>>;
  Hex<Value> low, high;
  pick<Index, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(one, two, &low);
  pick<Index, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(one, two, &high);
  *out = low + high;
}

// Fills each four lanes with a0 + a2, b0 + b2, a1 + a3, b1 + b3.
template <typename Value>
DAGCORE_INLINE void zip(const Oct<Value>& a, const Oct<Value>& b, Oct<Value>* out) {
  using Index = Oct<IndexOf<Value>>;
  Oct<Value> low, high;
  pick<Index, 0, 8, 1, 9, 4, 12, 5, 13>(a, b, &low);
  pick<Index, 2, 10, 3, 11, 6, 14, 7, 15>(a, b, &high);
  *out = low + high;
}
template <typename Value>
DAGCORE_INLINE void zip_two(const Hex<Value>& a, const Hex<Value>& b, Hex<Value>* out) {
  using Index = Hex<IndexOf<Value>>;
  Hex<Value> low, high;
  pick<Index, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29>(a, b, &low);
  pick<Index, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31>(a, b, &high);
  *out = low + high;
}

template <typename Value>
DAGCORE_INLINE void add_lanes(const Lanes<Value>& a, const Lanes<Value>& b, const Lanes<Value>& c,
                              const Lanes<Value>& d, Value (&total)[4]) {
  Oct<Value> oa, ob, oc, od, ac, bd, all;
  fold<Value>(a, &oa);
  fold<Value>(b, &ob);
  fold<Value>(c, &oc);
  fold<Value>(d, &od);
  zip<Value>(oa, oc, &ac);
  zip<Value>(ob, od, &bd);
  zip<Value>(ac, bd, &all);
  Quad<Value> half[2];
  __builtin_memcpy(half, &all, sizeof(half));
  half[0] += half[1];
  __builtin_memcpy(total, half, sizeof(total));
}

// For one vector of pixels with two values each: weighs the values by the four corners and sums
// them, to the same bits.
template <typename Value>
DAGCORE_INLINE void add_lanes(const Value (&one)[kLanes], const Value (&two)[kLanes],
                              const Value* weights, int64_t pitch, Value (&total)[2][4]) {
  Hex<Value> first, second, sum[4], ac, bd, all;
  __builtin_memcpy(&first, one, sizeof(first));
  __builtin_memcpy(&second, two, sizeof(second));
  for (int k = 0; k < 4; ++k) {
    Hex<Value> weight;
    __builtin_memcpy(&weight, weights + k * pitch, sizeof(weight));
    fold_two<Value>(weight * first, weight * second, &sum[k]);
  }
  zip_two<Value>(sum[0], sum[2], &ac);
  zip_two<Value>(sum[1], sum[3], &bd);
  zip_two<Value>(ac, bd, &all);
  Quad<Value> part[4];
  __builtin_memcpy(part, &all, sizeof(part));
  part[0] += part[1];
  part[2] += part[3];
  __builtin_memcpy(total[0], &part[0], sizeof(total[0]));
  __builtin_memcpy(total[1], &part[2], sizeof(total[1]));
}

// The weights of a tile's pixels at its four corners, in arrays that lie `pitch` apart. Rows of
// pixels are written in whole vectors, each over the end of the one before, then a vector of zeros.
template <typename Real>
DAGCORE_INLINE void fill_corners(const Segment& y, const Segment& x, int64_t pitch, Real* row) {
  constexpr int kDoubles = 8;  // in the widest vector: weights are multiplied in double precision
  for (int i = 0; i < y.count; ++i, row += x.count) {
    const double v = y.weight[i];
    for (int j = 0; j < x.count; j += kDoubles) {
      Real* to = row + j;
      const double* u = x.weight + j;
#pragma GCC unroll 1
      for (int l = 0; l < kDoubles; ++l) {
        Real of_pixel[4];
        corner_weights(v, u[l], of_pixel);
        to[l] = of_pixel[0];
        to[l + pitch] = of_pixel[1];
        to[l + 2 * pitch] = of_pixel[2];
        to[l + 3 * pitch] = of_pixel[3];
      }
    }
  }
  for (int k = 0; k < 4; ++k) {
    for (int l = 0; l < kLanes; ++l) row[k * pitch + l] = 0;
  }
}

template <typename Real>
DAGCORE_INLINE void fill_weights(const Segment& y, const Segment& x, TileWeights<Real>* weights) {
  fill_corners(y, x, kRoom, weights->corner[0]);
  weights->count = y.count * x.count;
  weights->padded = (weights->count + kLanes - 1) / kLanes * kLanes;
  weights->y_weights = y.weights;
  weights->x_weights = x.weights;
  weights->has_total = false;
}

template <typename Real>
DAGCORE_INLINE void fill_total(TileWeights<Real>* weights) {
  Lanes<Real> s0, s1, s2, s3;
  const Real* from = weights->corner[0];
  for (int p = 0; p < weights->padded; p += kLanes, from += kLanes) {
#pragma GCC unroll 1
    for (int j = 0; j < kLanes; ++j) {
      s0.lane[j] += from[j];
      s1.lane[j] += from[j + kRoom];
      s2.lane[j] += from[j + 2 * kRoom];
      s3.lane[j] += from[j + 3 * kRoom];
    }
  }
  add_lanes(s0, s1, s2, s3, weights->total);
  weights->has_total = true;
}

// A class that may win in a cell, and its scores at the four corners.
template <typename Real>
struct Candidate {
  Real corner[4];
  IndexOf<Real> c;
};

// The winner at every pixel of a tile among a cell's candidates, in rising class order. Works on a
// vector of pixels at a time, so that their weights and winners stay in registers.
template <typename Real, bool kSecond>
DAGCORE_INLINE void find_winners(const Candidate<Real>* candidates, int count, Tile<Real>* tile) {
  using Index = IndexOf<Real>;
  const auto& corner = tile->weights->corner;
  for (int p = 0; p < tile->weights->padded; p += kLanes) {
    Real w0[kLanes], w1[kLanes], w2[kLanes], w3[kLanes], best[kLanes], second[kLanes];
    Index best_class[kLanes], second_class[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      w0[j] = corner[0][p + j];
      w1[j] = corner[1][p + j];
      w2[j] = corner[2][p + j];
      w3[j] = corner[3][p + j];
      best[j] = second[j] = blend({w0[j], w1[j], w2[j], w3[j]}, candidates[0].corner);
      best_class[j] = candidates[0].c;
      second_class[j] = kUncounted;
    }
    for (int k = 1; k < count; ++k) {
      const Candidate<Real> q = candidates[k];
      for (int j = 0; j < kLanes; ++j) {
        Top<Real, Index, kSecond> top{best[j], second[j], best_class[j], second_class[j]};
        top.next(blend({w0[j], w1[j], w2[j], w3[j]}, q.corner), q.c);
        best[j] = top.best;
        best_class[j] = top.best_class;
        if (kSecond) {
          second[j] = top.second;
          second_class[j] = top.second_class;
        }
      }
    }
    for (int j = 0; j < kLanes; ++j) {
      tile->best[p + j] = best[j];
      tile->best_class[p + j] = best_class[j];
      if (kSecond) {
        tile->second[p + j] = second[j];
        tile->second_class[p + j] = second_class[j];
      }
    }
  }
}

// The score of one class, the label of all pixels, at every pixel of a tile.
template <typename Real>
DAGCORE_INLINE void fill_own(const Candidate<Real>& q, Tile<Real>* tile) {
  const auto& corner = tile->weights->corner;
  for (int p = 0; p < tile->weights->padded; ++p) {
    tile->own[p] = blend({corner[0][p], corner[1][p], corner[2][p], corner[3][p]}, q.corner);
  }
}

// The score of each pixel's label. `above` and `below` are rows of scores, (C, padded), from the
// cell's left corners on; `right` is the step to its right corners.
template <typename Real>
DAGCORE_INLINE void gather_own(const Real* above, const Real* below, int64_t padded, int64_t right,
                               Tile<Real>* tile) {
  const auto& corner = tile->weights->corner;
  for (int p = 0; p < tile->weights->padded; ++p) {
    const int64_t at = (tile->label[p] < 0 ? 0 : tile->label[p]) * padded;
    tile->own[p] = blend({corner[0][p], corner[1][p], corner[2][p], corner[3][p]},
                         {above[at], above[at + right], below[at], below[at + right]});
  }
}

// One candidate, all corners finite: it wins everywhere, and there is nothing to evaluate.
template <typename Real>
DAGCORE_INLINE void fill_winner(IndexOf<Real> c, Tile<Real>* tile) {
  for (int p = 0; p < tile->weights->padded; ++p) {
    tile->best[p] = 0;
    tile->best_class[p] = c;
  }
}

}  // namespace dagcore
