// loss_seed on CUDA: one thread per target, then a sum of the losses in a fixed order.
#include "launch.h"
#include "losses.cuh"

namespace dagcore {
namespace {

template <typename T, Loss kLoss>
__global__ void __launch_bounds__(kLossThreads, 8)
    seed_targets(const __grid_constant__ LossArgs args, ImageBlocks blocks, double* block_sums) {
  using Real = RealOf<T>;
  const int64_t n = blocks.image();
  const int64_t target = blocks.index() * kLossThreads + static_cast<int64_t>(threadIdx.x);
  double loss = 0;
  Count count;
  if (target < args.walk.count()) {
    int64_t at[kLossOperands];
    args.walk.locate(n, target, at);
    const T* scores = static_cast<const T*>(args.scores) + at[kLossScores];
    T* seed = static_cast<T*>(args.seed) + at[kLossSeed];
    const auto load = [&](int32_t c) { return Pixel<T>::load(scores[c * args.scores_class]); };
    const auto judged = judge_loss<kLoss>(args, args.template rule_of<Real>(n), at[kLossLabels],
                                          at[kLossAdversarial], load, &count);
    for (int32_t c = 0; c < args.labelling.classes; ++c) {
      seed[c * args.seed_class] = store_seed<T>(judged.gradient(load(c), c));
    }
    loss = judged.loss;
  }
  count.add_to(args.hits + n);
  loss = sum_of_block<kLossThreads>(loss);
  if (threadIdx.x == 0) block_sums[blockIdx.x] = loss;
}

// scores (N, C, *T), labels and adversarial (N, *T), blend (N,), class_weights (C,); see the CPU
// op.
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
    const int64_t images = scores.size(0), blocks = ceil_div(args.walk.count(), kLossThreads);
    const Tensor block_sums =
        torch::stable::new_empty(scores, {images * blocks}, ScalarType::Double);
    double* parts = static_cast<double*>(block_sums.mutable_data_ptr());
    launch(seed_targets<T, loss.value>, images * blocks, kLossThreads, args, ImageBlocks(blocks),
           parts);
    launch(sum_losses, images, kLossThreads, static_cast<const double*>(parts), blocks,
           static_cast<double*>(call.sums.mutable_data_ptr()));
  });
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "loss_seed", loss_seed)

}  // namespace dagcore
