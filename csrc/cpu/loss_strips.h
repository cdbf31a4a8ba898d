// Strips of targets in the cache: their scores become features and, with their labels, losses and
// gradients.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "../loss_seed.h"
#include "targets.h"

namespace dagcore {

constexpr int kStrip = 256;              // maximum targets of a strip
constexpr int kStripRoom = kStrip + 16;  // elements of its arrays; see kRoom
constexpr int kLossLanes = 8;            // lanes of the sum of losses

// `count` targets in a row. Their scores, and then their features, are in `work`, one row a class.
template <typename Real>
struct Strip {
  int count;
  Real* work;
  int64_t pitch;

  DAGCORE_INLINE Real* row(int64_t c) const { return work + c * pitch; }
};

// Data of a strip's targets, as arrays so that targets are the vector's lanes.
template <typename Real, typename Index>
struct alignas(64) LossRow {
  Index label[kStripRoom];
  Index adversarial[kStripRoom];  // the label again if the loss is not targeted
  Real top[4][kStripRoom];
  Index top_at[4][kStripRoom];
  Real own[kStripRoom], aim[kStripRoom];  // scores, or features, of the two labels
  Real size[kStripRoom], sum[kStripRoom], squares[kStripRoom];
  Real omega[kStripRoom];  // class weights of the labels
  Real loss[kStripRoom];
  Real scale[kStripRoom], at_aim[kStripRoom];  // see Dense
  Real value[5][kStripRoom];                   // see Terms
  Index value_at[5][kStripRoom];

  template <int kTops>
  DAGCORE_INLINE Tops<Real, Index, kTops> tops(int i) const {
    Tops<Real, Index, kTops> tops;
    for (int t = 0; t < kTops; ++t) {
      tops.score[t] = top[t][i];
      tops.at[t] = top_at[t][i];
    }
    return tops;
  }
  template <int kTops>
  DAGCORE_INLINE void keep(const Tops<Real, Index, kTops>& tops, int i) {
    for (int t = 0; t < kTops; ++t) {
      top[t][i] = tops.score[t];
      top_at[t][i] = tops.at[t];
    }
  }
};

// Looks up what the strip holds at the given classes; arbitrary for negative classes.
template <typename Real, typename Index>
DAGCORE_INLINE void look_up(const Strip<Real>& strip, const Index* classes, Real* out) {
  const Real* work = strip.work;
  const int64_t pitch = strip.pitch;
  const int count = strip.count;
  for (int i = 0; i < count; ++i) {
    const int64_t c = classes[i] > 0 ? classes[i] : 0;
    out[i] = work[c * pitch + i];
  }
}

// Replaces the scores by feature(score, base of the target), and sums features and their squares.
// Works on a vector of targets at a time, even beyond the last one, so that sums stay in registers.
template <bool kSum, bool kSquares, typename Real, typename Index, typename Feature>
DAGCORE_INLINE void sum_features(int64_t classes, const Strip<Real>& strip, const Real* bases,
                                 LossRow<Real, Index>* row, const Feature& feature) {
  constexpr int kVector = 16;
  for (int at = 0; at < strip.count; at += kVector) {
    Real base[kVector], sum[kVector] = {}, squares[kVector] = {};
    for (int i = 0; i < kVector; ++i) base[i] = bases[at + i];
    for (int64_t begin = 0; begin < classes; begin += kSummed) {
      Real part[kVector] = {}, part_squares[kVector] = {};
      for (int64_t c = begin; c < std::min(begin + kSummed, classes); ++c) {
        Real* work = strip.row(c) + at;
#pragma GCC unroll 1
        for (int i = 0; i < kVector; ++i) {
          const Real value = feature(work[i], base[i]);
          work[i] = value;
          if (kSum) part[i] += value;
          if (kSquares) part_squares[i] += value * value;
        }
      }
      for (int i = 0; i < kVector; ++i) {
        if (kSum) sum[i] += part[i];
        if (kSquares) squares[i] += part_squares[i];
      }
    }
    for (int i = 0; i < kVector; ++i) {
      row->sum[at + i] = sum[i];
      row->squares[at + i] = squares[i];
    }
  }
}

template <bool kSquares, typename Real, typename Index>
DAGCORE_INLINE void exponentiate(int64_t classes, const Strip<Real>& strip,
                                 LossRow<Real, Index>* row) {
  const auto feature = [](Real score, Real top)
                           __attribute__((always_inline)) { return exp_nonpositive(score - top); };
  sum_features<true, kSquares>(classes, strip, row->top[0], row, feature);
}

// Divides the scores by the largest magnitude among them, so that no square overflows.
template <typename Real, typename Index>
DAGCORE_INLINE void normalize(int64_t classes, const Strip<Real>& strip,
                              LossRow<Real, Index>* row) {
  const int count = strip.count;
  for (int i = 0; i < count; ++i) row->size[i] = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const Real* work = strip.row(c);
    for (int i = 0; i < count; ++i) {
      const Real magnitude = work[i] < 0 ? -work[i] : work[i];
      row->size[i] = magnitude > row->size[i] ? magnitude : row->size[i];
    }
  }
  const auto feature = [](Real score, Real size)
                           __attribute__((always_inline)) { return feature_of_size(score, size); };
  sum_features<false, true>(classes, strip, row->size, row, feature);
}

