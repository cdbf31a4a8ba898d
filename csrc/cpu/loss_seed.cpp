// loss_seed on the CPU: strips of targets go through the cache, read once and written once.
#include "../loss_seed.h"

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "../registration.h"
#include "memory.h"
#include "simd.h"
#include "targets.h"

namespace dagcore {
namespace {

constexpr int kStrip = 256;                 // targets of a strip, at most
constexpr int kStripRoom = kStrip + 16;     // elements of its arrays; see kRoom
constexpr int64_t kStripBytes = 256 << 10;  // of its scores, roughly
constexpr int kLanes = 8;                   // of the sum of losses

// `count` targets in a row: where the first lies in each operand, in elements. Their scores, and
// then their features, are copied to `work`, one row a class.
template <typename Real>
struct Strip {
  int64_t at[kLossOperands];
  int count;
  Real* work;
  int64_t pitch;

  DAGCORE_INLINE Real* row(int64_t c) const { return work + c * pitch; }
};

// What is known of them, as arrays so that targets are the vector's lanes.
template <typename Real, typename Index>
struct alignas(64) LossRow {
  Index label[kStripRoom];
  Index adversarial[kStripRoom];  // the label once more where the loss is not targeted
  Real top[4][kStripRoom];
  Index top_at[4][kStripRoom];
  Real own[kStripRoom], aim[kStripRoom];  // scores, or features, of the two labels
  Real size[kStripRoom], sum[kStripRoom], squares[kStripRoom];
  Real part[kStripRoom], part_squares[kStripRoom];
  Real omega[kStripRoom];  // class weights of the labels
  Real loss[kStripRoom];
  Real scale[kStripRoom], at_aim[kStripRoom];  // see Dense
  Real value[5][kStripRoom];                   // see Terms
  Index value_at[5][kStripRoom];

