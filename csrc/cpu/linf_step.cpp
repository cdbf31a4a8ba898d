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
                                 const int64_t (&strides)[kStepOperands], int64_t count, Real scale,
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
void chunk_at(const Walk<kStepOperands>& walk, int64_t index, const Body& body) {
  const int64_t per_row = (walk.inner() + kChunk - 1) / kChunk;
  int64_t at[kStepOperands];
  walk.row_offsets(index / per_row, at);
  const int64_t first = index % per_row * kChunk;
  for (int k = 0; k < kStepOperands; ++k) at[k] += first * walk.inner_stride(k);
  body(at, std::min(kChunk, walk.inner() - first));
}

template <typename T>
void step_all(const StepCall& call, const int32_t* active) {
  using Real = typename Pixel<T>::Real;
  using Bits = typename Pixel<T>::Bits;
  const Step<Real> step = call.step_as<Real>();
  const bool ball = call.step.epsilon < std::numeric_limits<double>::infinity();
  const Simd simd = simd_in_use();
  const Walk<kStepOperands>& walk = call.walk;
  T* images = static_cast<T*>(call.images.mutable_data_ptr());
  const T* origin = static_cast<const T*>(call.origin.const_data_ptr());
  const T* gradient = static_cast<const T*>(call.gradient.const_data_ptr());
  Real* norms = static_cast<Real*>(call.norms.mutable_data_ptr());
  const int64_t batch[kStepOperands] = {call.images.stride(0), call.origin.stride(0),
                                        call.gradient.stride(0)};
  int64_t strides[kStepOperands];
  bool unit = true;
  for (int k = 0; k < kStepOperands; ++k) {
    strides[k] = walk.inner_stride(k);
    unit &= strides[k] == 1;
  }
  const int64_t count = call.images.size(0);
  const int64_t chunks = walk.rows() * ((walk.inner() + kChunk - 1) / kChunk);
  const int64_t grain = std::max<int64_t>(1, kChunk / std::min(kChunk, walk.inner()));

  std::vector<Bits> largest(count * chunks, 0);
  torch::stable::parallel_for(0, count * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks;
      if (active[n] <= 0) continue;
      chunk_at(walk, item % chunks, [&](const int64_t (&at)[kStepOperands], int64_t size) {
        const T* r = gradient + n * batch[kGradient] + at[kGradient];
        if (unit) {
          run_simd<LargestMagnitude<T, true>>(simd, r, strides[kGradient], size, &largest[item]);
        } else {
          run_simd<LargestMagnitude<T, false>>(simd, r, strides[kGradient], size, &largest[item]);
        }
      });
    }
  });
  for (int64_t n = 0; n < count; ++n) {
    const auto first = largest.begin() + n * chunks;
    norms[n] = bit_cast<Real>(*std::max_element(first, first + chunks));
  }
  torch::stable::parallel_for(0, count * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / chunks;
      const Real scale = step_scale(step.gamma, norms[n]);
      if (active[n] <= 0 || scale == 0) continue;
      chunk_at(walk, item % chunks, [&](const int64_t (&at)[kStepOperands], int64_t size) {
        T* image = images + n * batch[kImages] + at[kImages];
        const T* start = origin + n * batch[kOrigin] + at[kOrigin];
        const T* r = gradient + n * batch[kGradient] + at[kGradient];
        if (unit && ball) {
          run_simd<Update<T, true, true>>(simd, image, start, r, strides, size, scale, step);
        } else if (unit) {
          run_simd<Update<T, true, false>>(simd, image, start, r, strides, size, scale, step);
        } else {
          run_simd<Update<T, false, true>>(simd, image, start, r, strides, size, scale, step);
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
  const StepCall call(images, origin, gradient, active, {gamma, lower, upper, epsilon});
  if (images.numel() == 0) return call.norms;
  std::vector<int32_t> counts(images.size(0));
  for (int64_t n = 0; n < images.size(0); ++n) {
    counts[n] = static_cast<const int32_t*>(active.const_data_ptr())[n * active.stride(0)];
  }
  for_float_type("images", images.scalar_type(),
                 [&](auto type) { step_all<decltype(type)>(call, counts.data()); });
  return call.norms;
}

}  // namespace

DAGCORE_REGISTER(CPU, "linf_step_", linf_step)

}  // namespace dagcore
