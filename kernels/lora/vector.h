// lora's kernels for vectors of floats of any width. A level that includes this has the vectors of
// kernels/common/vector_<level>.h, and defines before, in effk::lora's anonymous namespace: kVectors, how many a tile
// is wide; store_row(p, v, stream) of so many.
#pragma once

#include "cpu_common.h"

namespace effk::lora {
namespace {

constexpr int kTile = kVectors * kWidth;         // columns of a tile, and outputs that expand() makes at a time
constexpr int kTileRows = kWidth == 16 ? 4 : 2;  // rows, or tokens, of a tile: what the registers hold the sums of
constexpr int64_t kAhead = 2048;                 // bytes of a that are asked for early
constexpr int64_t kPanelBytes = 64 << 10;        // that stay in the second cache while rows pass by

inline int64_t total_rank(const Merge& m, const Layer& layer) {
  int64_t total = 0;
  for (int64_t i = 0; i < m.num_active; ++i) total += used_rank(m.active[i], layer);
  return total;
}

// How many tiles of columns a panel of rows of a has, `bytes` for a column.
inline int64_t panel_tiles(int64_t bytes, int64_t cols) {
  const int64_t fit = kPanelBytes / (bytes * kTile + 1), all = (cols + kTile - 1) / kTile;
  return fit < 1 ? 1 : fit < all ? fit : all;
}

// Rows [n, n + MR) and the columns of a tile of a weight from k on.
template <int MR, class T>
struct Tile {
  T* w;
  const T* base;
  int64_t w_stride, base_stride, cols;  // cols: from k to the end
  Tile(const Layer& layer, int64_t n, int64_t k)
      : w(static_cast<T*>(layer.w) + n * layer.w_stride + k),
        base(layer.base ? static_cast<const T*>(layer.base) + n * layer.base_stride + k : w),
        w_stride(layer.w_stride),
        base_stride(layer.base ? layer.base_stride : layer.w_stride),
        cols(layer.cols - k) {
    // What comes a row of tiles later.
    if (cols >= kTile && n + 2 * MR <= layer.rows)
#pragma GCC unroll 16
      for (int i = MR; i < 2 * MR; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < kTile; j += 64 / static_cast<int>(sizeof(T)))
          __builtin_prefetch(base + i * base_stride + j);
  }
  void load(V (&sums)[MR][kVectors]) const {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        const T* from = base + i * base_stride + j * kWidth;
        sums[i][j] = cols >= kTile ? effk::load(from) : load_upto(from, cols - j * kWidth);
      }
  }
  void store(const V (&sums)[MR][kVectors], bool stream) const {
    if (cols >= kTile) {
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) store_row(w + i * w_stride, sums[i], stream);
      return;
    }
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) store_upto(w + i * w_stride + j * kWidth, sums[i][j], cols - j * kWidth);
  }
};

// A tile, with panel [rank, kTile] of a and factors [MR, rank]: b times the adapters' factors.
template <int MR, class T>
inline void merge_tile(const Tile<MR, T>& tile, const float* panel, const float* factors, int64_t rank, bool stream) {
  V sums[MR][kVectors];
  tile.load(sums);
  for (int64_t r = 0; r < rank; ++r) {
    V a[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) a[j] = load(panel + r * kTile + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const V b = splat(factors[i * rank + r]);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sums[i][j] = fma(b, a[j], sums[i][j]);
    }
  }
  tile.store(sums, stream);
}