template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void judge_dense(LossRule<Real> rule, int count, LossRow<Real, Index>* row) {
  for (int i = 0; i < count; ++i) {
    const Real top = row->top[0][i], aim = row->aim[i], squares = row->squares[i];
    const bool right = row->top_at[0][i] == row->adversarial[i];
    Dense<Real> dense;
    if constexpr (kLoss == Loss::masked_spherical) {
      dense = spherical_loss(rule, row->size[i], aim, squares, right);
    } else {
      dense = softmax_loss<kLoss>(rule, aim - top, row->sum[i], squares, right);
    }
    row->loss[i] = dense.loss;
    row->scale[i] = dense.scale;
    row->at_aim[i] = dense.at_aim;
  }
}

template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void judge_sparse(LossRule<Real> rule, int count, LossRow<Real, Index>* row) {
  for (int i = 0; i < count; ++i) {
    const auto tops = row->template tops<tops_of(kLoss)>(i);
    const Index label = row->label[i], adversarial = row->adversarial[i];
    Terms<Real, Index, terms_of(kLoss)> terms;
    if constexpr (kLoss == Loss::dlr) {
      terms = dlr_loss(rule, tops, label, adversarial, row->own[i], row->aim[i]);
    } else {
      terms = margin_loss<kLoss>(rule, tops, label, adversarial, row->own[i], row->aim[i]);
    }
    row->loss[i] = terms.loss;
    for (int t = 0; t < terms_of(kLoss); ++t) {
      row->value[t][i] = terms.value[t];
      row->value_at[t][i] = terms.at[t];
    }
  }
}

// Applies class weights; sets losses to 0 for targets that do not count, and to NaN for those whose
// scores have no finite maximum.
template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void settle_losses(int count, LossRow<Real, Index>* row, uint32_t* hits) {
  constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();
  uint32_t sum = 0, bad = 0;
  for (int i = 0; i < count; ++i) {
    const Index label = row->label[i], adversarial = row->adversarial[i];
    const Real top = row->top[0][i], omega = row->omega[i];
    const bool counted = (label >= 0) & (adversarial >= 0), whole = counted & (top - top == 0);
    const Real loss = omega * row->loss[i];
    row->loss[i] = whole ? loss : counted ? kNan : Real{0};
    if constexpr (is_sparse(kLoss)) {
      for (int t = 0; t < terms_of(kLoss); ++t) {
        const Real value = omega * row->value[t][i];
        row->value[t][i] = whole ? value : Real{0};
      }
    } else {
      const Real scale = omega * row->scale[i], at_aim = omega * row->at_aim[i];
      row->scale[i] = whole ? scale : Real{0};
      row->at_aim[i] = whole ? at_aim : Real{0};
    }
    sum += counted & ((row->top_at[0][i] == label) | (top != top));
    bad |= is_out_of_range(label, adversarial);
  }
  *hits = sum | (bad ? kOutOfRangeFlag : 0);
}

