// linf_step_ on the CPU: one reduction of the gradient, then one pass over the images.
#include "../linf_step.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../registration.h"
#include "simd.h"

namespace dagcore {
namespace {

constexpr int64_t kChunk = 1 << 14;  // pixels a task

// `count` pixels in a row: where the first lies in each operand, in elements.
struct Chunk {
  int64_t at[kStepOperands];
  int64_t count;
};

template <typename T>
DAGCORE_INLINE void find_largest(const StepArgs& args, const Chunk& chunk,
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
DAGCORE_INLINE void update(const StepArgs& args, const Chunk& chunk, RealOf<T> scale,
                           Step<RealOf<T>> step, Grid<RealOf<T>> grid) {
  const int64_t image_stride = args.walk.inner_stride(kImages);
  const int64_t shown_stride = args.walk.inner_stride(kShown);
  const int64_t origin_stride = args.walk.inner_stride(kOrigin);
  const int64_t gradient_stride = args.walk.inner_stride(kGradient);
  T* images = static_cast<T*>(args.images) + chunk.at[kImages];
  T* shown = static_cast<T*>(args.shown) + chunk.at[kShown];
  const T* origin = static_cast<const T*>(args.origin) + chunk.at[kOrigin];
  const T* gradient = static_cast<const T*>(args.gradient) + chunk.at[kGradient];
  const int64_t count = chunk.count;
  for (int64_t i = 0; i < count; ++i) {
    T* image = images + i * image_stride;
    const RealOf<T> now = Pixel<T>::load(*image);
    const RealOf<T> start = kBall ? Pixel<T>::load(origin[i * origin_stride]) : now;
    const RealOf<T> r = Pixel<T>::load(gradient[i * gradient_stride]);
    const T next = Pixel<T>::store(step_pixel(now, start, r, scale, step));
    *image = next;
    if (kGrid) {
      shown[i * shown_stride] =
          Pixel<T>::store(show_pixel<kBall>(Pixel<T>::load(next), start, grid));
    }
  }
}

template <typename T>
void step_all(int64_t images, const StepArgs& args, const Step<RealOf<T>>& step,
              const Grid<RealOf<T>>* grid) {
  using Real = RealOf<T>;
  using Bits = typename Pixel<T>::Bits;
  const bool ball = step.epsilon < std::numeric_limits<Real>::infinity();
  const Simd simd = simd_in_use();
  Real* norms = static_cast<Real*>(args.norms);
  const int64_t inner = args.walk.inner();
  const int64_t per_row = (inner + kChunk - 1) / kChunk;
  const int64_t chunks = args.walk.rows() * per_row;
  const int64_t grain = std::max<int64_t>(1, kChunk / std::min(kChunk, inner));
  // Calls body(image, item, chunk) for the chunks of active images, in parallel.
  const auto for_chunks = [&](const auto& body) {
    torch::stable::parallel_for(0, images * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t n = item / chunks, row = item % chunks / per_row;
        if (!args.is_active(n)) continue;
        const int64_t first = item % per_row * kChunk;
        Chunk chunk{{}, std::min(kChunk, inner - first)};
        args.walk.locate(n, row * inner + first, chunk.at);
        body(n, item, chunk);
      }
    });
  };

  std::vector<Bits> largest(images * chunks, 0);
  for_chunks([&](int64_t, int64_t item, const Chunk& chunk) {
    run_simd<find_largest<T>>(simd, args, chunk, &largest[item]);
  });
  for (int64_t n = 0; n < images; ++n) {
    const auto first = largest.begin() + n * chunks;
    norms[n] = bit_cast<Real>(*std::max_element(first, first + chunks));
    args.moved[n] = args.is_active(n) && step_scale(step.gamma, norms[n]) != 0;
  }
  for_chunks([&](int64_t n, int64_t, const Chunk& chunk) {
    const Real scale = step_scale(step.gamma, norms[n]);
    if (scale == 0) return;
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

// images, origin, gradient (N, *); active (N,), int32: images without active targets stay as they
// are, and so do those whose gradient has no usable norm. With a grid (N, *), images between the
// levels are stepped, and what they look like at the levels goes into the grid. Returns
// ||gradient||_inf (N,), 0 for images that are not active, and which images were stepped (N,).
StepOutputs linf_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, double gamma,
                      double lower, double upper, double epsilon, std::optional<Tensor> grid,
                      int64_t levels) {
  const StepOutputs outputs =
      check_step(images, origin, gradient, active, lower, upper, grid, levels);
  if (images.numel() == 0) return outputs;
  const StepArgs args(images, grid ? *grid : images, origin, gradient, active, outputs);
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
