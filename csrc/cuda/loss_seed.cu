// loss_seed on CUDA: a thread a target, then a sum of the losses in a fixed order.
#include "../loss_seed.h"
#include "launch.h"
#include "sums.cuh"
#include "targets.cuh"

namespace dagcore {
namespace {

constexpr int kThreads = 128;

// Of feature(c) over the classes.
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

template <typename T, Loss kLoss>
__global__ void __launch_bounds__(kThreads)
    seed_targets(const __grid_constant__ LossArgs args, ImageBlocks blocks, double* block_sums) {
  using Real = RealOf<T>;
  const int64_t n = blocks.image();
  const LossRule<Real> rule = args.template rule_of<Real>(n);
  const int64_t target = blocks.index() * kThreads + static_cast<int64_t>(threadIdx.x);
  const int32_t classes = static_cast<int32_t>(args.labelling.classes);
  double loss = 0;
  Count count;
  if (target < args.walk.count()) {
    int64_t at[kLossOperands];
    args.walk.locate(n, target, at);
    const T* scores = static_cast<const T*>(args.scores) + at[kLossScores];
    T* seed = static_cast<T*>(args.seed) + at[kLossSeed];
    const auto load = [&](int32_t c) { return Pixel<T>::load(scores[c * args.scores_class]); };

    Tops<Real, int32_t, tops_of(kLoss)> tops;
    tops.first(load(0));
    for (int32_t c = 1; c < classes; ++c) tops.next(load(c), c);
    const Real top = tops.score[0];
    const int32_t label =
        static_cast<int32_t>(read_label(args.labels.read(at[kLossLabels]), args.labelling));
    const int32_t aim = rule.targeted
                            ? static_cast<int32_t>(read_adversarial(
                                  args.adversarial.read(at[kLossAdversarial]), args.labelling))
                            : label;
    const bool counted = (label >= 0) & (aim >= 0), whole = counted & (top - top == 0);
    const Real* weights = static_cast<const Real*>(args.class_weights);
    const Real omega = weights && label >= 0 ? weights[label] : Real{1};
    const Real aim_score = aim < 0 ? Real{0} : load(aim);
    Real value;

    if constexpr (is_sparse(kLoss)) {
      const Real own = label < 0 ? Real{0} : load(label);
      Terms<Real, int32_t, terms_of(kLoss)> terms;
      if constexpr (kLoss == Loss::dlr) {
        terms = dlr_loss(rule, tops, label, aim, own, aim_score);
      } else {
        terms = margin_loss<kLoss>(rule, tops, label, aim, own, aim_score);
      }
      value = terms.loss;
      for (Real& term : terms.value) term = whole ? omega * term : Real{0};
      for (int32_t c = 0; c < classes; ++c) {
        seed[c * args.seed_class] = store_seed<T>(value_at(terms, c));
      }
    } else {
      Real size = 0, sum, squares;
      if constexpr (kLoss == Loss::masked_spherical) {
        for (int32_t c = 0; c < classes; ++c) {
          const Real magnitude = load(c) < 0 ? -load(c) : load(c);
          size = magnitude > size ? magnitude : size;
        }
      }
      const auto feature = [&](int32_t c) {
        const Real score = load(c);
        if constexpr (kLoss != Loss::masked_spherical) return exp_nonpositive(score - top);
        return feature_of_size(score, size);
      };
      sum_features(classes, feature, &sum, &squares);
      Dense<Real> dense;
      const bool right = tops.at[0] == aim;
      if constexpr (kLoss == Loss::masked_spherical) {
        dense = spherical_loss(rule, size, aim < 0 ? Real{0} : feature(aim), squares, right);
      } else {
        dense = softmax_loss<kLoss>(rule, aim_score - top, sum, squares, right);
      }
      value = dense.loss;
      const Real scale = whole ? omega * dense.scale : Real{0};
      const Real at_aim = whole ? omega * dense.at_aim : Real{0};
      for (int32_t c = 0; c < classes; ++c) {
        seed[c * args.seed_class] =
            store_seed<T>(product(scale, feature(c)) + (c == aim ? at_aim : Real{0}));
      }
    }
    loss = whole ? omega * value : counted ? std::numeric_limits<double>::quiet_NaN() : 0.0;
    count.active = counted & ((tops.at[0] == label) | (top != top));
    count.bad = is_out_of_range(label, aim);
  }
  count.add_to(args.hits + n);
  loss = sum_of_block<kThreads>(loss);
  if (threadIdx.x == 0) block_sums[blockIdx.x] = loss;
}

// A block an image.
__global__ void __launch_bounds__(kThreads)
    sum_losses(const double* block_sums, int64_t blocks_per_image, double* sums) {
  double sum = 0;
  for (int64_t block = threadIdx.x; block < blocks_per_image; block += kThreads) {
    sum += block_sums[blockIdx.x * blocks_per_image + block];
  }
  sum = sum_of_block<kThreads>(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// scores (N, C, *T), labels and adversarial (N, *T), blend (N,), class_weights (C,); see the CPU's.
std::tuple<Tensor, Tensor, Tensor> loss_seed(Tensor scores, Tensor labels,
                                             std::optional<Tensor> adversarial, std::string loss,
                                             std::optional<Tensor> blend, double q, double kappa,
                                             std::optional<Tensor> class_weights,
                                             int64_t ignore_index) {
  const Launcher launch("loss_seed", scores);
  LossSeedCall call(scores, labels, adversarial, loss, blend, q, kappa, class_weights,
                    ignore_index);
  return call.run([&](auto type, auto loss) {
    using T = decltype(type);
    const LossArgs args = call.args();
    const int64_t images = scores.size(0), blocks = ceil_div(args.walk.count(), kThreads);
    const Tensor block_sums =
        torch::stable::new_empty(scores, {images * blocks}, ScalarType::Double);
    double* parts = static_cast<double*>(block_sums.mutable_data_ptr());
    launch(seed_targets<T, loss.value>, images * blocks, kThreads, args, ImageBlocks(blocks),
           parts);
    launch(sum_losses, images, kThreads, static_cast<const double*>(parts), blocks,
           static_cast<double*>(call.sums.mutable_data_ptr()));
  });
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "loss_seed", loss_seed)

}  // namespace dagcore
