// One target of the attack: which class wins, whether the target is still active, what to seed
// where. Included by the CPU loops and by the CUDA kernels, so that both compute the same thing.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#if defined(__CUDACC__)
#define DAGCORE_INLINE __host__ __device__ __forceinline__
#else
#define DAGCORE_INLINE inline __attribute__((always_inline))
#endif

namespace dagcore {

// A product that is rounded before anything is added to it, on every device: nvcc would fuse the
// two, and the result would differ from the CPU's.
template <typename Real>
DAGCORE_INLINE Real product(Real a, Real b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Real) == 4) return __fmul_rn(a, b);
  if constexpr (sizeof(Real) == 8) return __dmul_rn(a, b);
#endif
  return a * b;
}

// Only their bits are used: the conversions in step.h give the same bits on every device and at
// every vector width.
using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The goal of an attack at a target. Ops take it by name, so that a new objective changes no
// schema.
enum class Objective : int {
  leave,  // the argmax should be any class but the label
  reach,  // the argmax should be the adversarial label
};
constexpr const char* kObjectives[] = {"leave", "reach"};  // in the same order

// Scores are compared through keys: `beats` is torch.argmax's order, in which NaN is the largest
// value and the first of equals wins. `Index` is the integer as wide as the key, so that keys and
// class indices share a vector's lanes.
template <typename T>
struct Score;

template <typename Float, typename Int>
struct FloatScore {
  using Key = Float;
  using Index = Int;
  DAGCORE_INLINE static Key key(Float value) { return value; }
  DAGCORE_INLINE static bool is_nan(Key key) { return key != key; }
  DAGCORE_INLINE static bool beats(Key key, Key best) { return !(key <= best) & (best == best); }
  DAGCORE_INLINE static Float from_int(int value) { return static_cast<Float>(value); }
};
template <>
struct Score<float> : FloatScore<float, int32_t> {};
template <>
struct Score<double> : FloatScore<double, int64_t> {};

// 16-bit floats never need converting: sign and magnitude make an integer of the same order, in
// which both zeros are 0 and every NaN is the maximum.
template <typename T, int kInfinity, int kOne>
struct ShortScore {
  using Key = int16_t;
  using Index = int16_t;
  static constexpr int16_t kNan = 0x7fff;
  DAGCORE_INLINE static Key key(T value) {
    const int16_t magnitude = static_cast<int16_t>(value.x & 0x7fff);
    const int16_t ordered =
        static_cast<int16_t>(value.x) < 0 ? static_cast<int16_t>(-magnitude) : magnitude;
    return magnitude > kInfinity ? kNan : ordered;
  }
  DAGCORE_INLINE static bool is_nan(Key key) { return key == kNan; }
  DAGCORE_INLINE static bool beats(Key key, Key best) { return key > best; }
  DAGCORE_INLINE static T from_int(int value) {
    return T(static_cast<uint16_t>(value == 0 ? 0 : (value > 0 ? kOne : kOne | 0x8000)),
             T::from_bits());
  }
};
template <>
struct Score<Half> : ShortScore<Half, 0x7c00, 0x3c00> {};
template <>
struct Score<BFloat16> : ShortScore<BFloat16, 0x7f80, 0x3f80> {};

template <typename Real>
using IndexOf = typename Score<Real>::Index;

// Labels as the kernels see them: a class index, or one of these.
constexpr int kUncounted = -1;   // ignored, or nothing to gain: never active
constexpr int kOutOfRange = -2;  // an error by the caller, reported through the counts

struct LabelRule {
  int64_t classes;
  int64_t ignore_index;
};

DAGCORE_INLINE int64_t read_label(int64_t label, LabelRule rule) {
  if (label == rule.ignore_index) return kUncounted;
  return label >= 0 && label < rule.classes ? label : kOutOfRange;
}

// An adversarial label may be any class, even the one that is ignored as a true label.
DAGCORE_INLINE int64_t read_adversarial(int64_t label, LabelRule rule) {
  if (label >= 0 && label < rule.classes) return label;
  return label == rule.ignore_index ? kUncounted : kOutOfRange;
}

// Whether the labels of a target, as read above, are an error by the caller.
template <typename Index>
DAGCORE_INLINE bool is_out_of_range(Index label, Index adversarial) {
  return (label == kOutOfRange) | ((label >= 0) & (adversarial == kOutOfRange));
}

// What an active target adds to the seed: +1 at `plus`, -1 at `minus`; both negative if it is not
// active. A target with a NaN among its scores (`top_is_nan`) is never taken for a success.
template <typename Index>
struct Verdict {
  Index plus;
  Index minus;
};

// `label` and `adversarial` come from read_label and read_adversarial, `top` is the argmax. `near`
// says that less than the margin lies between the winner and the label (leave) or `second` (reach),
// so that a target that is already won stays active.
template <typename Index>
DAGCORE_INLINE Verdict<Index> judge(Objective objective, Index label, Index adversarial, Index top,
                                    bool top_is_nan, bool near = false, Index second = kUncounted) {
  const bool reach = objective == Objective::reach;
  const bool counts = (label >= 0) & (adversarial >= 0) & (reach | (label != adversarial));
  const bool won = reach ? top == adversarial : top != label;
  near &= !reach | (second >= 0);
  const bool active = counts & (!won | near | top_is_nan);
  const Index minus = reach ? (won & near ? second : top) : label;
  return {active ? adversarial : static_cast<Index>(kUncounted),
          active ? minus : static_cast<Index>(kUncounted)};
}

// The seed of one class. Plus and minus can meet in one class only where the top score is NaN.
template <typename Index>
DAGCORE_INLINE int seed_at(Verdict<Index> verdict, Index c) {
  return static_cast<int>(verdict.plus == c) - static_cast<int>(verdict.minus == c);
}

// The running winner, and with kSecond the winner among the rest, over classes in rising order.
template <typename T, typename Index, bool kSecond>
struct Top {
  using Key = typename Score<T>::Key;
  Key best, second;
  Index best_class, second_class;

  DAGCORE_INLINE void first(Key key) {
    best = key;
    best_class = 0;
    second_class = kUncounted;
  }
  DAGCORE_INLINE void next(Key key, Index c) {
    const bool wins = Score<T>::beats(key, best);
    if (kSecond) {
      const bool follows = second_class < 0 || Score<T>::beats(key, second);
      second = wins ? best : (follows ? key : second);
      second_class = wins ? best_class : (follows ? c : second_class);
    }
    best = wins ? key : best;
    best_class = wins ? c : best_class;
  }
  // The strongest class other than `label`; kUncounted where there is no other class.
  DAGCORE_INLINE Index runner_up(Index label) const {
    return best_class == label ? second_class : best_class;
  }
};

// Added to an image's count of active targets by an out-of-range label: it makes the count
// negative whatever else is added, in any order.
constexpr uint32_t kOutOfRangeFlag = 0x80000000u;

}  // namespace dagcore
