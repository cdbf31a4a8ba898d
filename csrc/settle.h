// The device-independent part of settle_: checks, and the update of one image.
#pragma once

#include <initializer_list>
#include <optional>

#include "checks.h"

namespace dagcore {

enum Status : int8_t { kConverged, kBudget, kStalled };  // as in dagcore/ops/fallback.py

// The rows of N images at K networks, and the results of their last evaluation and step.
struct SettleArgs {
  bool *running, *may_move;
  int64_t *updates, *stuck;
  int8_t* status;
  int32_t* history;                   // (N, max_iter + 1, K)
  const int32_t* active;              // (N, K)
  const bool *wanted, *done, *moved;  // done: null if images that want no step are
  int64_t max_iter, patience, networks;
  int32_t* counts;  // (N, K)

  DAGCORE_INLINE void settle(int64_t n) const {
    const int64_t update = updates[n];
    const bool ran = running[n], budget = update < max_iter, took = moved[n];
    const bool ready = done ? done[n] : !wanted[n];
    for (int64_t k = 0; k < networks; ++k) {
      const int32_t count = active[n * networks + k];
      counts[n * networks + k] = ran ? count : -1;
      if (ran) history[(n * (max_iter + 1) + update) * networks + k] = count;
    }
    bool stalled = ran && budget && wanted[n] && !took;
    stuck[n] = took ? 0 : stuck[n] + stalled;
    stalled = stalled && stuck[n] >= patience;
    if (ran && ready) status[n] = kConverged;
    if (ran && !ready && !budget) status[n] = kBudget;
    if (stalled) status[n] = kStalled;
    running[n] = ran && !ready && budget && !stalled;
    updates[n] = update + took;
    may_move[n] = running[n] && updates[n] < max_iter;
  }
};

struct SettleCall {
  Tensor running, may_move, updates, stuck, status, history, active, wanted, moved;
  std::optional<Tensor> done;
  int64_t max_iter, patience;

  int64_t images() const { return running.numel(); }

  // Also allocates the counts, like `active`.
  SettleArgs args(Tensor* counts) const {
    const int64_t n = images(), k = active.dim() == 2 ? active.size(1) : 0;
    STD_TORCH_CHECK(max_iter >= 0 && patience >= 1, "max_iter and patience must be at least 0 and ",
                    "1, got ", max_iter, " and ", patience);
    check("running", running, ScalarType::Bool, {n});
    check("may_move", may_move, ScalarType::Bool, {n});
    check("updates", updates, ScalarType::Long, {n});
    check("stuck", stuck, ScalarType::Long, {n});
    check("status", status, ScalarType::Char, {n});
    check("history", history, ScalarType::Int, {n, max_iter + 1, k});
    check("active", active, ScalarType::Int, {n, k});
    check("wanted", wanted, ScalarType::Bool, {n});
    if (done) check("done", *done, ScalarType::Bool, {n});
    check("moved", moved, ScalarType::Bool, {n});
    *counts = torch::stable::new_empty(active, {n, k});
    return {static_cast<bool*>(running.mutable_data_ptr()),
            static_cast<bool*>(may_move.mutable_data_ptr()),
            static_cast<int64_t*>(updates.mutable_data_ptr()),
            static_cast<int64_t*>(stuck.mutable_data_ptr()),
            static_cast<int8_t*>(status.mutable_data_ptr()),
            static_cast<int32_t*>(history.mutable_data_ptr()),
            static_cast<const int32_t*>(active.const_data_ptr()),
            static_cast<const bool*>(wanted.const_data_ptr()),
            done ? static_cast<const bool*>(done->const_data_ptr()) : nullptr,
            static_cast<const bool*>(moved.const_data_ptr()),
            max_iter,
            patience,
            k,
            static_cast<int32_t*>(counts->mutable_data_ptr())};
  }

 private:
  void check(const char* name, const Tensor& tensor, ScalarType type,
             std::initializer_list<int64_t> sizes) const {
    check_same_device(name, tensor, "running", running);
    STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous() &&
                        tensor.sizes() == torch::headeronly::IntHeaderOnlyArrayRef(sizes),
                    name, " must be contiguous, of its dtype and one row for each of ", images(),
                    " images, got ", shape(tensor));
  }
};

}  // namespace dagcore
