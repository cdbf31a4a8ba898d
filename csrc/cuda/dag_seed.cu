// dag_seed on CUDA: one kernel that reads the scores once and writes the seed once.
#include "../dag_seed.h"
#include "labels.cuh"
#include "launch.h"
#include "pack.cuh"

namespace dagcore {
namespace {

constexpr int kThreads = 256;      // targets (or packs of them) a block, where classes are planes
constexpr int kBlocksPerUnit = 3;  // what registers must leave room for
constexpr int kRows = 128;         // targets a block, where each target's classes lie side by side
constexpr int kColumns = 32;       // classes of a row read at once
constexpr int kUnroll = 4;         // classes loaded before the first is compared

struct SeedArgs {
  const void* scores;
  void* seed;
  int64_t scores_batch, scores_class, seed_batch, seed_class;
  LabelSource labels, adversarial;
  LabelRule rule;
  Objective objective;
  uint32_t* active;
  int64_t targets;           // of an image
  int64_t blocks_per_image;  // a block works on one image, so that it counts for one
  Walk<kSeedOperands> walk;

  explicit SeedArgs(const SeedCall& call)
      : scores(call.scores.const_data_ptr()),
        seed(call.seed.mutable_data_ptr()),
        scores_batch(call.scores.stride(0)),
        scores_class(call.scores.stride(1)),
        seed_batch(call.seed.stride(0)),
        seed_class(call.seed.stride(1)),
        labels(call.labels),
        adversarial(call.adversarial),
        rule(call.rule),
        objective(call.objective),
        active(static_cast<uint32_t*>(call.active.mutable_data_ptr())),
        targets(call.walk.rows() * call.walk.inner()),
        blocks_per_image(0),
        walk(call.walk) {}
};

// Where a target's data begin in each operand, within its image.
__device__ void locate(const Walk<kSeedOperands>& walk, int64_t target,
                       int64_t (&at)[kSeedOperands]) {
  const int64_t inner = walk.inner();
  const int64_t row = walk.dims == 1 ? 0 : target / inner;
  walk.row_offsets(row, at);
#pragma unroll
  for (int k = 0; k < kSeedOperands; ++k) at[k] += (target - row * inner) * walk.inner_stride(k);
}

template <typename T, bool kRunnerUp>
__device__ Verdict<int32_t> judge_target(const SeedArgs& args, int64_t n, int64_t label_at,
                                         int64_t adversarial_at,
                                         const Top<T, int32_t, kRunnerUp>& top, uint32_t* sum,
                                         bool* bad) {
  const int32_t label = static_cast<int32_t>(read_label(args.labels.read(n, label_at), args.rule));
  const int32_t adversarial = kRunnerUp ? top.runner_up(label)
                                        : static_cast<int32_t>(read_adversarial(
                                              args.adversarial.read(n, adversarial_at), args.rule));
  const Verdict<int32_t> verdict = judge<int32_t>(args.objective, label, adversarial,
                                                  top.best_class, Score<T>::is_nan(top.best));
  *sum += verdict.plus >= 0;
  *bad |= is_out_of_range(label, adversarial);
  return verdict;
}

// A thread works on V neighbouring targets, class after class: with V > 1 targets are neighbours in
// memory and packs are aligned; with V = 1 strides are free.
template <typename T, bool kRunnerUp, int V>
__global__ void __launch_bounds__(kThreads, kRunnerUp&& V == 8 ? 2 : kBlocksPerUnit)
    seed_planes(const __grid_constant__ SeedArgs args) {
  const int64_t n = blockIdx.x / args.blocks_per_image;
  const int64_t first =
      (blockIdx.x % args.blocks_per_image * kThreads + static_cast<int64_t>(threadIdx.x)) * V;
  const int32_t classes = static_cast<int32_t>(args.rule.classes);
  uint32_t sum = 0;
  bool bad = false;
  if (first < args.targets) {
    int64_t at[kSeedOperands];
    locate(args.walk, first, at);
    const T* scores = static_cast<const T*>(args.scores) + n * args.scores_batch + at[kScores];
    T* seed = static_cast<T*>(args.seed) + n * args.seed_batch + at[kSeed];
    const auto load = [&](int32_t c) {
      return *reinterpret_cast<const Pack<T, V>*>(scores + c * args.scores_class);
    };

    Top<T, int32_t, kRunnerUp> top[V];
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
      verdict[v] = judge_target<T, kRunnerUp>(
          args, n, at[kLabels] + v * args.walk.inner_stride(kLabels),
          at[kAdversarial] + v * args.walk.inner_stride(kAdversarial), top[v], &sum, &bad);
    }
    for (c = 0; c < classes; ++c) {
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.value[v] = Score<T>::from_int(seed_at(verdict[v], c));
      *reinterpret_cast<Pack<T, V>*>(seed + c * args.seed_class) = pack;
    }
  }
  add_active(args.active + n, sum, bad);
}

// A target's classes lie side by side: warps copy rows through shared memory, so that reads and
// writes are whole lines while each thread still sees one target's classes in order.
template <typename T, bool kRunnerUp>
__global__ void __launch_bounds__(kRows, kBlocksPerUnit)
    seed_rows(const __grid_constant__ SeedArgs args) {
  __shared__ T tile[kRows][kColumns + 1];
  __shared__ int64_t scores_at[kRows], seed_at_row[kRows];
  __shared__ Verdict<int32_t> verdicts[kRows];
  const int64_t n = blockIdx.x / args.blocks_per_image;
  const int64_t first = blockIdx.x % args.blocks_per_image * kRows;
  const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), args.targets - first));
  const int32_t classes = static_cast<int32_t>(args.rule.classes);
  const int mine = threadIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* scores = static_cast<const T*>(args.scores) + n * args.scores_batch;
  T* seed = static_cast<T*>(args.seed) + n * args.seed_batch;

  int64_t at[kSeedOperands] = {};
  if (mine < rows) locate(args.walk, first + mine, at);
  scores_at[mine] = at[kScores];
  seed_at_row[mine] = at[kSeed];
  __syncthreads();

  Top<T, int32_t, kRunnerUp> top;
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

  uint32_t sum = 0;
  bool bad = false;
  if (mine < rows) {
    verdicts[mine] =
        judge_target<T, kRunnerUp>(args, n, at[kLabels], at[kAdversarial], top, &sum, &bad);
  }
  __syncthreads();
  for (int row = warp; row < rows; row += kRows / 32) {
    const Verdict<int32_t> verdict = verdicts[row];
    for (int32_t c = lane; c < classes; c += 32) {
      seed[seed_at_row[row] + c] = Score<T>::from_int(seed_at(verdict, c));
    }
  }
  add_active(args.active + n, sum, bad);
}

