// The seed at low resolution: the weights of active pixels, summed by class at each cell's corners.
#pragma once

#include <memory>
#include <vector>

#include "bilinear_cells.h"

namespace dagcore {

// Maximum number of a tile's verdicts that are summed one by one, all lanes at once. Beyond it, or
// once a verdict has fewer than kFewPixels pixels, summing pixel by pixel is as fast.
constexpr int kVerdicts = 16;
constexpr uint32_t kFewPixels = 2;

// The sums of the two low-resolution rows of a cell's corners, (C, w) each.
template <typename Sum>
struct CornerSums {
  Sum *above, *below;
  int64_t width;

  template <typename Real>
  DAGCORE_INLINE void add(const Segment& x, int64_t c, Sum sign, const Real* sum) const {
    above[c * width + x.low] += sign * sum[0];
    above[c * width + x.high] += sign * sum[1];
    below[c * width + x.low] += sign * sum[2];
    below[c * width + x.high] += sign * sum[3];
  }
};

// Sums the weights over the pixels of one verdict, and removes these pixels from the tile.
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

// Adds the seed of a tile with `left` active pixels: verdict by verdict, as most tiles have few of
// them, then the rest pixel by pixel.
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
    // A pixel's weights add up to 1, up to rounding.
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

// row (C, pitch); values are clipped to `limit`, infinite for no limit.
template <typename T, typename Sum>
DAGCORE_INLINE void write_row(const Sum* row, int64_t pitch, int64_t classes, int64_t width,
                              int64_t class_stride, int64_t column_stride, RealOf<T> limit,
                              T* out) {
  for (int64_t c = 0; c < classes; ++c) {
    const Sum* from = row + c * pitch;
    T* to = out + c * class_stride;
    for (int64_t x = 0; x < width; ++x) {
      const auto value = static_cast<RealOf<T>>(from[x]);
      to[x * column_stride] = Pixel<T>::store(clip(value, -limit, limit));
    }
  }
}

// Writes the rows of a seed as they are finished. A row that two bands share is written last: each
// band keeps its first and its last row, and these are added in the order of the bands.
template <typename T>
struct SeedRows {
  using Real = RealOf<T>;
  const Tensor& seed;
  const Cells<T>& cells;
  Real limit;                    // see write_row
  int64_t pitch, row;            // of the rows of sums, (C, pitch), and their size
  std::unique_ptr<Real[]> data;  // not zeroed: every row is written before it is read

  SeedRows(const Tensor& seed, const Cells<T>& cells,
           Real limit = std::numeric_limits<Real>::infinity(), int64_t pitch = 0)
      : seed(seed),
        cells(cells),
        limit(limit),
        pitch(pitch ? pitch : cells.width),
        row(cells.classes * this->pitch),
        data(new Real[2 * cells.images * cells.bands() * row]) {}

  Real* first(int64_t n, int64_t band) { return &data[((n * cells.bands() + band) * 2) * row]; }
  Real* last(int64_t n, int64_t band) { return first(n, band) + row; }

  template <typename Sum>
  void store(int64_t n, int64_t y, const Sum* from) const {
    T* out = static_cast<T*>(seed.mutable_data_ptr()) + n * seed.stride(0) + y * seed.stride(2);
    run_simd<write_row<T, Sum>>(cells.simd, from, pitch, cells.classes, cells.width, seed.stride(1),
                                seed.stride(3), limit, out);
  }

  // Adds up the rows that bands share, and zeroes those that no pixel reads.
  void join(int64_t n) {
    for (int64_t band = 0; band < cells.bands(); ++band) {
      const int64_t begin = cells.ys[cells.band_begin[band]].low;
      Real* own = first(n, band);
      if (band > 0 && cells.ys[cells.band_begin[band] - 1].high == begin) {
        const Real* before = last(n, band - 1);
        for (int64_t i = 0; i < row; ++i) own[i] += before[i];
      }
      store(n, begin, own);
      const size_t end = cells.band_begin[band + 1];
      const Segment& y = cells.ys[end - 1];
      const bool continued = end < cells.ys.size() && cells.ys[end].low == y.high;
      if (!continued && y.high != y.low) store(n, y.high, last(n, band));
    }
    std::vector<bool> read(cells.height);
    for (const Segment& y : cells.ys) read[y.low] = read[y.high] = true;
    const std::vector<Real> zeros(row);
    for (int64_t y = 0; y < cells.height; ++y) {
      if (!read[y]) store(n, y, zeros.data());
    }
  }
};

// Seeds one band of one image: calls open(y, previous_high), like `open_row`, where a row of cells
// begins, and add(y, sums) to add the seed of a segment's cells.
template <typename T, typename Sum, typename Open, typename Add>
void seed_rows(int64_t n, int64_t index, std::vector<Sum> (&sums)[2], SeedRows<T>* rows,
               const Open& open, const Add& add) {
  const Cells<T>& cells = rows->cells;
  const size_t begin = cells.band_begin[index], end = cells.band_begin[index + 1];
  for (std::vector<Sum>& sum : sums) std::fill(sum.begin(), sum.end(), Sum{0});
  for (size_t s = begin; s < end; ++s) {
    const Segment& y = cells.ys[s];
    if (s == begin || y.low != cells.ys[s - 1].low) {
      open(y, s == begin ? -1 : cells.ys[s - 1].high);
    }
    add(y, CornerSums<Sum>{sums[0].data(), sums[y.high != y.low].data(), rows->pitch});
    if (s + 1 < end && cells.ys[s + 1].low == y.low) continue;
    if (y.low == cells.ys[begin].low) {
      std::copy(sums[0].begin(), sums[0].end(), rows->first(n, index));
    } else {
      rows->store(n, y.low, sums[0].data());
    }
    sums[0].swap(sums[1]);
    if (s + 1 == end) {
      std::copy(sums[0].begin(), sums[0].end(), rows->last(n, index));
    } else if (cells.ys[s + 1].low != y.high && y.high != y.low) {  // no cell begins at this row
      rows->store(n, y.high, sums[0].data());
      std::fill(sums[0].begin(), sums[0].end(), Sum{0});
    }
    std::fill(sums[1].begin(), sums[1].end(), Sum{0});
  }
}

}  // namespace dagcore
