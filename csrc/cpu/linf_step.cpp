// linf_step_ on the CPU: one reduction of the gradient, then one pass over the images.
#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../step.h"
#include "../strided.h"
#include "simd.h"

namespace dagcore {
namespace {

constexpr int64_t kChunk = 1 << 14;  // pixels a task

enum Operand { kImages, kOrigin, kGradient, kOperands };

template <typename T, bool kUnitStride>
struct LargestMagnitude {
  using Bits = typename Pixel<T>::Bits;
  DAGCORE_INLINE static void run(const T* gradient, int64_t stride, int64_t count, Bits* largest) {
    Bits most = *largest;
    for (int64_t i = 0; i < count; ++i) {
      const Bits bits = magnitude_bits(gradient[kUnitStride ? i : i * stride]);
      most = bits > most ? bits : most;
    }
    *largest = most;
  }
};

template <typename T, bool kUnitStride, bool kBall>
struct Update {
  using Real = typename Pixel<T>::Real;
  DAGCORE_INLINE static void run(T* images, const T* origin, const T* gradient,
                                 const int64_t (&strides)[kOperands], int64_t count, Real scale,
                                 Step<Real> step) {
    for (int64_t i = 0; i < count; ++i) {
      T* image = images + (kUnitStride ? i : i * strides[kImages]);
      const Real now = Pixel<T>::load(*image);
      const Real start =
          kBall ? Pixel<T>::load(origin[kUnitStride ? i : i * strides[kOrigin]]) : now;
      const Real r = Pixel<T>::load(gradient[kUnitStride ? i : i * strides[kGradient]]);
      *image = Pixel<T>::store(step_pixel(now, start, r, scale, step));
    }
  }
};

// One image's pixels cut into chunks of at most kChunk; calls body(first offsets, count).
template <typename Body>
void chunk_at(const Walk<kOperands>& walk, int64_t index, const Body& body) {
  const int64_t per_row = (walk.inner() + kChunk - 1) / kChunk;
  int64_t at[kOperands];
  walk.row_offsets(index / per_row, at);
  const int64_t first = index % per_row * kChunk;
  for (int k = 0; k < kOperands; ++k) at[k] += first * walk.inner_stride(k);
  body(at, std::min(kChunk, walk.inner() - first));
}

template <typename T>
void step_all(const Tensor& images, const Tensor& origin, const Tensor& gradient,
              const int32_t* active, const Walk<kOperands>& walk, Step<double> bounds,
              typename Pixel<T>::Real* norms) {
  using Real = typename Pixel<T>::Real;
  using Bits = typename Pixel<T>::Bits;
  const Step<Real> step{static_cast<Real>(bounds.gamma), static_cast<Real>(bounds.lower),
                        static_cast<Real>(bounds.upper), static_cast<Real>(bounds.epsilon)};
  const Simd simd = simd_in_use();
  T* images_data = static_cast<T*>(images.data_ptr());
  const T* origin_data = static_cast<const T*>(origin.data_ptr());
  const T* gradient_data = static_cast<const T*>(gradient.data_ptr());
  int64_t strides[kOperands];
  bool unit = true;
  for (int k = 0; k < kOperands; ++k) {
    strides[k] = walk.inner_stride(k);
    unit &= strides[k] == 1;
  }
  const int64_t chunks = walk.rows() * ((walk.inner() + kChunk - 1) / kChunk);
  const int64_t grain = std::max<int64_t>(1, kChunk / std::min(kChunk, walk.inner()));
  const int64_t all = images.size(0) * chunks;

  std::vector<Bits> largest(all, 0);
  torch::stable::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks;
      if (active[n] <= 0) continue;
      chunk_at(walk, item % chunks, [&](const int64_t (&at)[kOperands], int64_t count) {
        const T* r = gradient_data + n * gradient.stride(0) + at[kGradient];
        if (unit) {
          run_simd<LargestMagnitude<T, true>>(simd, r, strides[kGradient], count, &largest[item]);
        } else {
          run_simd<LargestMagnitude<T, false>>(simd, r, strides[kGradient], count, &largest[item]);
        }
      });
    }
  });
  for (int64_t n = 0; n < images.size(0); ++n) {
    const auto first = largest.begin() + n * chunks;
    norms[n] = bit_cast<Real>(*std::max_element(first, first + chunks));
  }
  torch::stable::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks;
      const Real scale = step_scale(step.gamma, norms[n]);
      if (active[n] <= 0 || scale == 0) continue;
      chunk_at(walk, item % chunks, [&](const int64_t (&at)[kOperands], int64_t count) {
        T* image = images_data + n * images.stride(0) + at[kImages];
        const T* start = origin_data + n * origin.stride(0) + at[kOrigin];
        const T* r = gradient_data + n * gradient.stride(0) + at[kGradient];
        const bool ball = bounds.epsilon < std::numeric_limits<double>::infinity();
        if (unit && ball) {
          run_simd<Update<T, true, true>>(simd, image, start, r, strides, count, scale, step);
        } else if (unit) {
          run_simd<Update<T, true, false>>(simd, image, start, r, strides, count, scale, step);
        } else {
          run_simd<Update<T, false, true>>(simd, image, start, r, strides, count, scale, step);
        }
      });
    }
  });
}

// images, origin, gradient (N, *); active (N,), int32: images without active targets stay as they
// are, and so do those whose gradient has no usable norm. Returns ||gradient||_inf (N,), 0 for
// images that are not active.
Tensor linf_step(Tensor images, Tensor origin, Tensor gradient, Tensor active, double gamma,
                 double lower, double upper, double epsilon) {
  check_step_arguments(images, origin, gradient, active);
  const bool wide = images.scalar_type() == ScalarType::Double;
  Tensor norms = torch::stable::new_zeros(images, {images.size(0)},
                                          wide ? ScalarType::Double : ScalarType::Float);
  if (images.numel() == 0) return norms;

  Walk<kOperands> walk;
  for (int64_t d = 1; d < images.dim(); ++d) {
    walk.add(images.size(d), {images.stride(d), origin.stride(d), gradient.stride(d)});
  }
  walk.merge();
  std::vector<int32_t> counts(images.size(0));
  for (int64_t n = 0; n < images.size(0); ++n) {
    counts[n] = static_cast<const int32_t*>(active.data_ptr())[n * active.stride(0)];
  }
  for_float_type("images", images.scalar_type(), [&](auto type) {
    using T = decltype(type);
    step_all<T>(images, origin, gradient, counts.data(), walk, {gamma, lower, upper, epsilon},
                static_cast<typename Pixel<T>::Real*>(norms.data_ptr()));
  });
  return norms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dagcore, CPU, library) {
  library.impl("linf_step_", TORCH_BOX(&linf_step));
}

}  // namespace dagcore
