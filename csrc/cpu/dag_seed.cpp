// dag_seed on the CPU: one pass over the scores, one over the seed, strip by strip.
#include "../dag_seed.h"

#include <algorithm>
#include <cstring>

#include "../registration.h"
#include "memory.h"
#include "read_labels.h"
#include "simd.h"

namespace dagcore {
namespace {

constexpr int kStrip = 1024;  // targets; their running winners stay in the first-level cache

// Everything about the call that is the same for all strips.
struct Plan {
  int64_t classes;
  LabelRule rule;
  Objective objective;
  Simd simd;
};

// `count` targets in a row: pointers to the first, strides in elements.
template <typename T>
struct Strip {
  const T* scores;
  int64_t class_stride, target_stride;
  T* seed;
  int64_t seed_class_stride, seed_target_stride;
  int count;
};

// The winners of a strip, as arrays so that targets are the vector's lanes.
template <typename T, typename Index, bool kRunnerUp>
struct StripWinners {
  using Key = typename Score<T>::Key;
  Key best[kStrip];
  Index best_class[kStrip];
  Key second[kRunnerUp ? kStrip : 1];
  Index second_class[kRunnerUp ? kStrip : 1];

  DAGCORE_INLINE Top<T, Index, kRunnerUp> get(int i) const {
    return {best[i], second[kRunnerUp ? i : 0], best_class[i], second_class[kRunnerUp ? i : 0]};
  }
  DAGCORE_INLINE void set(int i, const Top<T, Index, kRunnerUp>& top) {
    best[i] = top.best;
    best_class[i] = top.best_class;
    if (kRunnerUp) {
      second[i] = top.second;
      second_class[i] = top.second_class;
    }
  }
};

template <typename T, typename Index, bool kRunnerUp, bool kUnitStride>
struct FindStripWinners {
  DAGCORE_INLINE static void run(const Strip<T>& strip, int64_t classes,
                                 StripWinners<T, Index, kRunnerUp>* winners) {
    const int64_t stride = kUnitStride ? 1 : strip.target_stride;
    for (int i = 0; i < strip.count; ++i) {
      Top<T, Index, kRunnerUp> top{};
      top.first(Score<T>::key(strip.scores[i * stride]));
      winners->set(i, top);
    }
    for (int64_t c = 1; c < classes; ++c) {
      const T* scores = strip.scores + c * strip.class_stride;
      for (int i = 0; i < strip.count; ++i) {
        Top<T, Index, kRunnerUp> top = winners->get(i);
        top.next(Score<T>::key(scores[i * stride]), static_cast<Index>(c));
        winners->set(i, top);
      }
    }
  }
};

template <typename T, typename Index, bool kRunnerUp>
struct JudgeStrip {
  // adversarial: read labels, or with kRunnerUp, overwritten by the runners-up
  DAGCORE_INLINE static void run(const StripWinners<T, Index, kRunnerUp>* winners,
                                 const Index* labels, Index* adversarial, Objective objective,
                                 int count, Index* plus, Index* minus, uint32_t* active) {
    uint32_t sum = 0, bad = 0;
    for (int i = 0; i < count; ++i) {
      if (kRunnerUp) adversarial[i] = winners->get(i).runner_up(labels[i]);
      const Verdict<Index> verdict =
          judge(objective, labels[i], adversarial[i], winners->best_class[i],
                Score<T>::is_nan(winners->best[i]));
      plus[i] = verdict.plus;
      minus[i] = verdict.minus;
      sum += verdict.plus >= 0;
      bad |= is_out_of_range(labels[i], adversarial[i]);
    }
    *active = sum | (bad ? kOutOfRangeFlag : 0);
  }
};

template <typename T, typename Index, bool kUnitStride>
struct WriteSeed {
  DAGCORE_INLINE static void run(const Strip<T>& strip, int64_t classes, const Index* plus,
                                 const Index* minus) {
    const int64_t stride = kUnitStride ? 1 : strip.seed_target_stride;
    for (int64_t c = 0; c < classes; ++c) {
      T* seed = strip.seed + c * strip.seed_class_stride;
      for (int i = 0; i < strip.count; ++i) {
        seed[i * stride] =
            Score<T>::from_int(seed_at(Verdict<Index>{plus[i], minus[i]}, static_cast<Index>(c)));
      }
    }
  }
};

// Where each target's classes lie side by side, most of the seed is one run of zeros.
template <typename T, typename Index>
void write_seed_rows(const Strip<T>& strip, int64_t classes, const Index* plus,
                     const Index* minus) {
  if (strip.seed_target_stride == classes) {
    std::memset(static_cast<void*>(strip.seed), 0, sizeof(T) * classes * strip.count);
  } else {
    for (int i = 0; i < strip.count; ++i) {
      std::memset(static_cast<void*>(strip.seed + i * strip.seed_target_stride), 0,
                  sizeof(T) * classes);
    }
  }
  for (int i = 0; i < strip.count; ++i) {
    if (plus[i] < 0) continue;
    T* row = strip.seed + i * strip.seed_target_stride;
    const Verdict<Index> verdict{plus[i], minus[i]};
    row[verdict.plus] = Score<T>::from_int(seed_at(verdict, verdict.plus));
    row[verdict.minus] = Score<T>::from_int(seed_at(verdict, verdict.minus));
  }
}

template <typename T, typename Index, bool kRunnerUp>
uint32_t seed_strip(const Plan& plan, const Strip<T>& strip, const void* labels,
                    ScalarType label_type, int64_t label_stride, const void* adversarial,
                    ScalarType adversarial_type, int64_t adversarial_stride) {
  alignas(64) StripWinners<T, Index, kRunnerUp> winners;
  alignas(64) Index label[kStrip], other[kStrip], plus[kStrip], minus[kStrip];
  uint32_t active = 0;

  run_simd<ReadLabels<Index, false>>(plan.simd, labels, label_type, label_stride, strip.count,
                                     plan.rule, label);
  if (!kRunnerUp) {
    run_simd<ReadLabels<Index, true>>(plan.simd, adversarial, adversarial_type, adversarial_stride,
                                      strip.count, plan.rule, other);
  }
  if (strip.target_stride == 1) {
    run_simd<FindStripWinners<T, Index, kRunnerUp, true>>(plan.simd, strip, plan.classes, &winners);
  } else {
    run_simd<FindStripWinners<T, Index, kRunnerUp, false>>(plan.simd, strip, plan.classes,
                                                           &winners);
  }
  run_simd<JudgeStrip<T, Index, kRunnerUp>>(plan.simd, &winners, label, other, plan.objective,
                                            strip.count, plus, minus, &active);
  if (strip.seed_target_stride == 1) {
    run_simd<WriteSeed<T, Index, true>>(plan.simd, strip, plan.classes, plus, minus);
  } else if (strip.seed_class_stride == 1) {
    write_seed_rows(strip, plan.classes, plus, minus);
  } else {
    run_simd<WriteSeed<T, Index, false>>(plan.simd, strip, plan.classes, plus, minus);
  }
  return active;
}

template <typename T, typename Index, bool kRunnerUp>
void seed_targets(const SeedCall& call) {
  const Plan plan{call.rule.classes, call.rule, call.objective, simd_in_use()};
  const Walk<kSeedOperands>& walk = call.walk;
  const int64_t images = call.scores.size(0), rows = walk.rows(), inner = walk.inner();
  // A strip whose classes lie side by side is read class after class: keep it in the cache.
  const bool planes = walk.inner_stride(kScores) == 1;
  const int64_t fits = (int64_t{1} << 15) / (plan.classes * static_cast<int64_t>(sizeof(T)));
  const int64_t strip_size = planes ? kStrip : std::clamp<int64_t>(fits, 16, kStrip);
  const int64_t strips = (inner + strip_size - 1) / strip_size;
  const int64_t strip_work = std::min(inner, strip_size) * plan.classes;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / strip_work);
  const T* scores = static_cast<const T*>(call.scores.const_data_ptr());
  T* seed = static_cast<T*>(call.seed.mutable_data_ptr());
  const LabelSource labels(call.labels);
  const LabelSource adversarial(call.adversarial);
  const int64_t scores_batch = call.scores.stride(0), scores_class = call.scores.stride(1);
  const int64_t seed_batch = call.seed.stride(0), seed_class = call.seed.stride(1);
  uint32_t* active = static_cast<uint32_t*>(call.active.mutable_data_ptr());

