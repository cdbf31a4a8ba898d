// The seed at low resolution: the weights of active pixels, summed by class at each cell's corners.
#pragma once

#include <memory>
#include <vector>

#include "bilinear_cells.h"

namespace dagcore {

// Verdicts of a tile that are summed one by one, all lanes at once. With more of them, or from the
// first that fewer pixels share, summing pixel by pixel is as fast.
constexpr int kVerdicts = 16;
constexpr uint32_t kFewPixels = 2;

// The two low-resolution rows of a cell's corners, (C, w) each, and what is added to them.
template <typename Real>
struct CornerSums {
  Real *above, *below;
  int64_t width;

  void add(const Segment& x, int64_t c, Real sign, const Real* sum) const {
    above[c * width + x.low] += sign * sum[0];
    above[c * width + x.high] += sign * sum[1];
    below[c * width + x.low] += sign * sum[2];
    below[c * width + x.high] += sign * sum[3];
  }
};

// The weights summed over the pixels of one verdict, which are struck off the tile.
template <typename Real>
DAGCORE_INLINE void take_verdict(Verdict<IndexOf<Real>> verdict, Tile<Real>* tile, Real (&sum)[4]) {
  using Index = IndexOf<Real>;
  Lanes<Real> s0, s1, s2, s3;
  const Real* corner = tile->weights->corner[0];
  Index *plus = tile->plus, *minus = tile->minus;
  const Index* end = plus + tile->weights->padded;
  for (; plus != end; plus += kLanes, minus += kLanes, corner += kLanes) {
#pragma GCC unroll 1
    for (int j = 0; j < kLanes; ++j) {
      const bool same = (plus[j] == verdict.plus) & (minus[j] == verdict.minus);
      s0.lane[j] += same ? corner[j] : Real{0};
      s1.lane[j] += same ? corner[j + kRoom] : Real{0};
      s2.lane[j] += same ? corner[j + 2 * kRoom] : Real{0};
      s3.lane[j] += same ? corner[j + 3 * kRoom] : Real{0};
      plus[j] = same ? static_cast<Index>(kUncounted) : plus[j];
    }
  }
  add_lanes(s0, s1, s2, s3, sum);
}

// Sums of a tile with many verdicts, class by class.
template <typename Real>
struct ClassSums {
  std::vector<Real> corner;         // (C, 4): at the cell's corners
  std::vector<int32_t> touched;     // classes whose sums are not zero
  std::vector<uint8_t> is_touched;  // (C)

  explicit ClassSums(int64_t classes) : corner(classes * 4), is_touched(classes) {}

  void add(int64_t c, Real sign, const TileWeights<Real>& weights, int p) {
    if (!is_touched[c]) {
      is_touched[c] = 1;
      touched.push_back(static_cast<int32_t>(c));
    }
    Real* sum = &corner[4 * c];
    for (int k = 0; k < 4; ++k) sum[k] += sign * weights.corner[k][p];
  }
  void move_to(const CornerSums<Real>& sums, const Segment& x) {
    for (int32_t c : touched) {
      Real* sum = &corner[4 * c];
      sums.add(x, c, 1, sum);
      for (int k = 0; k < 4; ++k) sum[k] = 0;
      is_touched[c] = 0;
    }
    touched.clear();
  }
};

// Adds the seed of a tile with `left` active pixels: verdict by verdict, which most tiles have few
// of, and the rest pixel by pixel.
template <typename Real>
void add_tile_seed(Simd simd, const Segment& x, uint32_t left, Tile<Real>* tile,
                   ClassSums<Real>* rest, const CornerSums<Real>& sums) {
  int p = 0;
  for (int k = 0; k < kVerdicts && left; ++k) {
    while (tile->plus[p] < 0) ++p;
    const Verdict<IndexOf<Real>> verdict{tile->plus[p], tile->minus[p]};
    Real sum[4];
    run_simd<take_verdict<Real>>(simd, verdict, tile, sum);
    sums.add(x, verdict.plus, 1, sum);
    sums.add(x, verdict.minus, -1, sum);
    // A pixel's weights add up to 1, but for rounding.
    const auto taken = static_cast<uint32_t>(sum[0] + sum[1] + sum[2] + sum[3] + Real{0.5});
    left -= taken;
    if (taken < kFewPixels) break;
  }
  if (!left) return;
  for (; p < tile->weights->count; ++p) {
    if (tile->plus[p] < 0) continue;
    rest->add(tile->plus[p], 1, *tile->weights, p);
    rest->add(tile->minus[p], -1, *tile->weights, p);
  }
  rest->move_to(sums, x);
}

template <typename T>
DAGCORE_INLINE void write_row(const RealOf<T>* row, int64_t classes, int64_t width,
                              int64_t class_stride, int64_t column_stride, T* out) {
  for (int64_t c = 0; c < classes; ++c) {
    const RealOf<T>* from = row + c * width;
    T* to = out + c * class_stride;
    for (int64_t x = 0; x < width; ++x) to[x * column_stride] = Pixel<T>::store(from[x]);
  }
}

template <typename T>
void store_row(const Tensor& seed, int64_t n, int64_t y, const Cells<T>& cells,
               const RealOf<T>* row) {
  T* out = static_cast<T*>(seed.mutable_data_ptr()) + n * seed.stride(0) + y * seed.stride(2);
  run_simd<write_row<T>>(cells.simd, row, cells.classes, cells.width, seed.stride(1),
                         seed.stride(3), out);
}

// The seed's rows that two bands share: each band keeps its first and its last row for itself, and
// they are added afterwards, in the order of the bands.
template <typename Real>
struct SharedRows {
  int64_t bands, row;            // row: C * w
  std::unique_ptr<Real[]> data;  // not zeroed: every row is written before it is read

  SharedRows(const ScoreMaps& maps, int64_t bands)
      : bands(bands),
        row(maps.classes * maps.width),
        data(new Real[2 * maps.images * bands * row]) {}
  Real* first(int64_t n, int64_t band) { return &data[((n * bands + band) * 2) * row]; }
  Real* last(int64_t n, int64_t band) { return first(n, band) + row; }
};

// Puts together the rows that bands share, and zeroes those that no pixel reads.
template <typename T>
void join_bands(const Tensor& seed, const Cells<T>& cells, int64_t n,
                SharedRows<RealOf<T>>* shared) {
  using Real = RealOf<T>;
  for (int64_t band = 0; band < cells.bands(); ++band) {
    const int64_t first = cells.ys[cells.band_begin[band]].low;
    Real* row = shared->first(n, band);
    if (band > 0 && cells.ys[cells.band_begin[band] - 1].high == first) {
      const Real* before = shared->last(n, band - 1);
      for (int64_t i = 0; i < shared->row; ++i) row[i] += before[i];
    }
    store_row<T>(seed, n, first, cells, row);
    const size_t end = cells.band_begin[band + 1];
    const Segment& last = cells.ys[end - 1];
    const bool continued = end < cells.ys.size() && cells.ys[end].low == last.high;
    if (!continued && last.high != last.low) {
      store_row<T>(seed, n, last.high, cells, shared->last(n, band));
    }
  }
  std::vector<bool> read(cells.height);
  for (const Segment& y : cells.ys) read[y.low] = read[y.high] = true;
  const std::vector<Real> zeros(shared->row);
  for (int64_t y = 0; y < cells.height; ++y) {
    if (!read[y]) store_row<T>(seed, n, y, cells, zeros.data());
  }
}

}  // namespace dagcore
