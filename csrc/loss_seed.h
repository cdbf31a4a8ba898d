// The device-independent part of loss_seed: checks, and the walk over the targets.
#pragma once

#include "loss.h"
#include "seed.h"
#include "strided.h"

namespace dagcore {

enum LossOperand { kLossScores, kLossSeed, kLossLabels, kLossAdversarial, kLossOperands };

// What a kernel needs to judge targets and to count the hits.
struct LossTargets {
  LabelSource labels, adversarial;
  LabelRule labelling;
  bool targeted;
  double q, kappa;
  const double* blend;        // (N,); null for 0
  const void* class_weights;  // (C,) float, double for double scores; null for none
  uint32_t* hits;             // (N,)

  template <typename Real>
  DAGCORE_INLINE LossRule<Real> rule_of(int64_t n) const {
    return {targeted, blend ? static_cast<Real>(blend[n]) : Real{0}, static_cast<Real>(q),
            static_cast<Real>(kappa)};
  }
};

// Arguments of the kernels of loss_seed; the walk covers the targets of one image.
struct LossArgs : LossTargets {
  const void* scores;
  void* seed;
  int64_t scores_class, seed_class;  // strides
  Walk<kLossOperands> walk;
};

// scores (N, C, *T), labels and adversarial (N, *T), whose shapes the op checks, blend (N,),
// class_weights (C,)
struct LossCall {
  Tensor scores, labels;
  Tensor adversarial;  // labels if there are none, not read as adversarial ones
  std::optional<Tensor> blend, class_weights;
  Loss loss;
  bool targeted;
  double q, kappa;
  int64_t ignore_index;
  Tensor seed;  // laid out like scores
  Tensor sums;  // (N,) double, zero at first
  Tensor hits;  // (N,) int32, zero at first

  LossCall(const Tensor& scores, const Tensor& labels, const std::optional<Tensor>& adversarial,
           const std::string& loss, const std::optional<Tensor>& blend, double q, double kappa,
           const std::optional<Tensor>& class_weights, int64_t ignore_index)
      : scores(with_classes(scores)),
        labels(labels),
        adversarial(adversarial ? *adversarial : labels),
        blend(blend),
        class_weights(class_weights),
        loss(value_named<Loss>("loss", loss, kLosses)),
        targeted(adversarial.has_value()),
        q(q),
        kappa(kappa),
        ignore_index(ignore_index),
        seed(torch::stable::empty_like(scores)),
        sums(torch::stable::new_zeros(scores, {scores.size(0)}, ScalarType::Double)),
        hits(torch::stable::new_zeros(scores, {scores.size(0)}, ScalarType::Int)) {
    check_class_count(scores);
    check_labels("labels", labels, scores);
    check_labels("adversarial_labels", this->adversarial, scores);
    if (blend) check_vector("blend", *blend, true, scores.size(0));
    STD_TORCH_CHECK(q <= 1 && q - q == 0, "q must be a finite number, at most 1, got ", q);
    STD_TORCH_CHECK(kappa >= 0, "kappa must be at least 0, got ", kappa);
    const int64_t least = this->loss != Loss::dlr ? 1 : adversarial ? 4 : 3;
    STD_TORCH_CHECK(scores.size(1) >= least, "scores must have at least ", least, " classes for ",
                    loss, ", got ", shape(scores));
    if (class_weights) {
      const bool wide = scores.scalar_type() == ScalarType::Double;
      check_vector("class_weights", *class_weights, wide, scores.size(1));
    }
  }

  LossTargets targets() const {
    return {LabelSource(labels),
            LabelSource(adversarial),
            {scores.size(1), ignore_index},
            targeted,
            q,
            kappa,
            blend ? static_cast<const double*>(blend->const_data_ptr()) : nullptr,
            class_weights ? class_weights->const_data_ptr() : nullptr,
            static_cast<uint32_t*>(hits.mutable_data_ptr())};
  }

  // Calls kernel(T{}, the loss as a constant) if there are targets.
  template <typename Kernel>
  std::tuple<Tensor, Tensor, Tensor> run(const Kernel& kernel) {
    if (labels.numel() == 0) return {torch::stable::zero_(seed), sums, hits};
    for_float_type("scores", scores.scalar_type(), [&](auto type) { with_loss(type, kernel); });
    return {seed, sums, hits};
  }

 private:
  template <typename T, typename Kernel>
  void with_loss(T type, const Kernel& kernel) const {
    const auto with = [&](auto loss) { kernel(type, loss); };
    switch (loss) {
      case Loss::cross_entropy:
        return with(Constant<Loss::cross_entropy>{});
      case Loss::masked_cross_entropy:
        return with(Constant<Loss::masked_cross_entropy>{});
      case Loss::blended_cross_entropy:
        return with(Constant<Loss::blended_cross_entropy>{});
      case Loss::cosine:
        return with(Constant<Loss::cosine>{});
      case Loss::jensen_shannon:
        return with(Constant<Loss::jensen_shannon>{});
      case Loss::tsallis:
        return with(Constant<Loss::tsallis>{});
      case Loss::margin:
        return with(Constant<Loss::margin>{});
      case Loss::dag:
        return with(Constant<Loss::dag>{});
      case Loss::masked_spherical:
        return with(Constant<Loss::masked_spherical>{});
      case Loss::dlr:
        return with(Constant<Loss::dlr>{});
    }
  }
  template <Loss kLoss>
  using Constant = std::integral_constant<Loss, kLoss>;

  void check_vector(const char* name, const Tensor& values, bool wide, int64_t size) const {
    check_same_device(name, values, "scores", scores);
    STD_TORCH_CHECK(values.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                        values.is_contiguous() && values.dim() == 1 && values.size(0) == size,
                    name, " must be contiguous, ", wide ? "float64" : "float32", " and of shape (",
                    size, "), got ", shape(values));
  }
};

// scores (N, C, *T), labels and adversarial (N, *T)
struct LossSeedCall : LossCall {
  template <typename... Arguments>
  explicit LossSeedCall(const Arguments&... arguments) : LossCall(arguments...) {
    check_target_shape("labels", labels, scores);
    check_target_shape("adversarial_labels", adversarial, scores);
  }

  LossArgs args() const {
    return {targets(),
            scores.const_data_ptr(),
            seed.mutable_data_ptr(),
            scores.stride(1),
            seed.stride(1),
            Walk<kLossOperands>({scores, seed, labels, adversarial})};
  }
};

}  // namespace dagcore