template <class T>
inline void merge_rows(const Merge& m, const Layer& layer, int64_t row0, int64_t row1) {
  const int64_t rank = total_rank(m, layer), rows = row1 - row0;
  const int64_t tiles = panel_tiles(rank * sizeof(float), layer.cols), width = tiles * kTile;
  const Buffer<float> factors(rows * rank), panel(width * rank);
  for (int64_t i = 0, at = 0; i < m.num_active; ++i) {
    const Active& one = m.active[i];
    const int64_t used = used_rank(one, layer);
    const T* b = static_cast<const T*>(layer.b) + (one.adapter * layer.rows + row0) * layer.rank;
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t r = 0; r < used; ++r)
        factors.get()[n * rank + at + r] = one.factor * to_float(b[n * layer.rank + r]);
    at += used;
  }
  for (int64_t k0 = 0; k0 < layer.cols; k0 += width) {
    float* to = panel.get();
    const int64_t k1 = k0 + width < layer.cols ? k0 + width : layer.cols;
    for (int64_t k = k0; k < k1; k += kTile)
      for (int64_t i = 0; i < m.num_active; ++i) {
        const Active& one = m.active[i];
        const T* a = static_cast<const T*>(layer.a) + one.adapter * layer.rank * layer.cols + k;
        for (int64_t r = used_rank(one, layer); r > 0; --r, a += layer.cols)
#pragma GCC unroll 16
          for (int j = 0; j < kVectors; ++j, to += kWidth)
            store(to, load_upto(a + j * kWidth, layer.cols - k - j * kWidth));
      }
    for (int64_t n = 0; n < rows; n += kTileRows)
      with_count<kTileRows>(rows - n, [&](auto count) {
        for (int64_t k = k0; k < k1; k += kTile)
          merge_tile(Tile<count(), T>(layer, row0 + n, k), panel.get() + (k - k0) * rank, factors.get() + n * rank,
                     rank, m.stream);
      });
  }
}

// inner of MR rows of a from r on, for MT entries of a group from i on.
template <int MR, int MT, class T>
inline void shrink_tile(const Apply& p, const Apply::Group& group, int64_t r, int64_t i) {
  const T* a = static_cast<const T*>(p.a) + (group.adapter * p.rank + r) * p.cols;
  const T* x[MT];
#pragma GCC unroll 16
  for (int t = 0; t < MT; ++t) x[t] = static_cast<const T*>(p.x) + p.token[i + t] * p.x_stride;
  V sums[MR][MT];
#pragma GCC unroll 16
  for (auto& row : sums)
#pragma GCC unroll 16
    for (V& v : row) v = zero();
  const auto step = [&](const auto& take) {
    decltype(operand(a)) as[MR];
#pragma GCC unroll 16
    for (int j = 0; j < MR; ++j) as[j] = take(a + j * p.cols);
#pragma GCC unroll 16
    for (int t = 0; t < MT; ++t) {
      const auto v = take(x[t]);
#pragma GCC unroll 16
      for (int j = 0; j < MR; ++j) sums[j][t] = dot(as[j], v, sums[j][t]);
    }
  };
  int64_t k = 0;
  for (; k + kOperand<T> <= p.cols; k += kOperand<T>) {
#pragma GCC unroll 16
    for (int j = 0; j < MR; ++j) __builtin_prefetch(a + j * p.cols + k + kAhead / sizeof(T));
    step([&](const T* from) { return operand(from + k); });
  }
  if (k < p.cols) step([&](const T* from) { return operand(from + k, p.cols - k); });
#pragma GCC unroll 16
  for (int j = 0; j < MR; ++j)
#pragma GCC unroll 16
    for (int t = 0; t < MT; ++t) p.inner[(i + t) * p.rank + r + j] = sum(sums[j][t]);
}

template <class T>
inline void shrink_rows(const Apply& p, const Apply::Group& group, int64_t r0, int64_t r1) {
  for (int64_t i = group.begin; i < group.end; i += kTileRows)
    with_count<kTileRows>(group.end - i, [&](auto tokens) {
      for (int64_t r = r0; r < r1; r += kTileRows)
        with_count<kTileRows>(r1 - r, [&](auto rows) { shrink_tile<rows(), tokens(), T>(p, group, r, i); });
    });
}

