// The segments of an axis, and a tile, the part of a cell's pixels that two of them span and that
// is worked on at once: weights, winners and verdicts.
#pragma once

#include "bilinear_rows.h"
#include "simd.h"

namespace dagcore {

// Pixels of a tile's side, at most. A tile of 32 x 32 pixels stays in the first-level cache, and
// the usual enlargements, by 4, 8, 16 and 32, make tiles that are whole cells.
constexpr int kSide = 32;

// Neighbouring pixels of one axis that read the same two low-resolution neighbours.
struct Segment {
  int64_t low, high;     // low-resolution indices
  int64_t begin;         // first pixel
  int count;             // at most kSide
  int weights;           // segments of equal weights share this number
  double weight[kSide];  // of `high`
};

inline std::vector<Segment> segments(int64_t from, int64_t to, bool align_corners) {
  std::vector<Segment> all;
  for (int64_t pixel = 0; pixel < to; ++pixel) {
    const Source source = source_of(pixel, from, to, align_corners);
    if (all.empty() || all.back().low != source.low || all.back().count == kSide) {
      all.push_back({source.low, source.high, pixel, 0, 0, {}});
    }
    Segment& last = all.back();
    last.weight[last.count++] = source.weight;
  }
  for (size_t i = 0; i < all.size(); ++i) {
    Segment& segment = all[i];
    segment.weights = static_cast<int>(i);
    for (size_t j = i; j-- > 0 && i - j <= 4;) {  // whole factors repeat at once
      if (all[j].count == segment.count &&
          std::equal(segment.weight, segment.weight + segment.count, all[j].weight)) {
        segment.weights = all[j].weights;
        break;
      }
    }
  }
  return all;
}

constexpr int kPixels = kSide * kSide;  // of a tile, at most
// Elements of a tile's arrays. Arrays of exactly kPixels floats lie 4096 bytes apart, and then the
// same element of each falls into one set of the first-level cache.
constexpr int kRoom = kPixels + 16;

// The weights of a tile's pixels at the four corners: pixels are lanes of these arrays, row after
// row, padded to whole vectors with weight 0.
template <typename Real>
struct alignas(64) TileWeights {
  Real w00[kRoom], w01[kRoom], w10[kRoom], w11[kRoom];
  Real of_pixel[kRoom][4];  // the same, pixel by pixel
  Real total[4];            // over all pixels
  int count = 0, padded = 0;
  int y_weights = -1, x_weights = -1;  // whose they are
};

template <typename Real>
struct alignas(64) Tile {
  using Index = IndexOf<Real>;
  const TileWeights<Real>* weights;
  Real best[kRoom];
  Index best_class[kRoom], second_class[kRoom];
  Index label[kRoom], adversarial[kRoom], plus[kRoom], minus[kRoom];
};

// A sum in lanes, added up in an order that does not depend on the vector width.
template <typename Value>
struct Lanes {
  Value lane[kLanes] = {};

