// One target of a dense loss on CUDA: its judgement, and the sums of losses in a fixed order.
#pragma once

#include "../loss_seed.h"
#include "sums.cuh"
#include "targets.cuh"

namespace dagcore {

constexpr int kLossThreads = 128;  // per block

// One block per image: sums its `count` parts.
static __global__ void __launch_bounds__(kLossThreads)
    sum_losses(const double* parts, int64_t count, double* sums) {
  double sum = 0;
  for (int64_t part = threadIdx.x; part < count; part += kLossThreads) {
    sum += parts[blockIdx.x * count + part];
  }
  sum = sum_of_block<kLossThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Sums feature(c) and its square over the classes.
template <typename Real, typename Feature>
__device__ void sum_features(int32_t classes, const Feature& feature, Real* sum, Real* squares) {
  *sum = *squares = 0;
  for (int32_t begin = 0; begin < classes; begin += kSummed) {
    const int32_t end = begin + kSummed < classes ? begin + kSummed : classes;
    Real part = 0, part_squares = 0;
    for (int32_t c = begin; c < end; ++c) {
      const Real value = feature(c);
      part += value;
      part_squares += product(value, value);
    }
    *sum += part;
    *squares += part_squares;
  }
}

// The terms of a target's gradient, and its loss.
template <Loss kLoss, typename Real>
struct Judged {
  Terms<Real, int32_t, terms_of(kLoss)> terms;  // of a sparse loss
  Real scale, at_aim, base;                     // of a dense one: see Dense; max z or max |z|
  int32_t aim;
  double loss;

  __device__ static Real feature(Real score, Real base) {
    if constexpr (kLoss == Loss::masked_spherical) {
      return feature_of_size(score, base);
    } else {
      return exp_nonpositive(score - base);
    }
  }
  __device__ Real gradient(Real score, int32_t c) const {
    if constexpr (is_sparse(kLoss)) {
      return value_at(terms, c);
    } else {
      return product(scale, feature(score, base)) + (c == aim ? at_aim : Real{0});
    }
  }
  // Replaces each part that the gradient is a sum of by change(part).
  template <typename Change>
  __device__ void for_parts(const Change& change) {
    if constexpr (is_sparse(kLoss)) {
      for (Real& value : terms.value) value = change(value);
    } else {
      scale = change(scale);
      at_aim = change(at_aim);
    }
  }
};

// The scores of a target are load(c); `label_at` and `adversarial_at` are where its labels lie.
template <Loss kLoss, typename Real, typename Load>
__device__ Judged<kLoss, Real> judge_loss(const LossTargets& targets, const LossRule<Real>& rule,
                                          int64_t label_at, int64_t adversarial_at,
                                          const Load& load, Count* count) {
  const int32_t classes = static_cast<int32_t>(targets.labelling.classes);
  Tops<Real, int32_t, tops_of(kLoss)> tops;
  tops.first(load(0));
  for (int32_t c = 1; c < classes; ++c) tops.next(load(c), c);
  const Real top = tops.score[0];
  const int32_t label =
      static_cast<int32_t>(read_label(targets.labels.read(label_at), targets.labelling));
  const int32_t aim = rule.targeted
                          ? static_cast<int32_t>(read_adversarial(
                                targets.adversarial.read(adversarial_at), targets.labelling))
                          : label;
  const bool counted = (label >= 0) & (aim >= 0), whole = counted & (top - top == 0);
  const Real* weights = static_cast<const Real*>(targets.class_weights);
  const Real omega = weights && label >= 0 ? weights[label] : Real{1};
  const Real aim_score = aim < 0 ? Real{0} : load(aim);

  Judged<kLoss, Real> judged;
  judged.aim = aim;
  Real loss;
  if constexpr (is_sparse(kLoss)) {
    const Real own = label < 0 ? Real{0} : load(label);
    if constexpr (kLoss == Loss::dlr) {
      judged.terms = dlr_loss(rule, tops, label, aim, own, aim_score);
    } else {
      judged.terms = margin_loss<kLoss>(rule, tops, label, aim, own, aim_score);
    }
    loss = judged.terms.loss;
  } else {
    judged.base = top;
    if constexpr (kLoss == Loss::masked_spherical) {
      judged.base = 0;
      for (int32_t c = 0; c < classes; ++c) {
        const Real magnitude = load(c) < 0 ? -load(c) : load(c);
        judged.base = magnitude > judged.base ? magnitude : judged.base;
      }
    }
    Real sum, squares;
    sum_features(
        classes, [&](int32_t c) { return judged.feature(load(c), judged.base); }, &sum, &squares);
    const bool right = tops.at[0] == aim;
    Dense<Real> dense;
    if constexpr (kLoss == Loss::masked_spherical) {
      const Real own = aim < 0 ? Real{0} : judged.feature(aim_score, judged.base);
      dense = spherical_loss(rule, judged.base, own, squares, right);
    } else {
      dense = softmax_loss<kLoss>(rule, aim_score - top, sum, squares, right);
    }
    judged.scale = dense.scale;
    judged.at_aim = dense.at_aim;
    loss = dense.loss;
  }
  judged.for_parts([&](Real part) { return whole ? omega * part : Real{0}; });
  judged.loss = whole ? omega * loss : counted ? std::numeric_limits<double>::quiet_NaN() : 0.0;
  count->active += counted & ((tops.at[0] == label) | (top != top));
  count->bad |= is_out_of_range(label, aim);
  return judged;
}

}  // namespace dagcore
