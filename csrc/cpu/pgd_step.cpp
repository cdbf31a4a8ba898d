// pgd_step_ on the CPU: a pass for each sum that the step needs, then one that moves the pixels.
#include "../pgd_step.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "../registration.h"
#include "pixels.h"
#include "simd.h"

namespace dagcore {
namespace {

constexpr int kLanes = 16;  // sums side by side, whatever the vector's width

using Chunk = ChunkOf<kPgdOperands>;
using Squares = std::array<uint64_t, kThresholds>;

// Computes a block, the pixels of a chunk from its `first` on: the values that `sum` adds up or,
// for kPgdSums, the new images; then it writes the momentum too. Returns the number of pixels.
template <typename T, bool kL2>
DAGCORE_INLINE int compute(const PgdArgs& args, const Chunk& chunk, int64_t first,
                           PgdStep<RealOf<T>> step, int sum, RealOf<T>* value) {
  const Row<T> gradient(args, args.gradient, kGradient, chunk, first);
  const int size = gradient.size;
  if (!step.momentum || sum == kGradientSum) {
    for (int i = 0; i < size; ++i) value[i] = gradient[i];
  } else {
    const Row<RealOf<T>> momentum(args, args.momentum, kMomentum, chunk, first);
    for (int i = 0; i < size; ++i) value[i] = step.direction(gradient[i], momentum[i]);
    if (sum == kPgdSums) momentum.store(value);
  }
  if (sum <= kDirectionSum) return size;
  const Row<T> image(args, args.images, kImages, chunk, first);
  const Row<T> origin(args, args.origin, kOrigin, chunk, first);
  const auto v = [&](int i) __attribute__((always_inline)) {
    return step.template move<kL2>(image[i], value[i]);
  };
  const auto z = [&](int i) __attribute__((always_inline)) {
    return step.template project<kL2>(v(i), origin[i], step.shrink);
  };
  if (sum == kBallSum) {
    for (int i = 0; i < size; ++i) value[i] = v(i) - origin[i];
  } else if (!args.previous) {
    for (int i = 0; i < size; ++i) value[i] = z(i);
  } else {
    const Row<T> previous(args, args.previous, kPrevious, chunk, first);
    const auto y = [&](int i) __attribute__((always_inline)) {
      return step.mix(image[i], z(i), previous[i]);
    };
    if (sum == kSecondBallSum) {
      for (int i = 0; i < size; ++i) value[i] = y(i) - origin[i];
    } else {
      for (int i = 0; i < size; ++i) {
        value[i] = step.template project<kL2>(y(i), origin[i], step.second_shrink);
      }
    }
  }
  return size;
}

// kDirectionSum in L-infinity; with momentum, only up to the first pixels that are not 0.
template <typename T>
DAGCORE_INLINE void find_direction(const PgdArgs& args, const Chunk& chunk, PgdStep<RealOf<T>> step,
                                   double* sum) {
  using Real = RealOf<T>;
  using Bits = typename Pixel<Real>::Bits;
  Real value[kBlock];
  Bits largest = 0;
  for (int64_t first = 0; first < chunk.count; first += kBlock) {
    const int size = compute<T, false>(args, chunk, first, step, kDirectionSum, value);
    for (int i = 0; i < size; ++i) {
      const Bits bits = magnitude_bits(value[i]);
      largest = bits > largest ? bits : largest;
    }
    if (step.momentum && largest > 0) break;
  }
  *sum = direction_sum<Real>(largest, step.momentum);
}

// All other sums, in float64: of magnitudes for kGradientSum, of squares otherwise. Those of a ball
// are needed in L2 alone.
template <typename T>
DAGCORE_INLINE void add_up(const PgdArgs& args, const Chunk& chunk, PgdStep<RealOf<T>> step,
                           int which, double* sum) {
  RealOf<T> value[kBlock];
  double lanes[kLanes] = {};
  for (int64_t first = 0; first < chunk.count; first += kBlock) {
    const int size = compute<T, true>(args, chunk, first, step, which, value);
    for (int i = size; i % kLanes != 0; ++i) value[i] = 0;
    if (which == kGradientSum) {
      for (int i = 0; i < size; ++i) value[i] = std::abs(value[i]);
      for (int i = 0; i < size; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += value[i + lane];
      }
    } else {
      for (int i = 0; i < size; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          lanes[lane] += static_cast<double>(value[i + lane]) * value[i + lane];
        }
      }
    }
  }
  *sum = 0;
  for (double lane : lanes) *sum += lane;
}

template <typename T, bool kL2, bool kGrid>
DAGCORE_INLINE void update(const PgdArgs& args, const Chunk& chunk, PgdStep<RealOf<T>> step,
                           Grid<RealOf<T>> grid) {
  using Real = RealOf<T>;
  Real value[kBlock], level[kBlock];
  for (int64_t first = 0; first < chunk.count; first += kBlock) {
    const int size = compute<T, kL2>(args, chunk, first, step, kPgdSums, value);
    const Row<T> image(args, args.images, kImages, chunk, first);
    if (kGrid) {
      const Row<T> origin(args, args.origin, kOrigin, chunk, first);
      for (int i = 0; i < size; ++i) {
        const Real shadow = Pixel<T>::load(Pixel<T>::store(value[i]));
        level[i] = show_pixel<true>(shadow, origin[i], grid);
      }
      Row<T>(args, args.shown, kShown, chunk, first, false).store(level);
    }
    if (args.previous) {
      Row<T>(args, args.previous, kPrevious, chunk, first, false).copy(image);
    }
    image.store(value);
  }
}

// In an L2 ball, the squared distances of the shown image at each threshold.
template <typename T>
DAGCORE_INLINE void add_squares(const PgdArgs& args, const Chunk& chunk, Grid<RealOf<T>> grid,
                                Squares* squares) {
  using Real = RealOf<T>;
  int32_t whole[kBlock];
  Real rest[kBlock];
  for (int64_t first = 0; first < chunk.count; first += kBlock) {
    const Row<T> image(args, args.images, kImages, chunk, first);
    const Row<T> origin(args, args.origin, kOrigin, chunk, first);
    const int size = image.size;
    for (int i = 0; i < size; ++i) {
      const Offset<Real> offset(image[i], origin[i], grid);
      whole[i] = offset.whole;
      rest[i] = offset.rest;
    }
    int64_t inward = 0;
    for (int i = 0; i < size; ++i) inward += static_cast<int64_t>(whole[i]) * whole[i];
    for (int k = 0; k < kThresholds; ++k) {
      const Real threshold = threshold_at<Real>(k);
      int32_t more = 0;  // at most kBlock * 2^18
      for (int i = 0; i < size; ++i) more += rest[i] > threshold ? 2 * whole[i] + 1 : 0;
      (*squares)[k] += inward + more;
    }
  }
}

template <typename T>
DAGCORE_INLINE void show(const PgdArgs& args, const Chunk& chunk, Grid<RealOf<T>> grid,
                         RealOf<T> threshold) {
  using Real = RealOf<T>;
  Real level[kBlock];
  for (int64_t first = 0; first < chunk.count; first += kBlock) {
    const Row<T> image(args, args.images, kImages, chunk, first);
    const Row<T> origin(args, args.origin, kOrigin, chunk, first);
    for (int i = 0; i < image.size; ++i) {
      level[i] = grid.at(Offset<Real>(image[i], origin[i], grid).level(threshold));
    }
    Row<T>(args, args.shown, kShown, chunk, first, false).store(level);
  }
}

template <typename T, bool kL2>
void step_all(int64_t images, const PgdArgs& args) {
  using Real = RealOf<T>;
  const Simd simd = simd_in_use();
  const Chunks<kPgdOperands> chunks(images, args.walk);
  const auto moves = [&](int64_t n) { return args.moved[n]; };
  std::vector<PgdStep<Real>> steps(images);
  for (int64_t n = 0; n < images; ++n) args.moved[n] = args.begin(n, &steps[n]);

  std::vector<double> parts(chunks.count());
  for (int which = 0; which < kPgdSums; ++which) {
    if (!args.needs(which)) continue;
    chunks.for_each(moves, [&](int64_t n, int64_t item, const Chunk& chunk) {
      if (which == kDirectionSum && !kL2) {
        run_simd<find_direction<T>>(simd, args, chunk, steps[n], &parts[item]);
      } else {
        run_simd<add_up<T>>(simd, args, chunk, steps[n], which, &parts[item]);
      }
    });
    for (int64_t n = 0; n < images; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < chunks.per_image; ++k) sum += parts[n * chunks.per_image + k];
      args.moved[n] = args.moved[n] && steps[n].learn(which, sum);
    }
  }

