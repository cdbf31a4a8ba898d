// linf_prox_ on the CPU: the largest |d|, a pass for each digit of t, one pass over the images.
#include "../linf_prox.h"

#include <algorithm>
#include <vector>

#include "../registration.h"
#include "simd.h"

namespace dagcore {
namespace {

constexpr int64_t kTaskPixels = 1 << 14;
constexpr int64_t kBlock = 1 << 10;  // pixels whose digits are found before they are summed

// `count` pixels in a row: where the first lies in each operand, in elements.
struct Row {
  int64_t at[kProxOperands];
  int64_t count;

  DAGCORE_INLINE Row from(const ProxArgs& args, int64_t begin, int64_t most) const {
    Row part = *this;
    for (int k = 0; k < kProxOperands; ++k) part.at[k] += begin * args.walk.inner_stride(k);
    part.count = std::min(most, count - begin);
    return part;
  }
};

// Calls body(i, places of pixel i).
template <typename Body>
DAGCORE_INLINE void for_pixels(const ProxArgs& args, const Row& row, const Body& body) {
  const int64_t count = row.count;
  const int64_t images = args.walk.inner_stride(kProxImages);
  const int64_t origin = args.walk.inner_stride(kProxOrigin);
  const int64_t gradient = args.walk.inner_stride(kProxGradient);
  const int64_t metric = args.walk.inner_stride(kProxMetric);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at[] = {row.at[kProxImages] + i * images, row.at[kProxOrigin] + i * origin,
                          row.at[kProxGradient] + i * gradient, row.at[kProxMetric] + i * metric};
    body(i, at);
  }
}

template <typename T>
DAGCORE_INLINE void find_largest(const ProxArgs& args, const Row& row, RealOf<T> length,
                                 Search* search) {
  using Bits = typename Pixel<T>::Bits;
  Bits farthest = 0, largest = 0;
  for_pixels(args, row, [&](int64_t, const int64_t (&at)[kProxOperands]) {
    const auto d = args.perturbed<T>(at, length);
    const Bits free = magnitude_bits(d.free), inside = magnitude_bits(d.inside);
    farthest = free > farthest ? free : farthest;
    largest = inside > largest ? inside : largest;
  });
  search->farthest = std::max<uint64_t>(search->farthest, farthest);
  search->largest = std::max<uint64_t>(search->largest, largest);
}

// The keys of a row's pixels, their |d| and H.
template <typename T>
DAGCORE_INLINE void find_keys(const ProxArgs& args, const Row& row, RealOf<T> length,
                              RealOf<T> scale, KeyOf<RealOf<T>>* keys, RealOf<T>* free,
                              RealOf<T>* metric) {
  using Real = RealOf<T>;
  for_pixels(args, row, [&](int64_t i, const int64_t (&at)[kProxOperands]) {
    const Perturbed<Real> d = args.perturbed<T>(at, length);
    keys[i] = Search::key<Real>(d.inside < 0 ? -d.inside : d.inside, scale);
    free[i] = d.free < 0 ? -d.free : d.free;
    metric[i] = args.metric_at<Real>(at);
  });
}

template <typename T>
void sum_digits(Simd simd, const ProxArgs& args, const Row& row, RealOf<T> length,
                const Search& search, int pass, Excess* sums) {
  using Real = RealOf<T>;
  KeyOf<Real> keys[kBlock];
  Real free[kBlock], metric[kBlock];
  const Real scale = search.scale<Real>();
  for (int64_t begin = 0; begin < row.count; begin += kBlock) {
    const Row part = row.from(args, begin, kBlock);
    run_simd<find_keys<T>>(simd, args, part, length, scale, keys, free, metric);
    for (int64_t i = 0; i < part.count; ++i) {
      const int digit = search.digit<Real>(keys[i], pass);
      if (digit < 0) continue;
      const double mass = metric[i];
      sums[digit].mass += mass;
      sums[digit].moment += mass * free[i];
    }
  }
}

template <typename T>
DAGCORE_INLINE void update(const ProxArgs& args, const Row& row, RealOf<T> length, RealOf<T> t) {
  for_pixels(args, row, [&](int64_t, const int64_t (&at)[kProxOperands]) {
    args.put<T>(at, args.perturbed<T>(at, length), t);
  });
}

template <typename T>
void prox_all(int64_t images, const ProxArgs& args) {
  using Real = RealOf<T>;
  const Simd simd = simd_in_use();
  const int64_t inner = args.walk.inner();
  const int64_t per_row = (inner + kTaskPixels - 1) / kTaskPixels;
  const int64_t parts = args.walk.rows() * per_row;  // of an image, each within a row
  const int64_t per_task = std::max<int64_t>(1, kTaskPixels / std::min(kTaskPixels, inner));
  const int64_t tasks = (parts + per_task - 1) / per_task;  // of an image
  std::vector<Search> searches(images), of_tasks(images * tasks);
  // Calls body(image, task, step length, row) for the rows of the images with wanted(image), tasks
  // in parallel.
  const auto for_rows = [&](const auto& wanted, const auto& body) {
    torch::stable::parallel_for(0, images * tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t n = task / tasks;
        if (!wanted(n)) continue;
        const int64_t first = task % tasks * per_task, last = std::min(first + per_task, parts);
        for (int64_t part = first; part < last; ++part) {
          const int64_t start = part % per_row * kTaskPixels;
          Row row{{}, std::min(kTaskPixels, inner - start)};
          args.walk.locate(n, part / per_row * inner + start, row.at);
          body(n, task, static_cast<Real>(args.alpha[n]), row);
        }
      }
    });
  };

  for_rows([&](int64_t n) { return args.is_active(n); },
           [&](int64_t, int64_t task, Real length, const Row& row) {
             run_simd<find_largest<T>>(simd, args, row, length, &of_tasks[task]);
           });
  for (int64_t n = 0; n < images; ++n) {
    Search& whole = searches[n];
    for (int64_t task = n * tasks; task < (n + 1) * tasks; ++task) {
      whole.farthest = std::max(whole.farthest, of_tasks[task].farthest);
      whole.largest = std::max(whole.largest, of_tasks[task].largest);
    }
    args.moved[n] = args.is_active(n) && whole.usable<Real>();
  }
  std::vector<Excess> sums;
  for (int pass = 0; pass < kPasses<Real>; ++pass) {
    sums.assign(images * tasks * kDigits, {});
    for_rows([&](int64_t n) { return args.moved[n] && !searches[n].found; },
             [&](int64_t n, int64_t task, Real length, const Row& row) {
               sum_digits<T>(simd, args, row, length, searches[n], pass, &sums[task * kDigits]);
             });
    for (int64_t n = 0; n < images; ++n) {
      Excess total[kDigits] = {};
      for (int64_t task = n * tasks; task < (n + 1) * tasks; ++task) {
        for (int digit = 0; digit < kDigits; ++digit) {
          total[digit].mass += sums[task * kDigits + digit].mass;
          total[digit].moment += sums[task * kDigits + digit].moment;
        }
      }
      if (args.moved[n]) {
        searches[n].narrow<Real>(pass, total, args.weight * args.alpha[n]);
      }
    }
  }
  for_rows([&](int64_t n) { return args.moved[n]; },
           [&](int64_t n, int64_t, Real length, const Row& row) {
             run_simd<update<T>>(simd, args, row, length, args.largest<Real>(n, searches[n].t));
           });
}

// images, origin, gradient, metric (N, *); active, alpha, epsilon (N,). Images without active
// targets are unchanged, as are those whose d is 0 or not finite. Returns which images were moved
// (N,).
Tensor linf_prox(Tensor images, Tensor origin, Tensor gradient, Tensor metric, Tensor active,
                 Tensor alpha, Tensor epsilon, double weight, double lower, double upper) {
  const Tensor moved =
      check_prox(images, origin, gradient, metric, active, alpha, epsilon, lower, upper);
  if (images.numel() == 0) return moved;
  const ProxArgs args(images, origin, gradient, metric, active, alpha, epsilon, moved, weight,
                      lower, upper);
  for_float_type("images", images.scalar_type(),
                 [&](auto type) { prox_all<decltype(type)>(images.size(0), args); });
  return moved;
}

}  // namespace

DAGCORE_REGISTER(CPU, "linf_prox_", linf_prox)

}  // namespace dagcore
