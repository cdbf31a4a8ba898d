// linf_step_ on the CPU: one reduction of the gradient, then one pass over the images.
#include "../linf_step.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../registration.h"
#include "pixels.h"
#include "simd.h"

namespace dagcore {
namespace {

using Chunk = ChunkOf<kStepOperands>;

template <typename T>
DAGCORE_INLINE void find_largest(const LinfArgs& args, const Chunk& chunk,
                                 typename Pixel<T>::Bits* largest) {
  const int64_t stride = args.walk.inner_stride(kGradient);
  const T* gradient = static_cast<const T*>(args.gradient) + chunk.at[kGradient];
  typename Pixel<T>::Bits most = *largest;
  const int64_t count = chunk.count;
  for (int64_t i = 0; i < count; ++i) {
    const auto bits = magnitude_bits(gradient[i * stride]);
    most = bits > most ? bits : most;
  }
  *largest = most;
}

template <typename T, bool kBall, bool kGrid>
DAGCORE_INLINE void update(const LinfArgs& args, const Chunk& chunk, RealOf<T> scale,
                           Step<RealOf<T>> step, Grid<RealOf<T>> grid) {
  using Real = RealOf<T>;
  Real value[kBlock], level[kBlock];
  for (int64_t first = 0; first < chunk.count; first += kBlock) {
    const Row<T> image(args, args.images, kImages, chunk, first);
    const Row<T> origin(args, args.origin, kOrigin, chunk, first, kBall || kGrid);
    const Row<T> gradient(args, args.gradient, kGradient, chunk, first);
    const int size = image.size;
    for (int i = 0; i < size; ++i) {
      const Real now = image[i], start = kBall ? origin[i] : now;
      value[i] = step_pixel(now, start, gradient[i], scale, step);
    }
    if (kGrid) {
      for (int i = 0; i < size; ++i) {
        const Real shadow = Pixel<T>::load(Pixel<T>::store(value[i]));
        level[i] = show_pixel<kBall>(shadow, origin[i], grid);
      }
      Row<T>(args, args.shown, kShown, chunk, first, false).store(level);
    }
    image.store(value);
  }
}

template <typename T>
void step_all(int64_t images, const LinfArgs& args, const Step<RealOf<T>>& step,
              const Grid<RealOf<T>>* grid) {
  using Real = RealOf<T>;
  using Bits = typename Pixel<T>::Bits;
  const bool ball = step.epsilon < std::numeric_limits<Real>::infinity();
  const Simd simd = simd_in_use();
  Real* norms = static_cast<Real*>(args.norms);
  const Chunks<kStepOperands> chunks(images, args.walk);
  const auto is_active = [&](int64_t n) { return args.is_active(n); };

  std::vector<Bits> largest(chunks.count(), 0);
  chunks.for_each(is_active, [&](int64_t, int64_t item, const Chunk& chunk) {
    run_simd<find_largest<T>>(simd, args, chunk, &largest[item]);
  });
  for (int64_t n = 0; n < images; ++n) {
    const auto first = largest.begin() + n * chunks.per_image;
    norms[n] = bit_cast<Real>(*std::max_element(first, first + chunks.per_image));
    args.moved[n] = args.is_active(n) && step_scale(step.gamma, norms[n]) != 0;
  }
  const auto has_moved = [&](int64_t n) { return args.moved[n]; };
  chunks.for_each(has_moved, [&](int64_t n, int64_t, const Chunk& chunk) {
    const Real scale = step_scale(step.gamma, norms[n]);
    if (grid) {
      ball ? run_simd<update<T, true, true>>(simd, args, chunk, scale, step, *grid)
           : run_simd<update<T, false, true>>(simd, args, chunk, scale, step, *grid);
    } else {
      const Grid<Real> none{};
      ball ? run_simd<update<T, true, false>>(simd, args, chunk, scale, step, none)
           : run_simd<update<T, false, false>>(simd, args, chunk, scale, step, none);
    }
  });
}

// images, origin, gradient (N, *); active (N,), int32: images without active targets are unchanged,
// as are those whose gradient has no usable norm. With a grid (N, *), the images lie between the
// levels, and the grid receives what they look like on the levels. Returns ||gradient||_inf (N,), 0
// for images that are not active, and which images were stepped (N,).
LinfOutputs linf_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, double gamma,
                      double lower, double upper, double epsilon, std::optional<Tensor> grid,
                      int64_t levels) {
  check_step(images, origin, gradient, active, lower, upper, grid, levels);
  const LinfOutputs outputs = linf_outputs(images);
  if (images.numel() == 0) return outputs;
  const LinfArgs args(images, grid ? *grid : images, origin, gradient, active, outputs);
  const Step<double> step{gamma, lower, upper, epsilon};
  for_float_type("images", images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const Grid<RealOf<T>> on(levels, lower, upper, epsilon);
    step_all<T>(images.size(0), args, step.as<RealOf<T>>(), grid ? &on : nullptr);
  });
  return outputs;
}

}  // namespace

DAGCORE_REGISTER(CPU, "linf_step_", linf_step)

}  // namespace dagcore