  const auto grid_of = [&](int64_t n) {
    return Grid<Real>(args.levels, args.lower, args.upper, args.epsilon[n]);
  };
  chunks.for_each(moves, [&](int64_t n, int64_t, const Chunk& chunk) {
    if constexpr (!kL2) {
      if (args.levels > 0) {
        return run_simd<update<T, false, true>>(simd, args, chunk, steps[n], grid_of(n));
      }
    }
    run_simd<update<T, kL2, false>>(simd, args, chunk, steps[n], Grid<Real>{});
  });
  if (args.levels == 0 || !kL2) return;
  std::vector<Squares> squares(chunks.count());
  chunks.for_each(moves, [&](int64_t n, int64_t item, const Chunk& chunk) {
    run_simd<add_squares<T>>(simd, args, chunk, grid_of(n), &squares[item]);
  });
  std::vector<Real> thresholds(images);
  for (int64_t n = 0; n < images; ++n) {
    Squares sum{};
    for (int64_t c = n * chunks.per_image; c < (n + 1) * chunks.per_image; ++c) {
      for (int k = 0; k < kThresholds; ++k) sum[k] += squares[c][k];
    }
    thresholds[n] = threshold_within<Real>(sum.data(), args.radius(n));
  }
  chunks.for_each(moves, [&](int64_t n, int64_t, const Chunk& chunk) {
    run_simd<show<T>>(simd, args, chunk, grid_of(n), thresholds[n]);
  });
}

// images, origin, gradient, momentum, previous, grid (N, *); active, alpha, epsilon, share (N,):
// see dagcore/ops. Returns which images were stepped, (N,) bool; the others are unchanged, as are
// their momentum, previous and grid.
Tensor pgd_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, std::string norm,
                Tensor alpha, Tensor epsilon, double lower, double upper,
                std::optional<Tensor> momentum, double decay, std::optional<Tensor> previous,
                std::optional<Tensor> share, std::optional<Tensor> grid, int64_t levels) {
  check_pgd_step(images, origin, gradient, active, alpha, epsilon, lower, upper, momentum, previous,
                 share, grid, levels);
  const Norm in = value_named<Norm>("norm", norm, kNorms);
  const Tensor moved = torch::stable::new_zeros(images, {images.size(0)}, ScalarType::Bool);
  if (images.numel() == 0) return moved;
  const PgdArgs args(images, origin, gradient, active, in, alpha, epsilon, lower, upper, momentum,
                     decay, previous, share, grid, levels, moved);
  for_float_type("images", images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    args.l2 ? step_all<T, true>(images.size(0), args) : step_all<T, false>(images.size(0), args);
  });
  return moved;
}

}  // namespace

DAGCORE_REGISTER(CPU, "pgd_step_", pgd_step)

}  // namespace dagcore