  template <int kHalf = kLanes / 2>
  DAGCORE_INLINE Value total() {
    for (int j = 0; j < kHalf; ++j) lane[j] += lane[j + kHalf];
    if constexpr (kHalf > 1) return total<kHalf / 2>();
    return lane[0];
  }
};

template <typename Real>
DAGCORE_INLINE void fill_weights(const Segment& y, const Segment& x, TileWeights<Real>* weights) {
  int p = 0;
  for (int i = 0; i < y.count; ++i) {
    const double v = y.weight[i];
    for (int j = 0; j < x.count; ++j, ++p) {
      const double u = x.weight[j];
      Real* of_pixel = weights->of_pixel[p];
      weights->w00[p] = of_pixel[0] = static_cast<Real>((1 - v) * (1 - u));
      weights->w01[p] = of_pixel[1] = static_cast<Real>((1 - v) * u);
      weights->w10[p] = of_pixel[2] = static_cast<Real>(v * (1 - u));
      weights->w11[p] = of_pixel[3] = static_cast<Real>(v * u);
    }
  }
  weights->count = p;
  for (; p % kLanes; ++p) {
    weights->w00[p] = weights->w01[p] = weights->w10[p] = weights->w11[p] = 0;
  }
  weights->padded = p;
  weights->y_weights = y.weights;
  weights->x_weights = x.weights;
  const Real* corners[4] = {weights->w00, weights->w01, weights->w10, weights->w11};
  for (int k = 0; k < 4; ++k) {
    Lanes<Real> sum;
    for (int q = 0; q < p; q += kLanes) {
      for (int j = 0; j < kLanes; ++j) sum.lane[j] += corners[k][q + j];
    }
    weights->total[k] = sum.total();
  }
}

// A class that may win in a cell, and its scores at the four corners.
template <typename Real>
struct Candidate {
  Real s00, s01, s10, s11;
  IndexOf<Real> c;
};

// The winner at every pixel of a tile among a cell's candidates, in rising class order. A vector of
// pixels at a time, so that their weights and winners stay in registers.
template <typename Real, bool kRunnerUp>
DAGCORE_INLINE void find_winners(const Candidate<Real>* candidates, int count, Tile<Real>* tile) {
  using Index = IndexOf<Real>;
  const TileWeights<Real>& weights = *tile->weights;
  for (int p = 0; p < weights.padded; p += kLanes) {
    Real w00[kLanes], w01[kLanes], w10[kLanes], w11[kLanes], best[kLanes], second[kLanes];
    Index best_class[kLanes], second_class[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      w00[j] = weights.w00[p + j];
      w01[j] = weights.w01[p + j];
      w10[j] = weights.w10[p + j];
      w11[j] = weights.w11[p + j];
      const Candidate<Real>& q = candidates[0];
      best[j] = blend(w00[j], w01[j], w10[j], w11[j], q.s00, q.s01, q.s10, q.s11);
      best_class[j] = q.c;
      second[j] = best[j];
      second_class[j] = kUncounted;
    }
    for (int k = 1; k < count; ++k) {
      const Candidate<Real> q = candidates[k];
      for (int j = 0; j < kLanes; ++j) {
        Top<Real, Index, kRunnerUp> top{best[j], second[j], best_class[j], second_class[j]};
        top.next(blend(w00[j], w01[j], w10[j], w11[j], q.s00, q.s01, q.s10, q.s11), q.c);
        best[j] = top.best;
        best_class[j] = top.best_class;
        if (kRunnerUp) {
          second[j] = top.second;
          second_class[j] = top.second_class;
        }
      }
    }
    for (int j = 0; j < kLanes; ++j) {
      tile->best[p + j] = best[j];
      tile->best_class[p + j] = best_class[j];
      if (kRunnerUp) tile->second_class[p + j] = second_class[j];
    }
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

// Verdicts of a tile's pixels; the count of active ones, flagged if a label is out of range.
template <typename Real, bool kRunnerUp>
DAGCORE_INLINE void judge_tile(Objective objective, Tile<Real>* tile, uint32_t* active) {
  using Index = IndexOf<Real>;
  const int count = tile->weights->count, padded = tile->weights->padded;
  const Real* best = tile->best;
  const Index *best_class = tile->best_class, *second_class = tile->second_class;
  Index *label = tile->label, *adversarial = tile->adversarial;
  Index *plus = tile->plus, *minus = tile->minus;
  for (int p = count; p < padded; ++p) label[p] = adversarial[p] = kUncounted;
  Index sum = 0, bad = 0;
  for (int p = 0; p < padded; ++p) {
    if (kRunnerUp) {
      adversarial[p] = best_class[p] == label[p] ? second_class[p] : best_class[p];
    }
    const Verdict<Index> verdict =
        judge(objective, label[p], adversarial[p], best_class[p], best[p] != best[p]);
    plus[p] = verdict.plus;
    minus[p] = verdict.minus;
    sum += verdict.plus >= 0;
    bad |= is_out_of_range(label[p], adversarial[p]);
  }
  *active = static_cast<uint32_t>(sum) | (bad ? kOutOfRangeFlag : 0);
}

}  // namespace dagcore
