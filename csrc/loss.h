// One target of a dense loss: the loss, and the terms of its gradient. Included by every device.
#pragma once

#include <cmath>

#include "exponential.h"

namespace dagcore {

enum class Loss : int {
  cross_entropy,
  masked_cross_entropy,
  blended_cross_entropy,
  cosine,
  jensen_shannon,
  tsallis,
  margin,
  dag,
  masked_spherical,
  dlr,
};
constexpr const char* kLosses[] = {"cross-entropy",
                                   "masked-cross-entropy",
                                   "blended-cross-entropy",
                                   "cosine",
                                   "jensen-shannon",
                                   "tsallis",
                                   "margin",
                                   "dag",
                                   "masked-spherical",
                                   "dlr"};  // in the same order

// Losses whose gradient lies at only a few classes of a target; that of the others lies at all.
constexpr bool is_sparse(Loss loss) {
  return loss == Loss::margin || loss == Loss::dag || loss == Loss::dlr;
}
// Number of a target's largest scores that a loss needs.
constexpr int tops_of(Loss loss) { return loss == Loss::dlr ? 4 : is_sparse(loss) ? 2 : 1; }
constexpr int terms_of(Loss loss) { return loss == Loss::dlr ? 5 : 2; }

// Number of classes whose features are summed first, before they are added to the whole: this
// rounds less.
constexpr int kSummed = 16;

template <typename Real>
struct LossRule {
  bool targeted;  // the loss is that of the adversarial label
  Real blend, q, kappa;
};

// Dense: the gradient is scale * feature, plus at_aim at the label that the loss is about. Features
// are e^(z - max z), or z / max |z| for masked_spherical.
template <typename Real>
struct Dense {
  Real loss, scale, at_aim;
};

// `behind` is the label's score minus the largest; `sum` and `squares` are over the features.
template <Loss kLoss, typename Real>
DAGCORE_INLINE Dense<Real> softmax_loss(LossRule<Real> rule, Real behind, Real sum, Real squares,
                                        bool right) {
  constexpr Real kLn2 = static_cast<Real>(0.69314718055994530942);
  const Real feature = exp_nonpositive(behind), ln_p = behind - log_from_one(sum);
  Real weight = 1, loss = -ln_p;
  if constexpr (kLoss == Loss::jensen_shannon) {
    const Real p = feature / sum, ln_1p = log_from_one(1 + p);
    const Real kept = ln_p > Real(-1e30) ? ln_p : Real(-1e30);  // p is 0, and -inf would make a NaN
    weight = product(p / 2, ln_1p - kept);
    loss = (kLn2 - weight) - ln_1p / 2;
  } else if constexpr (kLoss == Loss::tsallis) {
    const Real rest = 1 - rule.q;
    const bool flat = rest == 0;  // cross-entropy
    const Real less = flat ? Real{0} : expm1_nonpositive(product(rest, ln_p));
    weight = 1 + less;
    loss = flat ? -ln_p : -less / (flat ? Real{1} : rest);
  } else {
    if constexpr (kLoss == Loss::cosine) {
      weight = feature / std::sqrt(squares);
      weight = rule.targeted ? 1 - weight : weight;
    } else if constexpr (kLoss != Loss::cross_entropy) {
      const Real other = kLoss == Loss::blended_cross_entropy ? rule.blend : Real{0};
      weight = right != rule.targeted ? 1 - other : other;
    }
    loss = weight == 0 ? Real{0} : product(weight, loss);
  }
  const Real sign = rule.targeted ? Real{-1} : Real{1};
  return {product(sign, loss), product(sign, weight) / sum, -product(sign, weight)};
}

// The feature of masked_spherical.
template <typename Real>
DAGCORE_INLINE Real feature_of_size(Real score, Real size) {
  return (score - score == 0) & (size > 0) ? score / size : Real{0};
}

// `size` is max |z|, `own` the label's feature; `squares` is over the features.
template <typename Real>
DAGCORE_INLINE Dense<Real> spherical_loss(LossRule<Real> rule, Real size, Real own, Real squares,
                                          bool right) {
  const bool counts = (right != rule.targeted) & (size > 0) & (size - size == 0);
  const Real root = std::sqrt(squares), sign = rule.targeted ? Real{1} : Real{-1};
  const Real cosine = product(sign, own / root), at_aim = sign / product(size, root);
  return {counts ? cosine : Real{0},
          counts ? -product(cosine, Real{1} / product(size, root)) / root : Real{0},
          counts ? at_aim : Real{0}};
}

// Sparse: the gradient is the sum of values, each at a class.
template <typename Real, typename Index, int kTerms>
struct Terms {
  Real loss;
  Index at[kTerms];
  Real value[kTerms];
};

template <typename Real, typename Index, int kTerms>
DAGCORE_INLINE Real value_at(const Terms<Real, Index, kTerms>& terms, Index c) {
  Real value = 0;
  for (int t = 0; t < kTerms; ++t) value += terms.at[t] == c ? terms.value[t] : Real{0};
  return value;
}

// The largest scores with their classes, the first of equals first. Negative classes do not exist.
template <typename Real, typename Index, int kTops>
struct Tops {
  Real score[kTops];
  Index at[kTops];