// sums [tokens, kTile] += factor * b inner, of MT entries of a group from i on; panel is b as [rank, kTile].
template <int MT>
inline void expand_tile(const Apply& p, const float* panel, int64_t rank, int64_t i, float* sums) {
  V products[MT][kVectors];
#pragma GCC unroll 16
  for (auto& row : products)
#pragma GCC unroll 16
    for (V& v : row) v = zero();
  for (int64_t r = 0; r < rank; ++r) {
    V b[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) b[j] = load(panel + r * kTile + j * kWidth);
#pragma GCC unroll 16
    for (int t = 0; t < MT; ++t) {
      const V s = splat(p.inner[(i + t) * p.rank + r]);
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) products[t][j] = fma(s, b[j], products[t][j]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < MT; ++t) {
    const V factor = splat(p.factor[i + t]);
    float* to = sums + p.token[i + t] * kTile;
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) store(to + j * kWidth, fma(factor, products[t][j], load(to + j * kWidth)));
  }
}

template <class T>
inline const T* rows_of_b(const Apply& p, const Apply::Group& group, int64_t row) {
  return static_cast<const T*>(p.b) + (group.adapter * p.rows + row) * p.rank;
}

// b's rows [row, row + rows) of an adapter as [rank, kTile] floats; beyond `rows` there are zeros.
template <class T>
inline void transpose_rows(const Apply& p, const Apply::Group& group, int64_t row, int64_t rows, float* panel) {
  const T* b = rows_of_b<T>(p, group, row);
  for (int64_t n = 0; n < kTile; n += kWidth)
    for (int64_t r = 0; r < group.rank; r += kWidth) {
      V block[kWidth];
      for (int i = 0; i < kWidth; ++i)
        block[i] = n + i < rows ? load_upto(b + (n + i) * p.rank + r, group.rank - r) : zero();
      transpose(block);
      for (int i = 0; i < kWidth && r + i < group.rank; ++i) store(panel + (r + i) * kTile + n, block[i]);
    }
}

template <class T>
inline void expand_rows(const Apply& p, int64_t row0, int64_t row1) {
  const Buffer<float> panel(p.rank * kTile), sums(p.tokens * kTile);
  for (int64_t row = row0; row < row1; row += kTile) {
    const int64_t rows = row1 - row < kTile ? row1 - row : kTile;
    for (int64_t t = 0; t < p.tokens; ++t)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) {
        const T* y = static_cast<const T*>(p.y_in) + t * p.y_stride + row + j * kWidth;
        store(sums.get() + t * kTile + j * kWidth, p.y_in ? load_upto(y, rows - j * kWidth) : zero());
      }
    for (int64_t g = 0; g < p.num_groups; ++g) {
      const Apply::Group& group = p.groups[g];
      if (g + 1 < p.num_groups) {
        const T* next = rows_of_b<T>(p, p.groups[g + 1], row);
        for (int64_t i = 0; i < rows * p.rank; i += 64 / sizeof(T)) __builtin_prefetch(next + i);
      }
      transpose_rows<T>(p, group, row, rows, panel.get());
      for (int64_t i = group.begin; i < group.end; i += kTileRows)
        with_count<kTileRows>(group.end - i,
                              [&](auto tokens) { expand_tile<tokens()>(p, panel.get(), group.rank, i, sums.get()); });
    }
    for (int64_t t = 0; t < p.tokens; ++t)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j)
        store_upto(static_cast<T*>(p.y) + t * p.rows + row + j * kWidth, load(sums.get() + t * kTile + j * kWidth),
                   rows - j * kWidth);
  }
}

inline void merge_floats(const Merge& m, const Layer& layer, int64_t row0, int64_t row1) {
  with_float(m.type, [&]<class T>(T*) {
    if (m.num_active == 0) return copy_rows<T>(layer, row0, row1);
    merge_rows<T>(m, layer, row0, row1);
  });
}

inline void shrink_floats(const Apply& p, const Apply::Group& group, int64_t r0, int64_t r1) {
  with_float(p.type, [&]<class T>(T*) { shrink_rows<T>(p, group, r0, r1); });
}

inline void expand(const Apply& p, int64_t row0, int64_t row1) {
  with_float(p.type, [&]<class T>(T*) { expand_rows<T>(p, row0, row1); });
}

}  // namespace
}  // namespace effk::lora
