// dag_seed on the CPU: one pass over the scores, one over the seed, tile by tile.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../checks.h"
#include "../strided.h"
#include "memory.h"
#include "simd.h"

namespace dagcore {
namespace {

constexpr int kTile = 1024;  // targets; their running winners stay in the first-level cache

enum Operand { kScores, kSeed, kLabels, kAdversarial, kOperands };

struct LabelSource {
  const void* data;
  ScalarType type;

  const void* at(int64_t offset) const {
    const int64_t width = type == ScalarType::Byte ? 1 : type == ScalarType::Int ? 4 : 8;
    return static_cast<const char*>(data) + offset * width;
  }
};

// Everything about the call that is the same for all tiles.
struct Plan {
  int64_t classes;
  LabelRule rule;
  bool reach;
  Simd simd;
};

// `count` targets in a row: pointers to the first, strides in elements.
template <typename T>
struct Tile {
  const T* scores;
  int64_t class_stride, target_stride;
  T* seed;
  int64_t seed_class_stride, seed_target_stride;
  int count;
};

// Labels (raw, any of three types, any stride) to class indices.
template <typename Index, bool kIsAdversarial>
struct ReadLabels {
  template <typename Raw>
  DAGCORE_INLINE static void read(const void* data, int64_t stride, int count, LabelRule rule,
                                  Index* out) {
    const Raw* raw = static_cast<const Raw*>(data);
    for (int i = 0; i < count; ++i) {
      const int64_t label = static_cast<int64_t>(raw[i * stride]);
      out[i] = static_cast<Index>(kIsAdversarial ? read_adversarial(label, rule)
                                                 : read_label(label, rule));
    }
  }
  DAGCORE_INLINE static void run(const void* data, ScalarType type, int64_t stride, int count,
                                 LabelRule rule, Index* out) {
    switch (type) {
      case ScalarType::Byte:
        return read<uint8_t>(data, stride, count, rule, out);
      case ScalarType::Int:
        return read<int32_t>(data, stride, count, rule, out);
      default:
        return read<int64_t>(data, stride, count, rule, out);
    }
  }
};

// The winners of a tile, as arrays so that targets are the vector's lanes.
template <typename T, typename Index, bool kRunnerUp>
struct Winners {
  using Key = typename Score<T>::Key;
  Key best[kTile];
  Index best_class[kTile];
  Key second[kRunnerUp ? kTile : 1];
  Index second_class[kRunnerUp ? kTile : 1];

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
struct FindWinners {
  DAGCORE_INLINE static void run(const Tile<T>& tile, int64_t classes,
                                 Winners<T, Index, kRunnerUp>* winners) {
    const int64_t stride = kUnitStride ? 1 : tile.target_stride;
    for (int i = 0; i < tile.count; ++i) {
      Top<T, Index, kRunnerUp> top{};
      top.first(Score<T>::key(tile.scores[i * stride]));
      winners->set(i, top);
    }
    for (int64_t c = 1; c < classes; ++c) {
      const T* scores = tile.scores + c * tile.class_stride;
      for (int i = 0; i < tile.count; ++i) {
        Top<T, Index, kRunnerUp> top = winners->get(i);
        top.next(Score<T>::key(scores[i * stride]), static_cast<Index>(c));
        winners->set(i, top);
      }
    }
  }
};

template <typename T, typename Index, bool kRunnerUp>
struct Judge {
  // adversarial: read labels, or with kRunnerUp, overwritten by the runners-up
  DAGCORE_INLINE static void run(const Winners<T, Index, kRunnerUp>* winners, const Index* labels,
                                 Index* adversarial, bool reach, int count, Index* plus,
                                 Index* minus, uint32_t* active) {
    uint32_t sum = 0, bad = 0;
    for (int i = 0; i < count; ++i) {
      if (kRunnerUp) adversarial[i] = winners->get(i).runner_up(labels[i]);
      const Verdict<Index> verdict = judge(reach, labels[i], adversarial[i], winners->best_class[i],
                                           Score<T>::is_nan(winners->best[i]));
      plus[i] = verdict.plus;
      minus[i] = verdict.minus;
      sum += verdict.plus >= 0;
      bad |= (labels[i] == kOutOfRange) | ((labels[i] >= 0) & (adversarial[i] == kOutOfRange));
    }
    *active = sum | (bad ? kOutOfRangeFlag : 0);
  }
};

template <typename T, typename Index, bool kUnitStride>
struct WriteSeed {
  DAGCORE_INLINE static void run(const Tile<T>& tile, int64_t classes, const Index* plus,
                                 const Index* minus) {
    const int64_t stride = kUnitStride ? 1 : tile.seed_target_stride;
    for (int64_t c = 0; c < classes; ++c) {
      T* seed = tile.seed + c * tile.seed_class_stride;
      for (int i = 0; i < tile.count; ++i) {
        seed[i * stride] =
            Score<T>::from_int(seed_at(Verdict<Index>{plus[i], minus[i]}, static_cast<Index>(c)));
      }
    }
  }
};

// Where each target's classes lie side by side, most of the seed is one run of zeros.
template <typename T, typename Index>
void write_seed_rows(const Tile<T>& tile, int64_t classes, const Index* plus, const Index* minus) {
  if (tile.seed_target_stride == classes) {
    std::memset(static_cast<void*>(tile.seed), 0, sizeof(T) * classes * tile.count);
  } else {
    for (int i = 0; i < tile.count; ++i) {
      std::memset(static_cast<void*>(tile.seed + i * tile.seed_target_stride), 0,
                  sizeof(T) * classes);
    }
  }
  for (int i = 0; i < tile.count; ++i) {
    if (plus[i] < 0) continue;
    T* row = tile.seed + i * tile.seed_target_stride;
    const Verdict<Index> verdict{plus[i], minus[i]};
    row[verdict.plus] = Score<T>::from_int(seed_at(verdict, verdict.plus));
    row[verdict.minus] = Score<T>::from_int(seed_at(verdict, verdict.minus));
  }
}

template <typename T, typename Index, bool kRunnerUp>
uint32_t seed_tile(const Plan& plan, const Tile<T>& tile, const void* labels, ScalarType label_type,
                   int64_t label_stride, const void* adversarial, ScalarType adversarial_type,
                   int64_t adversarial_stride) {
  alignas(64) Winners<T, Index, kRunnerUp> winners;
  alignas(64) Index label[kTile], other[kTile], plus[kTile], minus[kTile];
  uint32_t active = 0;

  run_simd<ReadLabels<Index, false>>(plan.simd, labels, label_type, label_stride, tile.count,
                                     plan.rule, label);
  if (!kRunnerUp) {
    run_simd<ReadLabels<Index, true>>(plan.simd, adversarial, adversarial_type, adversarial_stride,
                                      tile.count, plan.rule, other);
  }
  if (tile.target_stride == 1) {
    run_simd<FindWinners<T, Index, kRunnerUp, true>>(plan.simd, tile, plan.classes, &winners);
  } else {
    run_simd<FindWinners<T, Index, kRunnerUp, false>>(plan.simd, tile, plan.classes, &winners);
  }
  run_simd<Judge<T, Index, kRunnerUp>>(plan.simd, &winners, label, other, plan.reach, tile.count,
                                       plus, minus, &active);
  if (tile.seed_target_stride == 1) {
    run_simd<WriteSeed<T, Index, true>>(plan.simd, tile, plan.classes, plus, minus);
  } else if (tile.seed_class_stride == 1) {
    write_seed_rows(tile, plan.classes, plus, minus);
  } else {
    run_simd<WriteSeed<T, Index, false>>(plan.simd, tile, plan.classes, plus, minus);
  }
  return active;
}

template <typename T, typename Index, bool kRunnerUp>
void seed_all(const Plan& plan, const Tensor& scores, const Tensor& seed, LabelSource labels,
              int64_t label_batch, LabelSource adversarial, int64_t adversarial_batch,
              const Walk<kOperands>& walk, uint32_t* active) {
  const int64_t images = scores.size(0), rows = walk.rows(), inner = walk.inner();
  // A tile whose classes lie side by side is read class after class: keep it in the cache.
  const bool planes = walk.inner_stride(kScores) == 1;
  const int64_t fits = (int64_t{1} << 15) / (plan.classes * static_cast<int64_t>(sizeof(T)));
  const int64_t tile_size = planes ? kTile : std::clamp<int64_t>(fits, 16, kTile);
  const int64_t tiles = (inner + tile_size - 1) / tile_size;
  const int64_t tile_work = std::min(inner, tile_size) * plan.classes;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / tile_work);
  const T* scores_data = static_cast<const T*>(scores.data_ptr());
  T* seed_data = static_cast<T*>(seed.data_ptr());