  DAGCORE_INLINE void first(Real value) {
    for (int t = 0; t < kTops; ++t) {
      score[t] = value;
      at[t] = t == 0 ? 0 : kUncounted;
    }
  }
  // Classes after the first, in rising order.
  DAGCORE_INLINE void next(Real value, Index c) {
    bool moved = false;
    for (int t = 0; t < kTops; ++t) {
      moved |= Score<Real>::beats(value, score[t]) | (t > 0 && at[t] < 0);
      const Real behind = score[t];
      const Index behind_at = at[t];
      score[t] = moved ? value : behind;
      at[t] = moved ? c : behind_at;
      value = moved ? behind : value;
      c = moved ? behind_at : c;
    }
  }
};

// `own` and `aim` are the scores of the label and of the adversarial label; dag without adversarial
// labels takes the strongest other class.
template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE Terms<Real, Index, 2> margin_loss(LossRule<Real> rule,
                                                 const Tops<Real, Index, 2>& top, Index label,
                                                 Index adversarial, Real own, Real aim) {
  const bool aims = kLoss == Loss::margin && rule.targeted;
  const Index pivot = aims ? adversarial : label;
  const Real pivot_score = aims ? aim : own;
  const bool leads = top.at[0] == pivot;
  const Index rival = leads ? top.at[1] : top.at[0];
  const Real rival_score = leads ? top.score[1] : top.score[0];
  const bool near = top.score[0] - (aims ? rival_score : pivot_score) < rule.kappa;
  const bool active = (leads != aims) | near, exists = rival >= 0;
  const bool given = kLoss == Loss::dag && rule.targeted;
  const Index other = given ? adversarial : rival;
  const Real other_score = given ? aim : rival_score;
  const Real gap = aims ? pivot_score - other_score : other_score - pivot_score;
  const Real rest = kLoss == Loss::margin ? rule.kappa : Real{0};
  const Real one = active & exists ? Real{1} : Real{0};
  return {exists ? (active ? gap : rest) : Real{0},
          {aims ? pivot : other, aims ? other : pivot},
          {one, -one}};
}

// If untargeted, the third largest score replaces the mean of the third and fourth.
template <typename Real, typename Index>
DAGCORE_INLINE Terms<Real, Index, 5> dlr_loss(LossRule<Real> rule, const Tops<Real, Index, 4>& top,
                                              Index label, Index adversarial, Real own, Real aim) {
  const bool second = top.at[0] == label;
  const Index rival = rule.targeted ? adversarial : second ? top.at[1] : top.at[0];
  const Real rival_score = rule.targeted ? aim : second ? top.score[1] : top.score[0];
  const Index lowest = rule.targeted ? top.at[3] : top.at[2];
  const Real lowest_score = rule.targeted ? top.score[3] : top.score[2];
  const Real above = rival_score - own;
  // The differences are exact where the scores are close, which is where the quotient is large.
  const Real spread = (top.score[0] - top.score[2]) + (top.score[0] - lowest_score);
  const Real below = product(spread, Real(0.5)) + Real(1e-12);
  const bool finite = (above - above == 0) & (below - below == 0);
  const Real one = finite ? 1 / below : Real{0};
  const Real loss = finite ? above / below : Real{0};
  const Real half = product(product(loss, one), Real(0.5));
  return {
      loss, {rival, label, top.at[0], top.at[2], lowest}, {one, -one, -(half + half), half, half}};
}

// Values that the dtype cannot hold become its largest finite number; a NaN stays a NaN.
template <typename T, typename Real>
DAGCORE_INLINE T store_seed(Real value) {
  constexpr Real kMost = std::is_same_v<T, Half>       ? Real(65504)
                         : std::is_same_v<T, BFloat16> ? Real(0x1.fep127)
                                                       : std::numeric_limits<Real>::max();
  value = value > kMost ? kMost : value;
  return Pixel<T>::store(value < -kMost ? -kMost : value);
}

}  // namespace dagcore
