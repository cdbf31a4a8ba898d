// dag_seed on the CPU: one pass over the scores, one over the seed, strip by strip.
#include "../dag_seed.h"

#include <algorithm>
#include <cstring>

#include "../registration.h"
#include "memory.h"
#include "simd.h"
#include "targets.h"

namespace dagcore {
namespace {

// `count` targets in a row: where the first lies in each operand, in elements.
struct Strip {
  int64_t at[kSeedOperands];
  int count;
};

// With kOwn, also the scores of the labels: looked up later, they would have left the cache if the
// classes lie a power of two apart.
template <typename T, typename Index, bool kSecond, bool kOwn>
DAGCORE_INLINE void find_strip_winners(const SeedArgs& args, const Strip& strip,
                                       TargetRow<T, Index>* row) {
  const int64_t stride = args.walk.inner_stride(kScores);
  const T* scores = static_cast<const T*>(args.scores) + strip.at[kScores];
  const int count = strip.count;
  for (int i = 0; i < count; ++i) {
    const auto key = Score<T>::key(scores[i * stride]);
    row->best[i] = key;
    row->best_class[i] = 0;
    if (kSecond) row->second_class[i] = kUncounted;
    if (kOwn) row->own[i] = key;
  }
  const int64_t classes = args.rule.classes, class_stride = args.scores_class;
  for (int64_t c = 1; c < classes; ++c) {
    scores += class_stride;
    for (int i = 0; i < count; ++i) {
      const auto key = Score<T>::key(scores[i * stride]);
      Top<T, Index, kSecond> top{row->best[i], {}, row->best_class[i], {}};
      if (kSecond) {
        top.second = row->second[i];
        top.second_class = row->second_class[i];
      }
      top.next(key, static_cast<Index>(c));
      row->best[i] = top.best;
      row->best_class[i] = top.best_class;
      if (kSecond) {
        row->second[i] = top.second;
        row->second_class[i] = top.second_class;
      }
      if (kOwn) row->own[i] = row->label[i] == static_cast<Index>(c) ? key : row->own[i];
    }
  }
}

template <typename T, typename Index>
DAGCORE_INLINE void write_seed(const SeedArgs& args, const Strip& strip, const Index* plus,
                               const Index* minus) {
  const int64_t stride = args.walk.inner_stride(kSeed);
  T* seed = static_cast<T*>(args.seed) + strip.at[kSeed];
  const int64_t classes = args.rule.classes, class_stride = args.seed_class;
  const int count = strip.count;
  for (int64_t c = 0; c < classes; ++c, seed += class_stride) {
    for (int i = 0; i < count; ++i) {
      seed[i * stride] =
          Score<T>::from_int(seed_at(Verdict<Index>{plus[i], minus[i]}, static_cast<Index>(c)));
    }
  }
}

// If each target's classes lie side by side, most of the seed is one run of zeros.
template <typename T, typename Index>
void write_seed_rows(const SeedArgs& args, const Strip& strip, const Index* plus,
                     const Index* minus) {
  const int64_t stride = args.walk.inner_stride(kSeed), classes = args.rule.classes;
  T* seed = static_cast<T*>(args.seed) + strip.at[kSeed];
  const int runs = stride == classes ? 1 : strip.count;
  for (int i = 0; i < runs; ++i) {
    std::memset(static_cast<void*>(seed + i * stride), 0, sizeof(T) * classes * strip.count / runs);
  }
  for (int i = 0; i < strip.count; ++i) {
    if (plus[i] < 0) continue;
    const Verdict<Index> verdict{plus[i], minus[i]};
    seed[i * stride + plus[i]] = Score<T>::from_int(seed_at(verdict, plus[i]));
    seed[i * stride + minus[i]] = Score<T>::from_int(seed_at(verdict, minus[i]));
  }
}

template <typename T, typename Index, bool kSecond>
uint32_t seed_strip(Simd simd, const SeedArgs& args, const Strip& strip) {
  TargetRow<T, Index> row;
  const auto& walk = args.walk;
  run_simd<read_labels<Index, false>>(simd, args.labels, strip.at[kLabels],
                                      walk.inner_stride(kLabels), strip.count, args.rule,
                                      row.label);
  if (!args.runner_up) {
    run_simd<read_labels<Index, true>>(simd, args.adversarial, strip.at[kAdversarial],
                                       walk.inner_stride(kAdversarial), strip.count, args.rule,
                                       row.adversarial);
  }
  args.measures_label()
      ? run_simd<find_strip_winners<T, Index, kSecond, true>>(simd, args, strip, &row)
      : run_simd<find_strip_winners<T, Index, kSecond, false>>(simd, args, strip, &row);
  const uint32_t active = judge_targets<T, Index, kSecond>(simd, args, strip.count, &row);
  if (args.seed_class == 1 && walk.inner_stride(kSeed) != 1) {
    write_seed_rows<T>(args, strip, row.plus, row.minus);
  } else {
    run_simd<write_seed<T, Index>>(simd, args, strip, row.plus, row.minus);
  }
  return active;
}

template <typename T, typename Index, bool kSecond>
void seed_targets(int64_t images, const SeedArgs& args) {
  const Simd simd = simd_in_use();
  const int64_t classes = args.rule.classes, rows = args.walk.rows(), inner = args.walk.inner();
  // A strip whose classes lie side by side is read class after class: keep it in the cache.
  const bool planes = args.walk.inner_stride(kScores) == 1;
  const int64_t fits = (int64_t{1} << 15) / (classes * static_cast<int64_t>(sizeof(T)));
  const int64_t strip_size = planes ? kTargets : std::clamp<int64_t>(fits, 16, kTargets);
  const int64_t strips = (inner + strip_size - 1) / strip_size;
  const int64_t strip_work = std::min(inner, strip_size) * classes;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / strip_work);

  torch::stable::parallel_for(0, images * rows * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % strips * strip_size;
      const int64_t row = item / strips % rows;
      const int64_t n = item / strips / rows;
      Strip strip{{}, static_cast<int>(std::min(strip_size, inner - first))};
      args.walk.locate(n, row * inner + first, strip.at);
      add_active(args.active + n, seed_strip<T, Index, kSecond>(simd, args, strip));
    }
  });
}

// scores (N, C, *T), labels and adversarial (N, *T); without adversarial labels, the runner-up.
// Returns the seed, laid out like scores, and the number of active targets (N,), int32.
std::tuple<Tensor, Tensor> dag_seed(Tensor scores, Tensor labels, std::optional<Tensor> adversarial,
                                    std::string objective, int64_t ignore_index, double margin) {
  TargetSeedCall call(scores, labels, adversarial, objective, ignore_index, margin);
  advise_huge_pages(call.seed.mutable_data_ptr(), call.seed.numel() * call.seed.element_size());
  return call.run([&](auto type, auto second) {
    using T = decltype(type);
    using Index = typename Score<T>::Index;
    if (sizeof(Index) == 2 && call.rule.classes > INT16_MAX) {
      seed_targets<T, int32_t, second.value>(scores.size(0), call.args());
    } else {
      seed_targets<T, Index, second.value>(scores.size(0), call.args());
    }
  });
}

}  // namespace

DAGCORE_REGISTER(CPU, "dag_seed", dag_seed)

}  // namespace dagcore
