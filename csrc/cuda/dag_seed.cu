// dag_seed on CUDA: one kernel that reads the scores once and writes the seed once.
#include "../dag_seed.h"
#include "launch.h"
#include "pack.cuh"
#include "targets.cuh"

namespace dagcore {
namespace {

constexpr int kThreads = 256;      // targets (or packs of them) per block if classes are planes
constexpr int kBlocksPerUnit = 3;  // blocks that registers must leave room for
constexpr int kRows = 128;         // targets per block if a target's classes lie side by side
constexpr int kColumns = 32;       // classes of a row that are read at once
constexpr int kUnroll = 4;         // classes loaded before the first is compared

// A thread works on V neighbouring targets, class after class: with V > 1 targets are neighbours in
// memory and packs are aligned; with V = 1 strides are free.
template <typename T, bool kSecond, int V>
__global__ void __launch_bounds__(kThreads, kSecond&& V == 8 ? 2 : kBlocksPerUnit)
    seed_planes(const __grid_constant__ SeedArgs args, ImageBlocks blocks) {
  const int64_t n = blocks.image();
  const int64_t first = (blocks.index() * kThreads + static_cast<int64_t>(threadIdx.x)) * V;
  const int32_t classes = static_cast<int32_t>(args.rule.classes);
  Count count;
  if (first < args.walk.count()) {
    int64_t at[kSeedOperands];
    args.walk.locate(n, first, at);
    const T* scores = static_cast<const T*>(args.scores) + at[kScores];
    T* seed = static_cast<T*>(args.seed) + at[kSeed];
    const auto load = [&](int32_t c) { return load_pack<V>(scores + c * args.scores_class); };

    Top<T, int32_t, kSecond> top[V];
    const Pack<T, V> zeroth = load(0);
#pragma unroll
    for (int v = 0; v < V; ++v) top[v].first(Score<T>::key(zeroth.value[v]));
    int32_t c = 1;
    for (; c + kUnroll <= classes; c += kUnroll) {
      Pack<T, V> packs[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) packs[u] = load(c + u);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) top[v].next(Score<T>::key(packs[u].value[v]), c + u);
      }
    }
    for (; c < classes; ++c) {
      const Pack<T, V> pack = load(c);
#pragma unroll
      for (int v = 0; v < V; ++v) top[v].next(Score<T>::key(pack.value[v]), c);
    }

    Verdict<int32_t> verdict[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const auto own = [&](int32_t label) { return scores[label * args.scores_class + v]; };
      verdict[v] = judge_target<T, kSecond>(
          args, at[kLabels] + v * args.walk.inner_stride(kLabels),
          at[kAdversarial] + v * args.walk.inner_stride(kAdversarial), top[v], own, &count);
    }
    for (c = 0; c < classes; ++c) {
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.value[v] = Score<T>::from_int(seed_at(verdict[v], c));
      store_pack(pack, seed + c * args.seed_class);
    }
  }
  count.add_to(args.active + n);
}

// A target's classes lie side by side: warps copy rows through shared memory, so that reads and
// writes are whole lines while each thread still sees one target's classes in order.
template <typename T, bool kSecond>
__global__ void __launch_bounds__(kRows, kBlocksPerUnit)
    seed_rows(const __grid_constant__ SeedArgs args, ImageBlocks blocks) {
  __shared__ T tile[kRows][kColumns + 1];
  __shared__ int64_t scores_at[kRows], seed_at_row[kRows];
  __shared__ Verdict<int32_t> verdicts[kRows];
  const int64_t n = blocks.image();
  const int64_t first = blocks.index() * kRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), args.walk.count() - first));
  const int32_t classes = static_cast<int32_t>(args.rule.classes);
  const int mine = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* scores = static_cast<const T*>(args.scores);
  T* seed = static_cast<T*>(args.seed);

  int64_t at[kSeedOperands] = {};
  if (mine < rows) args.walk.locate(n, first + mine, at);
  scores_at[mine] = at[kScores];
  seed_at_row[mine] = at[kSeed];
  __syncthreads();

  Top<T, int32_t, kSecond> top;
  for (int32_t begin = 0; begin < classes; begin += kColumns) {
    const int columns = min(kColumns, classes - begin);
#pragma unroll 8
    for (int row = warp; row < rows; row += kRows / 32) {
      if (lane < columns) tile[row][lane] = scores[scores_at[row] + begin + lane];
    }
    __syncthreads();
    if (mine < rows) {
      for (int c = 0; c < columns; ++c) {
        const auto key = Score<T>::key(tile[mine][c]);
        begin + c == 0 ? top.first(key) : top.next(key, begin + c);
      }
    }
    __syncthreads();
  }

  Count count;
  if (mine < rows) {
    const auto own = [&](int32_t label) { return scores[at[kScores] + label]; };
    verdicts[mine] =
        judge_target<T, kSecond>(args, at[kLabels], at[kAdversarial], top, own, &count);
  }
  __syncthreads();
  for (int row = warp; row < rows; row += kRows / 32) {
    const Verdict<int32_t> verdict = verdicts[row];
    for (int32_t c = lane; c < classes; c += 32) {
      seed[seed_at_row[row] + c] = Score<T>::from_int(seed_at(verdict, c));
    }
  }
  count.add_to(args.active + n);
}

// Whether packs of V targets are whole and aligned in both the scores and the seed.
template <typename T>
bool packs_fit(const SeedArgs& args) {
  constexpr int V = kPackSize<T>;
  return aligned(args.scores) && aligned(args.seed) && args.scores_class % V == 0 &&
         args.seed_class % V == 0 && args.walk.in_packs(V, kSeed + 1);
}

template <typename T, bool kSecond>
void seed_targets(int64_t images, const SeedArgs& args, const Launcher& launch) {
  // A block of `threads` works on `per_block` targets of a single image, for which it counts.
  const auto seed = [&](auto kernel, int threads, int64_t per_block) {
    const int64_t blocks = ceil_div(args.walk.count(), per_block);
    launch(kernel, images * blocks, threads, args, ImageBlocks(blocks));
  };
  constexpr int V = kPackSize<T>;
  if (args.scores_class == 1 && args.seed_class == 1 && args.rule.classes > 1) {
    seed(seed_rows<T, kSecond>, kRows, kRows);
  } else if (packs_fit<T>(args)) {
    seed(seed_planes<T, kSecond, V>, kThreads, kThreads * V);
  } else {
    seed(seed_planes<T, kSecond, 1>, kThreads, kThreads);
  }
}

// scores (N, C, *T), labels and adversarial (N, *T); see the CPU op.
std::tuple<Tensor, Tensor> dag_seed(Tensor scores, Tensor labels, std::optional<Tensor> adversarial,
                                    std::string objective, int64_t ignore_index, double margin) {
  const Launcher launch("dag_seed", scores);
  TargetSeedCall call(scores, labels, adversarial, objective, ignore_index, margin);
  return call.run([&](auto type, auto second) {
    seed_targets<decltype(type), second.value>(scores.size(0), call.args(), launch);
  });
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "dag_seed", dag_seed)

}  // namespace dagcore