  torch::stable::parallel_for(0, images * rows * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % tiles * tile_size;
      const int64_t row = item / tiles % rows;
      const int64_t n = item / tiles / rows;
      int64_t at[kOperands];
      walk.row_offsets(row, at);
      for (int k = 0; k < kOperands; ++k) at[k] += first * walk.inner_stride(k);
      const Tile<T> tile{scores_data + n * scores.stride(0) + at[kScores],
                         scores.stride(1),
                         walk.inner_stride(kScores),
                         seed_data + n * seed.stride(0) + at[kSeed],
                         seed.stride(1),
                         walk.inner_stride(kSeed),
                         static_cast<int>(std::min(tile_size, inner - first))};
      const uint32_t sum = seed_tile<T, Index, kRunnerUp>(
          plan, tile, labels.at(n * label_batch + at[kLabels]), labels.type,
          walk.inner_stride(kLabels), adversarial.at(n * adversarial_batch + at[kAdversarial]),
          adversarial.type, walk.inner_stride(kAdversarial));
      if (sum & kOutOfRangeFlag) __atomic_fetch_or(&active[n], kOutOfRangeFlag, __ATOMIC_RELAXED);
      __atomic_fetch_add(&active[n], sum & ~kOutOfRangeFlag, __ATOMIC_RELAXED);
    }
  });
}

