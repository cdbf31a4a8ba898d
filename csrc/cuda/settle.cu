// settle_ on CUDA: one thread per image.
#include "../settle.h"
#include "launch.h"

namespace dagcore {
namespace {

constexpr int kThreads = 64;

__global__ void __launch_bounds__(kThreads)
    settle_images(const __grid_constant__ SettleArgs args, int64_t images) {
  const int64_t n = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  if (n < images) args.settle(n);
}

// See the CPU op.
Tensor settle(Tensor running, Tensor may_move, Tensor updates, Tensor stuck, Tensor status,
              Tensor history, Tensor active, Tensor wanted, Tensor moved,
              std::optional<Tensor> done, int64_t max_iter, int64_t patience) {
  const Launcher launch("settle_", running);
  const SettleCall call{running, may_move, updates, stuck, status,   history,
                        active,  wanted,   moved,   done,  max_iter, patience};
  Tensor counts;
  const SettleArgs args = call.args(&counts);
  const int64_t images = call.images();
  if (images > 0) launch(settle_images, ceil_div(images, kThreads), kThreads, args, images);
  return counts;
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "settle_", settle)

}  // namespace dagcore