// Sums the losses in a fixed order, at any vector width.
template <typename Real>
DAGCORE_INLINE void add_losses(int count, const Real* loss, double* sum) {
  double lanes[kLossLanes] = {};
  int i = 0;
  for (; i + kLossLanes <= count; i += kLossLanes) {
    for (int lane = 0; lane < kLossLanes; ++lane) lanes[lane] += loss[i + lane];
  }
  for (; i < count; ++i) lanes[i % kLossLanes] += loss[i];
  *sum = 0;
  for (double lane : lanes) *sum += lane;
}

// The gradient of target i with respect to its score of class c, given the feature of the class.
template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE Real gradient_at(const LossRow<Real, Index>& row, Real feature, int64_t i, Index c) {
  if constexpr (is_sparse(kLoss)) {
    Real value = 0;
    for (int t = 0; t < terms_of(kLoss); ++t) {
      const Real there = row.value[t][i];
      value += row.value_at[t][i] == c ? there : Real{0};
    }
    return value;
  } else {
    const Real at_aim = row.at_aim[i], elsewhere = row.scale[i] * feature;
    return elsewhere + (row.adversarial[i] == c ? at_aim : Real{0});
  }
}

// Judges the targets of a strip, given their scores, labels and largest scores, and fills in what
// `gradient_at` reads. Returns their hits; `sum` is that of their losses.
template <Loss kLoss, typename Real, typename Index>
uint32_t judge_strip(Simd simd, const LossTargets& targets, LossRule<Real> rule,
                     const Strip<Real>& strip, LossRow<Real, Index>* row, double* sum) {
  const int64_t classes = targets.labelling.classes;
  const int count = strip.count;
  if (!rule.targeted) std::copy_n(row->label, count, row->adversarial);
  if (const Real* weights = static_cast<const Real*>(targets.class_weights)) {
    for (int i = 0; i < count; ++i) row->omega[i] = weights[std::max<Index>(row->label[i], 0)];
  } else {
    std::fill_n(row->omega, count, Real{1});
  }
  if constexpr (kLoss == Loss::masked_spherical) {
    run_simd<normalize<Real, Index>>(simd, classes, strip, row);
  }
  if (is_sparse(kLoss)) run_simd<look_up<Real, Index>>(simd, strip, row->label, row->own);
  run_simd<look_up<Real, Index>>(simd, strip, row->adversarial, row->aim);
  if constexpr (is_sparse(kLoss)) {
    run_simd<judge_sparse<kLoss, Real, Index>>(simd, rule, count, row);
  } else {
    if constexpr (kLoss != Loss::masked_spherical) {
      run_simd<exponentiate<kLoss == Loss::cosine, Real, Index>>(simd, classes, strip, row);
    }
    run_simd<judge_dense<kLoss, Real, Index>>(simd, rule, count, row);
  }
  uint32_t hits = 0;
  run_simd<settle_losses<kLoss, Real, Index>>(simd, count, row, &hits);
  run_simd<add_losses<Real>>(simd, count, row->loss, sum);
  return hits;
}

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Memory for `count` numbers at the start of a cache line, not zeroed.
template <typename Real>
std::unique_ptr<Real[], AlignedDelete> aligned_array(int64_t count) {
  void* memory = ::operator new(sizeof(Real) * count, std::align_val_t{64});
  return std::unique_ptr<Real[], AlignedDelete>(static_cast<Real*>(memory));
}

}  // namespace dagcore