// scores (N, C, *T), labels and adversarial (N, *T); without adversarial labels the runner-up's.
// Returns the seed, laid out like scores, and the number of active targets (N,), int32.
std::tuple<Tensor, Tensor> dag_seed(Tensor scores, Tensor labels, std::optional<Tensor> adversarial,
                                    bool reach, int64_t ignore_index) {
  check_seed_arguments(scores, labels, adversarial, reach);
  Tensor seed = torch::stable::empty_like(scores);
  advise_huge_pages(seed.data_ptr(), seed.numel() * static_cast<int64_t>(seed.element_size()));
  const int64_t images = scores.size(0);
  Tensor active = torch::stable::new_zeros(scores, {images}, ScalarType::Int);
  if (scores.numel() == 0) return {seed, active};

  const bool runner_up = !adversarial;
  const Tensor& other = runner_up ? labels : *adversarial;  // never read if runner_up
  Walk<kOperands> walk;
  for (int64_t d = 2; d < scores.dim(); ++d) {
    walk.add(scores.size(d),
             {scores.stride(d), seed.stride(d), labels.stride(d - 1), other.stride(d - 1)});
  }
  walk.merge();
  const int64_t classes = scores.size(1);
  const Plan plan{classes, {classes, ignore_index}, reach, simd_in_use()};
  const LabelSource label_source{labels.data_ptr(), labels.scalar_type()};
  const LabelSource other_source{other.data_ptr(), other.scalar_type()};
  uint32_t* counts = static_cast<uint32_t*>(active.data_ptr());

  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto seed_with = [&](auto index, auto with_runner_up) {
      seed_all<T, decltype(index), decltype(with_runner_up)::value>(
          plan, scores, seed, label_source, labels.stride(0), other_source, other.stride(0), walk,
          counts);
    };
    const auto seed_as = [&](auto index) {
      runner_up ? seed_with(index, std::true_type{}) : seed_with(index, std::false_type{});
    };
    using Index = typename Score<T>::Index;
    if (sizeof(Index) == 2 && classes > INT16_MAX) {
      seed_as(int32_t{});
    } else {
      seed_as(Index{});
    }
  });
  return {seed, active};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dagcore, CPU, library) { library.impl("dag_seed", TORCH_BOX(&dag_seed)); }

}  // namespace dagcore
