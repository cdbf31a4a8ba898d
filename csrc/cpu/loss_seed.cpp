// loss_seed on the CPU: strips of targets pass through the cache, read once and written once.
#include <algorithm>
#include <vector>

#include "../registration.h"
#include "loss_strips.h"
#include "memory.h"

namespace dagcore {
namespace {

constexpr int64_t kStripBytes = 256 << 10;  // of a strip's scores, roughly

template <typename T, int kTops, bool kFirst, typename Real, typename Index>
DAGCORE_INLINE void read_class(const T* scores, int64_t stride, Index c, int count, Real* work,
                               LossRow<Real, Index>* row) {
  for (int i = 0; i < count; ++i) {
    const Real score = Pixel<T>::load(scores[i * stride]);
    work[i] = score;
    Tops<Real, Index, kTops> tops;
    if (kFirst) {
      tops.first(score);
    } else {
      tops = row->template tops<kTops>(i);
      tops.next(score, c);
    }
    row->keep(tops, i);
  }
}

// Prefetches `count` neighbours in memory, which may lie beyond a tensor's end.
template <int kWrite, typename T>
DAGCORE_INLINE void prefetch(const T* from, int count) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(from + i, kWrite, 2);
}

// Copies the scores and finds the largest. If classes are planes, a strip's piece of each is too
// short for the processor to predict the next, so it is prefetched.
template <typename T, int kTops, typename Real, typename Index>
DAGCORE_INLINE void read_strip(const LossArgs& args, const int64_t (&at)[kLossOperands],
                               const Strip<Real>& strip, LossRow<Real, Index>* row) {
  const int64_t stride = args.walk.inner_stride(kLossScores), classes = args.labelling.classes;
  const T* scores = static_cast<const T*>(args.scores) + at[kLossScores];
  const T* seed = static_cast<const T*>(args.seed) + at[kLossSeed];
  const bool planes = stride == 1 && args.walk.inner_stride(kLossSeed) == 1;
  for (Index c = 0; c < classes; ++c, scores += args.scores_class, seed += args.seed_class) {
    if (planes) {
      prefetch<0>(scores + strip.count, strip.count);
      prefetch<1>(seed, strip.count);
    }
    if (c == 0) {
      read_class<T, kTops, true>(scores, stride, c, strip.count, strip.row(c), row);
    } else {
      read_class<T, kTops, false>(scores, stride, c, strip.count, strip.row(c), row);
    }
  }
}

template <typename T, Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void write_strip(const LossArgs& args, const int64_t (&at)[kLossOperands],
                                const Strip<Real>& strip, const LossRow<Real, Index>* row) {
  const int64_t stride = args.walk.inner_stride(kLossSeed), classes = args.labelling.classes;
  T* seed = static_cast<T*>(args.seed) + at[kLossSeed];
  const int count = strip.count;
  for (Index c = 0; c < classes; ++c, seed += args.seed_class) {
    const Real* work = strip.row(c);
    for (int i = 0; i < count; ++i) {
      seed[i * stride] = store_seed<T>(gradient_at<kLoss>(*row, work[i], i, c));
    }
  }
}

// Computes the seed of a strip, which lies `at` in each operand, the sum of its losses, and its
// hits.
template <typename T, Loss kLoss, typename Real, typename Index>
uint32_t seed_strip(Simd simd, const LossArgs& args, LossRule<Real> rule,
                    const int64_t (&at)[kLossOperands], const Strip<Real>& strip,
                    LossRow<Real, Index>* row, double* sum) {
  const auto& walk = args.walk;
  run_simd<read_labels<Index, false>>(simd, args.labels, at[kLossLabels],
                                      walk.inner_stride(kLossLabels), strip.count, args.labelling,
                                      row->label);
  if (rule.targeted) {
    run_simd<read_labels<Index, true>>(simd, args.adversarial, at[kLossAdversarial],
                                       walk.inner_stride(kLossAdversarial), strip.count,
                                       args.labelling, row->adversarial);
  }
  run_simd<read_strip<T, tops_of(kLoss), Real, Index>>(simd, args, at, strip, row);
  const uint32_t hits = judge_strip<kLoss>(simd, args, rule, strip, row, sum);
  run_simd<write_strip<T, kLoss, Real, Index>>(simd, args, at, strip, row);
  return hits;
}

template <typename Real>
using SeedStrip = uint32_t(Simd, const LossArgs&, LossRule<Real>, const int64_t (&)[kLossOperands],
                           const Strip<Real>&, LossRow<Real, IndexOf<Real>>*, double*);

template <typename Real>
void seed_targets(int64_t images, const LossArgs& args, SeedStrip<Real>* seed_strip, double* sums) {
  const Simd simd = simd_in_use();
  const int64_t classes = args.labelling.classes, rows = args.walk.rows();
  const int64_t inner = args.walk.inner();
  const int64_t fits = kStripBytes / (classes * static_cast<int64_t>(sizeof(Real))) / 16 * 16;
  const int64_t strip_size = std::min(std::clamp<int64_t>(fits, 16, kStrip), inner);
  const int64_t strips = (inner + strip_size - 1) / strip_size;
  const int64_t pitch = (strip_size + 31) / 16 * 16;
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 15) / (strip_size * classes));

  std::vector<double> strip_sums(images * rows * strips);
  torch::stable::parallel_for(0, images * rows * strips, grain, [&](int64_t begin, int64_t end) {
    const auto work = aligned_array<Real>(classes * pitch);
    LossRow<Real, IndexOf<Real>> row;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % strips * strip_size;
      const int64_t n = item / strips / rows;
      const Strip<Real> strip{static_cast<int>(std::min(strip_size, inner - first)), work.get(),
                              pitch};
      int64_t at[kLossOperands];
      args.walk.locate(n, item / strips % rows * inner + first, at);
      const uint32_t hits =
          seed_strip(simd, args, args.rule_of<Real>(n), at, strip, &row, &strip_sums[item]);
      add_active(args.hits + n, hits);
    }
  });
  for (int64_t item = 0; item < images * rows * strips; ++item) {
    sums[item / strips / rows] += strip_sums[item];
  }
}

// scores (N, C, *T), labels and adversarial (N, *T), blend (N,), class_weights (C,); see
// dagcore/ops. Returns the seed, laid out like scores, the sums of the losses (N,), double, and the
// hits (N,), int32.
std::tuple<Tensor, Tensor, Tensor> loss_seed(Tensor scores, Tensor labels,
                                             std::optional<Tensor> adversarial, std::string loss,
                                             std::optional<Tensor> blend, double q, double kappa,
                                             std::optional<Tensor> class_weights,
                                             int64_t ignore_index) {
  LossSeedCall call(scores, labels, adversarial, loss, blend, q, kappa, class_weights,
                    ignore_index);
  advise_huge_pages(call.seed.mutable_data_ptr(), call.seed.numel() * call.seed.element_size());
  return call.run([&](auto type, auto loss) {
    using Real = RealOf<decltype(type)>;
    seed_targets<Real>(scores.size(0), call.args(),
                       seed_strip<decltype(type), loss.value, Real, IndexOf<Real>>,
                       static_cast<double*>(call.sums.mutable_data_ptr()));
  });
}

}  // namespace

DAGCORE_REGISTER(CPU, "loss_seed", loss_seed)

}  // namespace dagcore