  template <int kTops>
  DAGCORE_INLINE Tops<Real, Index, kTops> tops(int i) const {
    Tops<Real, Index, kTops> tops;
    for (int t = 0; t < kTops; ++t) {
      tops.score[t] = top[t][i];
      tops.at[t] = top_at[t][i];
    }
    return tops;
  }
  template <int kTops>
  DAGCORE_INLINE void keep(const Tops<Real, Index, kTops>& tops, int i) {
    for (int t = 0; t < kTops; ++t) {
      top[t][i] = tops.score[t];
      top_at[t][i] = tops.at[t];
    }
  }
};

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

// Asks for `count` neighbours in memory, which may lie beyond a tensor's end.
template <int kWrite, typename T>
DAGCORE_INLINE void prefetch(const T* from, int count) {
  constexpr int kLine = 64 / sizeof(T);
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(from + i, kWrite, 2);
}

// Copies the scores and finds the largest. Where classes are planes, a strip has so short a piece
// of each that the processor does not foresee the next: it is told.
template <typename T, int kTops, typename Real, typename Index>
DAGCORE_INLINE void read_strip(const LossArgs& args, const Strip<Real>& strip,
                               LossRow<Real, Index>* row) {
  const int64_t stride = args.walk.inner_stride(kLossScores), classes = args.labelling.classes;
  const T* scores = static_cast<const T*>(args.scores) + strip.at[kLossScores];
  const T* seed = static_cast<const T*>(args.seed) + strip.at[kLossSeed];
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

// What the rows of the strip hold at the classes; anything where a class is none.
template <typename Real, typename Index>
DAGCORE_INLINE void look_up(const Strip<Real>& strip, const Index* classes, Real* out) {
  const Real* work = strip.work;
  const int64_t pitch = strip.pitch;
  const int count = strip.count;
  for (int i = 0; i < count; ++i) {
    const int64_t c = classes[i] > 0 ? classes[i] : 0;
    out[i] = work[c * pitch + i];
  }
}

// Puts feature(score, i) in place of the scores, and sums features and their squares.
template <bool kSum, bool kSquares, typename Real, typename Index, typename Feature>
DAGCORE_INLINE void sum_features(int64_t classes, const Strip<Real>& strip,
                                 LossRow<Real, Index>* row, const Feature& feature) {
  const int count = strip.count;
  for (int i = 0; i < count; ++i) row->sum[i] = row->squares[i] = 0;
  for (int64_t begin = 0; begin < classes; begin += kSummed) {
    for (int i = 0; i < count; ++i) row->part[i] = row->part_squares[i] = 0;
    for (int64_t c = begin; c < std::min(begin + kSummed, classes); ++c) {
      Real* work = strip.row(c);
      for (int i = 0; i < count; ++i) {
        const Real value = feature(work[i], i);
        work[i] = value;
        if (kSum) row->part[i] += value;
        if (kSquares) row->part_squares[i] += value * value;
      }
    }
    for (int i = 0; i < count; ++i) {
      if (kSum) row->sum[i] += row->part[i];
      if (kSquares) row->squares[i] += row->part_squares[i];
    }
  }
}

template <bool kSquares, typename Real, typename Index>
DAGCORE_INLINE void exponentiate(int64_t classes, const Strip<Real>& strip,
                                 LossRow<Real, Index>* row) {
  const auto feature = [&](Real score, int i) __attribute__((always_inline)) {
    return exp_nonpositive(score - row->top[0][i]);
  };
  sum_features<true, kSquares>(classes, strip, row, feature);
}

// Divides the scores by the largest magnitude among them, so that no square overflows.
template <typename Real, typename Index>
DAGCORE_INLINE void normalize(int64_t classes, const Strip<Real>& strip,
                              LossRow<Real, Index>* row) {
  const int count = strip.count;
  for (int i = 0; i < count; ++i) row->size[i] = 0;
  for (int64_t c = 0; c < classes; ++c) {
    const Real* work = strip.row(c);
    for (int i = 0; i < count; ++i) {
      const Real magnitude = work[i] < 0 ? -work[i] : work[i];
      row->size[i] = magnitude > row->size[i] ? magnitude : row->size[i];
    }
  }
  const auto feature = [&](Real score, int i) __attribute__((always_inline)) {
    return feature_of_size(score, row->size[i]);
  };
  sum_features<false, true>(classes, strip, row, feature);
}

template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void judge_dense(LossRule<Real> rule, int count, LossRow<Real, Index>* row) {
  for (int i = 0; i < count; ++i) {
    const Real top = row->top[0][i], aim = row->aim[i], squares = row->squares[i];
    const bool right = row->top_at[0][i] == row->adversarial[i];
    Dense<Real> dense;
    if constexpr (kLoss == Loss::masked_spherical) {
      dense = spherical_loss(rule, row->size[i], aim, squares, right);
    } else {
      dense = softmax_loss<kLoss>(rule, aim - top, row->sum[i], squares, right);
    }
    row->loss[i] = dense.loss;
    row->scale[i] = dense.scale;
    row->at_aim[i] = dense.at_aim;
  }
}

template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void judge_sparse(LossRule<Real> rule, int count, LossRow<Real, Index>* row) {
  for (int i = 0; i < count; ++i) {
    const auto tops = row->template tops<tops_of(kLoss)>(i);
    const Index label = row->label[i], adversarial = row->adversarial[i];
    Terms<Real, Index, terms_of(kLoss)> terms;
    if constexpr (kLoss == Loss::dlr) {
      terms = dlr_loss(rule, tops, label, adversarial, row->own[i], row->aim[i]);
    } else {
      terms = margin_loss<kLoss>(rule, tops, label, adversarial, row->own[i], row->aim[i]);
    }
    row->loss[i] = terms.loss;
    for (int t = 0; t < terms_of(kLoss); ++t) {
      row->value[t][i] = terms.value[t];
      row->value_at[t][i] = terms.at[t];
    }
  }
}

// Class weights; nothing of targets that do not count, NaN of those whose scores have no finite
// maximum.
template <Loss kLoss, typename Real, typename Index>
DAGCORE_INLINE void settle_losses(int count, LossRow<Real, Index>* row, uint32_t* hits) {
  constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();
  uint32_t sum = 0, bad = 0;
  for (int i = 0; i < count; ++i) {
    const Index label = row->label[i], adversarial = row->adversarial[i];
    const Real top = row->top[0][i], omega = row->omega[i];
    const bool counted = (label >= 0) & (adversarial >= 0), whole = counted & (top - top == 0);
    const Real loss = omega * row->loss[i];
    row->loss[i] = whole ? loss : counted ? kNan : Real{0};
    if constexpr (is_sparse(kLoss)) {
      for (int t = 0; t < terms_of(kLoss); ++t) {
        const Real value = omega * row->value[t][i];
        row->value[t][i] = whole ? value : Real{0};
      }
    } else {
      const Real scale = omega * row->scale[i], at_aim = omega * row->at_aim[i];
      row->scale[i] = whole ? scale : Real{0};
      row->at_aim[i] = whole ? at_aim : Real{0};
    }
    sum += counted & ((row->top_at[0][i] == label) | (top != top));
    bad |= is_out_of_range(label, adversarial);
  }
  *hits = sum | (bad ? kOutOfRangeFlag : 0);
}

// The sum of the losses in an order of its own, whatever the vector's width.
template <typename Real>
DAGCORE_INLINE void add_losses(int count, const Real* loss, double* sum) {
  double lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += loss[i + lane];
  }
  for (; i < count; ++i) lanes[i % kLanes] += loss[i];
  *sum = 0;
  for (double lane : lanes) *sum += lane;
}

template <typename T, typename Real, typename Index>
DAGCORE_INLINE void write_dense(const LossArgs& args, const Strip<Real>& strip,
                                const LossRow<Real, Index>* row) {
  const int64_t stride = args.walk.inner_stride(kLossSeed), classes = args.labelling.classes;
  T* seed = static_cast<T*>(args.seed) + strip.at[kLossSeed];
  const int count = strip.count;
  for (int64_t c = 0; c < classes; ++c, seed += args.seed_class) {
    const Real* work = strip.row(c);
    for (int i = 0; i < count; ++i) {
      const Real at_aim = row->at_aim[i], elsewhere = row->scale[i] * work[i];
      const bool here = row->adversarial[i] == static_cast<Index>(c);
      seed[i * stride] = store_seed<T>(elsewhere + (here ? at_aim : Real{0}));
    }
  }
}

template <typename T, int kTerms, typename Real, typename Index>
DAGCORE_INLINE void write_sparse(const LossArgs& args, const Strip<Real>& strip,
                                 const LossRow<Real, Index>* row) {
  const int64_t stride = args.walk.inner_stride(kLossSeed), classes = args.labelling.classes;
  T* seed = static_cast<T*>(args.seed) + strip.at[kLossSeed];
  const int count = strip.count;
  for (int64_t c = 0; c < classes; ++c, seed += args.seed_class) {
    for (int i = 0; i < count; ++i) {
      Real value = 0;
      for (int t = 0; t < kTerms; ++t) {
        const Real there = row->value[t][i];
        value += row->value_at[t][i] == static_cast<Index>(c) ? there : Real{0};
      }
      seed[i * stride] = store_seed<T>(value);
    }
  }
}

// The seed of a strip, the sum of its losses, and its hits.
template <typename T, Loss kLoss, typename Real, typename Index>
uint32_t seed_strip(Simd simd, const LossArgs& args, LossRule<Real> rule, const Strip<Real>& strip,
                    LossRow<Real, Index>* row, double* sum) {
  const auto& walk = args.walk;
  const int64_t classes = args.labelling.classes;
  const int count = strip.count;
  run_simd<read_labels<Index, false>>(simd, args.labels, strip.at[kLossLabels],
                                      walk.inner_stride(kLossLabels), count, args.labelling,
                                      row->label);
  if (rule.targeted) {
    run_simd<read_labels<Index, true>>(simd, args.adversarial, strip.at[kLossAdversarial],
                                       walk.inner_stride(kLossAdversarial), count, args.labelling,
                                       row->adversarial);
  } else {
    std::copy_n(row->label, count, row->adversarial);
  }
  if (const Real* weights = static_cast<const Real*>(args.class_weights)) {
    for (int i = 0; i < count; ++i) row->omega[i] = weights[std::max<Index>(row->label[i], 0)];
  } else {
    std::fill_n(row->omega, count, Real{1});
  }
  run_simd<read_strip<T, tops_of(kLoss), Real, Index>>(simd, args, strip, row);
  if constexpr (kLoss == Loss::masked_spherical) {
    run_simd<normalize<Real, Index>>(simd, classes, strip, row);
  }
  if (is_sparse(kLoss)) run_simd<look_up<Real, Index>>(simd, strip, row->label, row->own);
  run_simd<look_up<Real, Index>>(simd, strip, row->adversarial, row->aim);
  uint32_t hits = 0;
  if constexpr (is_sparse(kLoss)) {
    run_simd<judge_sparse<kLoss, Real, Index>>(simd, rule, count, row);
    run_simd<settle_losses<kLoss, Real, Index>>(simd, count, row, &hits);
    run_simd<write_sparse<T, terms_of(kLoss), Real, Index>>(simd, args, strip, row);
  } else {
    if constexpr (kLoss != Loss::masked_spherical) {
      run_simd<exponentiate<kLoss == Loss::cosine, Real, Index>>(simd, classes, strip, row);
    }
    run_simd<judge_dense<kLoss, Real, Index>>(simd, rule, count, row);
    run_simd<settle_losses<kLoss, Real, Index>>(simd, count, row, &hits);
    run_simd<write_dense<T, Real, Index>>(simd, args, strip, row);
  }
  run_simd<add_losses<Real>>(simd, count, row->loss, sum);
  return hits;
}

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

template <typename T, Loss kLoss>
void seed_targets(int64_t images, const LossArgs& args, double* sums) {
  using Real = RealOf<T>;
  using Index = IndexOf<Real>;
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
    const std::unique_ptr<void, AlignedDelete> work(
        ::operator new(sizeof(Real) * classes * pitch, std::align_val_t{64}));
    LossRow<Real, Index> row;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % strips * strip_size;
      const int64_t n = item / strips / rows;
      Strip<Real> strip{{},
                        static_cast<int>(std::min(strip_size, inner - first)),
                        static_cast<Real*>(work.get()),
                        pitch};
      args.walk.locate(n, item / strips % rows * inner + first, strip.at);
      add_active(args.hits + n, seed_strip<T, kLoss>(simd, args, args.rule_of<Real>(n), strip, &row,
                                                     &strip_sums[item]));
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
    seed_targets<decltype(type), loss.value>(scores.size(0), call.args(),
                                             static_cast<double*>(call.sums.mutable_data_ptr()));
  });
}

}  // namespace

DAGCORE_REGISTER(CPU, "loss_seed", loss_seed)

}  // namespace dagcore