  torch::stable::parallel_for(0, images * rows * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % strips * strip_size;
      const int64_t row = item / strips % rows;
      const int64_t n = item / strips / rows;
      int64_t at[kSeedOperands];
      walk.row_offsets(row, at);
      for (int k = 0; k < kSeedOperands; ++k) at[k] += first * walk.inner_stride(k);
      const Strip<T> strip{scores + n * scores_batch + at[kScores],
                           scores_class,
                           walk.inner_stride(kScores),
                           seed + n * seed_batch + at[kSeed],
                           seed_class,
                           walk.inner_stride(kSeed),
                           static_cast<int>(std::min(strip_size, inner - first))};
      const uint32_t sum = seed_strip<T, Index, kRunnerUp>(
          plan, strip, labels.at(n, at[kLabels]), labels.type, walk.inner_stride(kLabels),
          adversarial.at(n, at[kAdversarial]), adversarial.type, walk.inner_stride(kAdversarial));
      if (sum & kOutOfRangeFlag) __atomic_fetch_or(&active[n], kOutOfRangeFlag, __ATOMIC_RELAXED);
      __atomic_fetch_add(&active[n], sum & ~kOutOfRangeFlag, __ATOMIC_RELAXED);
    }
  });
}

// scores (N, C, *T), labels and adversarial (N, *T); without adversarial labels the runner-up's.
// Returns the seed, laid out like scores, and the number of active targets (N,), int32.
std::tuple<Tensor, Tensor> dag_seed(Tensor scores, Tensor labels, std::optional<Tensor> adversarial,
                                    std::string objective, int64_t ignore_index) {
  const SeedCall call(scores, labels, adversarial, objective_named(objective), ignore_index);
  if (scores.numel() == 0) return {call.seed, call.active};
  advise_huge_pages(call.seed.mutable_data_ptr(), call.seed.numel() * call.seed.element_size());

  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto seed_as = [&](auto index) {
      using Index = decltype(index);
      call.runner_up ? seed_targets<T, Index, true>(call) : seed_targets<T, Index, false>(call);
    };
    using Index = typename Score<T>::Index;
    if (sizeof(Index) == 2 && call.rule.classes > INT16_MAX) {
      seed_as(int32_t{});
    } else {
      seed_as(Index{});
    }
  });
  return {call.seed, call.active};
}

}  // namespace

DAGCORE_REGISTER(CPU, "dag_seed", dag_seed)

}  // namespace dagcore
