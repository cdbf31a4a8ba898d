// settle_ on the CPU: a few images, one after the other.
#include "../settle.h"

#include "../registration.h"

namespace dagcore {
namespace {

// Rows of N images, written in place; see dagcore/ops. Returns the active targets (N, K), -1 for
// images that had stopped.
Tensor settle(Tensor running, Tensor may_move, Tensor updates, Tensor stuck, Tensor status,
              Tensor history, Tensor active, Tensor wanted, Tensor moved,
              std::optional<Tensor> done, int64_t max_iter, int64_t patience) {
  const SettleCall call{running, may_move, updates, stuck, status,   history,
                        active,  wanted,   moved,   done,  max_iter, patience};
  Tensor counts;
  const SettleArgs args = call.args(&counts);
  for (int64_t n = 0; n < call.images(); ++n) args.settle(n);
  return counts;
}

}  // namespace

DAGCORE_REGISTER(CPU, "settle_", settle)

}  // namespace dagcore