// Whether packs of V targets are whole and aligned in both the scores and the seed.
template <typename T>
bool packs_fit(const SeedArgs& args) {
  constexpr int V = kPackSize<T>;
  bool fit = aligned(args.scores) && aligned(args.seed) && args.walk.inner() % V == 0 &&
             args.scores_batch % V == 0 && args.scores_class % V == 0 && args.seed_batch % V == 0 &&
             args.seed_class % V == 0;
  for (int k : {kScores, kSeed}) {
    fit = fit && args.walk.inner_stride(k) == 1;
    for (int d = 0; d < args.walk.dims - 1; ++d) fit = fit && args.walk.stride[d][k] % V == 0;
  }
  return fit;
}

template <typename T, bool kRunnerUp>
void seed_targets(const SeedCall& call, const Launcher& launch) {
  SeedArgs args(call);
  // Sets how many blocks of `per_block` targets an image takes; returns all images' blocks.
  const auto blocks_of = [&](int64_t per_block) {
    args.blocks_per_image = ceil_div(args.targets, per_block);
    return call.scores.size(0) * args.blocks_per_image;
  };
  constexpr int V = kPackSize<T>;
  if (args.scores_class == 1 && args.seed_class == 1 && args.rule.classes > 1) {
    const int64_t blocks = blocks_of(kRows);
    launch(seed_rows<T, kRunnerUp>, blocks, kRows, args);
  } else if (packs_fit<T>(args)) {
    const int64_t blocks = blocks_of(kThreads * V);
    launch(seed_planes<T, kRunnerUp, V>, blocks, kThreads, args);
  } else {
    const int64_t blocks = blocks_of(kThreads);
    launch(seed_planes<T, kRunnerUp, 1>, blocks, kThreads, args);
  }
}

// scores (N, C, *T), labels and adversarial (N, *T); see the CPU's.
std::tuple<Tensor, Tensor> dag_seed(Tensor scores, Tensor labels, std::optional<Tensor> adversarial,
                                    std::string objective, int64_t ignore_index) {
  const Launcher launch("dag_seed", scores);
  const SeedCall call(scores, labels, adversarial, objective_named(objective), ignore_index);
  if (scores.numel() == 0) return {call.seed, call.active};
  for_float_type("scores", scores.scalar_type(), [&](auto type) {
    using T = decltype(type);
    call.runner_up ? seed_targets<T, true>(call, launch) : seed_targets<T, false>(call, launch);
  });
  return {call.seed, call.active};
}

}  // namespace

DAGCORE_REGISTER(DAGCORE_CUDA_KEY, "dag_seed", dag_seed)

}  // namespace dagcore
