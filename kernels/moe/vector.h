// moe's products for vectors of floats of any width. A level that includes this has the vectors of
// kernels/common/vector_<level>.h, and defines before, in effk::moe's anonymous namespace: kDotRows and kDotTokens, of
// a tile of dot products; kMostVectors of tokens and kDenseRows, for tiles of so many rows by one vector, half as many
// by two and so on; Element<T>, what a lane of such a vector holds: kSteps<T> elements of T, with lanes(p) a vector of
// them, broadcast(p) one in all lanes, columns(p, n) the first n elements of T as a vector of bits, beyond them
// zeros, and element<T>(p, stride) likewise what kSteps<T> rows of floats make when they are rounded to T, from p on,
// zeros beyond the first if the stride is 0; where kSteps<T> is 2, store_columns(to, v, n), the reverse of columns().
#pragma once

#include <cstring>

#include "cpu_common.h"

namespace effk::moe {
namespace {

constexpr int64_t kDenseTiles = 6;                  // of tokens that share a copy of the weights
constexpr int64_t kPanelCols = 2048;                // of a tile of products: what it reads stays in the second cache
constexpr int64_t kDotChunk = 32;                   // tokens between whose products a block of weights stays
constexpr int64_t kBlockRows = 96;                  // of weights, whose products wait for their end
constexpr int64_t kWeightStride = kPanelCols + 17;  // elements between two copied rows

// --- Few rows: dot products along weights and rows as they lie ------------------------------------------------------

// Products of MR rows of a weight and MT rows of x, to out[t * stride + row]. As many rows from `ahead` on come next.
template <int MR, int MT, class T>
[[gnu::noinline]] void dot_tile(const T* w, int64_t w_stride, const T* const* rows, int64_t cols, float* out,
                                int64_t stride, const T* ahead) {
  const T* x[MT];
#pragma GCC unroll 16
  for (int t = 0; t < MT; ++t) x[t] = rows[t];
  V sums[MT][MR];
#pragma GCC unroll 16
  for (auto& token : sums)
#pragma GCC unroll 16
    for (V& v : token) v = zero();
  const auto step = [&](const auto& take) {
    decltype(operand(w)) xs[MT];
#pragma GCC unroll 16
    for (int t = 0; t < MT; ++t) xs[t] = take(x[t]);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const auto v = take(w + r * w_stride);
#pragma GCC unroll 16
      for (int t = 0; t < MT; ++t) sums[t][r] = dot(v, xs[t], sums[t][r]);
    }
  };
  int64_t k = 0;
  for (; k + kOperand<T> <= cols; k += kOperand<T>) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) __builtin_prefetch(ahead + r * w_stride + k, 0, 2);
    step([&](const T* from) { return operand(from + k); });
  }
  if (k < cols) step([&](const T* from) { return operand(from + k, cols - k); });
#pragma GCC unroll 16
  for (int t = 0; t < MT; ++t) {
    if constexpr (MR % 4 == 0) {
#pragma GCC unroll 16
      for (int r = 0; r < MR; r += 4) {
        const V four[4] = {sums[t][r], sums[t][r + 1], sums[t][r + 2], sums[t][r + 3]};
        store_sums(out + t * stride + r, four);
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) out[t * stride + r] = sum(sums[t][r]);
    }
  }
}

// Of rows [n0, n1) of an expert's weight and `count` sorted rows from i on, to out [count, n1 - n0]. Rows from `next`
// on are those that will be needed then.
template <class T>
[[gnu::noinline]] void dot_products(const Operands& in, int64_t expert, int64_t n0, int64_t n1, int64_t i,
                                    int64_t count, float* out, const T* next) {
  const T* x[kDotChunk];
  for (int64_t t = 0; t < count; ++t) x[t] = row_of_x<T>(in, i + t);
  const int64_t stride = n1 - n0, tiles = (count + kDotTokens - 1) / kDotTokens;
  int64_t n = n0;
  const auto rows = [&](auto mr) {
    for (; n + mr() <= n1; n += mr()) {
      const T* w = row_of_w<T>(in, expert, n);
      const T* ahead = n + 2 * mr() <= n1 ? w + mr() * in.w_stride : next;
      // Tiles of tokens as even as can be.
      for (int64_t tile = 0, t = 0; tile < tiles; ++tile) {
        const int64_t tokens = (count - t) / (tiles - tile);
        with_count<kDotTokens>(tokens, [&](auto mt) {
          dot_tile<mr(), mt(), T>(w, in.w_stride, x + t, in.cols, out + t * stride + (n - n0), stride, ahead);
        });
        t += tokens;
      }
    }
  };
  rows(std::integral_constant<int, kDotRows>());
  if constexpr (kDotRows > 4) rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 1>());
}

// --- Many rows: rows of x laid out as lanes of vectors, weights broadcast to them -----------------------------------
// A group's rows are cut into tiles of 1 to kMostVectors vectors, as even as can be; a tile's panel is [steps,
// vectors].

inline int64_t vectors_of(int64_t rows) { return (rows + kWidth - 1) / kWidth; }
inline int64_t tiles(int64_t rows) { return (vectors_of(rows) + kMostVectors - 1) / kMostVectors; }
template <class T>
inline int64_t steps_of(int64_t cols) {
  return (cols + kSteps<T> - 1) / kSteps<T>;
}

inline int64_t panel_bytes(Type type, int64_t rows, int64_t cols) {
  int64_t bytes = 0;
  with_float(type, [&]<class T>(T*) { bytes = vectors_of(rows) * kWidth * steps_of<T>(cols) * sizeof(Element<T>); });
  return bytes;
}

struct DenseTile {
  int vectors;
  int64_t first;  // vector of the group
  DenseTile(const Group& group, int64_t number) {
    const int64_t all = vectors_of(group.end - group.begin), n = tiles(group.end - group.begin);
    first = all * number / n;
    vectors = static_cast<int>(all * (number + 1) / n - first);
  }
  template <class T>
  Element<T>* panel(char* panels, int64_t cols) const {
    return reinterpret_cast<Element<T>*>(panels) + first * kWidth * steps_of<T>(cols);
  }
};

template <int NV, class T>
inline void pack_tile(const Operands& in, const Group& group, const DenseTile& tile) {
  constexpr int kCols = kWidth * kSteps<T>;
  static_assert(sizeof(Element<T>) == sizeof(float));
  for (int j = 0; j < NV; ++j) {
    const T* x[kWidth] = {};
    const int64_t i = group.begin + (tile.first + j) * kWidth, rows = group.end - i;
    for (int r = 0; r < kWidth && r < rows; ++r) x[r] = row_of_x<T>(in, i + r);
    auto* to = reinterpret_cast<float*>(tile.panel<T>(group.x_panels, in.cols)) + j * kWidth;
    for (int64_t c = 0; c < in.cols; c += kCols) {
      V block[kWidth];
      for (int r = 0; r < kWidth; ++r) block[r] = r < rows ? columns(x[r] + c, in.cols - c) : zero();
      transpose(block);
      const int64_t steps = steps_of<T>(in.cols - c);
      for (int r = 0; r < kWidth && r < steps; ++r, to += NV * kWidth) store(to, block[r]);
    }
  }
}

inline void pack(const Operands& in, const Group& group, int64_t tile0, int64_t tile1) {
  with_float(in.type, [&]<class T>(T*) {
    for (int64_t t = tile0; t < tile1; ++t) {
      const DenseTile tile(group, t);
      with_count<kMostVectors>(tile.vectors, [&](auto nv) { pack_tile<nv(), T>(in, group, tile); });
    }
  });
}

// out [MR, NV vectors] += or = products of MR rows of weights, w_stride elements apart, and a panel.
template <int MR, int NV, class E>
[[gnu::noinline]] void dense_tile(const E* w, int64_t w_stride, int64_t steps, const E* panel, bool first, float* out) {
  V sums[MR][NV];
#pragma GCC unroll 32
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) sums[r][j] = first ? zero() : load(out + (r * NV + j) * kWidth);
  for (const E* const end = w + steps; w < end; ++w, panel += NV * kWidth) {
    decltype(lanes(panel)) x[NV];
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) x[j] = lanes(panel + j * kWidth);
#pragma GCC unroll 32
    for (int r = 0; r < MR; ++r) {
      const auto v = broadcast(w + r * w_stride);
#pragma GCC unroll 32
      for (int j = 0; j < NV; ++j) sums[r][j] = dot(v, x[j], sums[r][j]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 32
    for (int j = 0; j < NV; ++j) store(out + (r * NV + j) * kWidth, sums[r][j]);
}

// `rows` rows of weights as elements, kWeightStride apart: as they lie, their lines would share a few sets of the
// cache.
template <class T>
inline void copy_weights(const T* w, int64_t w_stride, int64_t rows, int64_t cols, Element<T>* to) {
  constexpr int kCols = kWidth * kSteps<T>;
  for (int64_t r = 0; r < rows; ++r, w += w_stride, to += kWeightStride) {
    auto* at = reinterpret_cast<float*>(to);
    for (int64_t c = 0; c < cols; c += kCols, at += kWidth) {
      __builtin_prefetch(w + rows * w_stride + c, 0, 2);  // what comes next
      store(at, columns(w + c, cols - c));
    }
  }
}

// Products of tiles of a group and rows of its weight: n1 - n0 from n0 on and, of a second set, as many from n0 +
// second on, to [tiles][sets, n1 - n0, the tile's vectors], `size` floats a tile.
template <class T>
[[gnu::noinline]] void multiply_tiles(const Operands& in, const Group& group, char* panels, int64_t tile0,
                                      int64_t tile1, int64_t n0, int64_t n1, int64_t sets, int64_t second,
                                      Element<T>* weights, float* products, int64_t size) {
  const int64_t rows = n1 - n0;
  if (in.cols == 0) std::memset(products, 0, (tile1 - tile0) * size * sizeof(float));
  for (int64_t k = 0; k < in.cols; k += kPanelCols) {
    const int64_t cols = in.cols - k < kPanelCols ? in.cols - k : kPanelCols;
    for (int64_t s = 0; s < sets; ++s)
      for (int64_t n = 0; n < rows; n += kDenseRows) {
        const int64_t some = rows - n < kDenseRows ? rows - n : kDenseRows;
        copy_weights(row_of_w<T>(in, group.expert, n0 + s * second + n) + k, in.w_stride, some, cols, weights);
        for (int64_t t = tile0; t < tile1; ++t) {
          const DenseTile tile(group, t);
          with_count<kMostVectors>(tile.vectors, [&](auto nv) {
            constexpr int NV = nv();
            const Element<T>* panel = tile.panel<T>(panels, in.cols) + k / kSteps<T> * NV * kWidth;
            float* out = products + (t - tile0) * size + (s * rows + n) * NV * kWidth;
            int64_t r = 0;
            const auto multiply = [&](auto mr) {
              for (; r + mr() <= some; r += mr())
                dense_tile<mr(), NV>(weights + r * kWeightStride, kWeightStride, steps_of<T>(cols), panel, k == 0,
                                     out + r * NV * kWidth);
            };
            multiply(std::integral_constant<int, kDenseRows / NV>());
            multiply(std::integral_constant<int, 2>());
            multiply(std::integral_constant<int, 1>());
          });
        }
      }
  }
}

// finish(tile, products [sets, n1 - n0, vectors]) gets those of each tile. panels are x_panels or h_panels.
template <class T, class Finish>
inline void dense_products(const Operands& in, const Group& group, char* panels, int64_t tile0, int64_t tile1,
                           int64_t n0, int64_t n1, int64_t second, const Finish& finish) {
  const int64_t sets = second < 0 ? 1 : 2, size = sets * (n1 - n0) * kMostVectors * kWidth;
  const Buffer<float> products(kDenseTiles * size);
  const Buffer<Element<T>> weights(kDenseRows * kWeightStride);
  for (int64_t t0 = tile0; t0 < tile1; t0 += kDenseTiles) {
    const int64_t t1 = tile1 - t0 < kDenseTiles ? tile1 : t0 + kDenseTiles;
    multiply_tiles<T>(in, group, panels, t0, t1, n0, n1, sets, second, weights.get(), products.get(), size);
    for (int64_t t = t0; t < t1; ++t) finish(DenseTile(group, t), products.get() + (t - t0) * size);
  }
}

// --- Ends -----------------------------------------------------------------------------------------------------------

// As dense_products(), of sorted rows [group.begin + i0, group.begin + i1) of a grouped group: finish(i, count, n,
// number, products [sets, count, number]) gets those of rows [n, n + number) with `count` sorted rows from i on. Rows
// from `next` on will be needed then.
template <class T, class Finish>
inline void grouped_products(const Operands& in, const Group& group, int64_t i0, int64_t i1, int64_t n0, int64_t n1,
                             int64_t second, const T* next, const Finish& finish) {
  const int64_t sets = second < 0 ? 1 : 2;
  const Buffer<float> products(sets * kDotChunk * kBlockRows);
  for (int64_t n = n0; n < n1; n += kBlockRows) {
    const int64_t rows = n1 - n < kBlockRows ? n1 - n : kBlockRows;
    for (int64_t i = i0; i < i1; i += kDotChunk) {
      const int64_t count = i1 - i < kDotChunk ? i1 - i : kDotChunk;
      for (int64_t s = 0; s < sets; ++s) {
        const bool more_sets = s + 1 < sets, more_rows = n + rows < n1;
        const T* after = more_sets   ? row_of_w<T>(in, group.expert, n + second)
                         : more_rows ? row_of_w<T>(in, group.expert, n + rows)
                                     : next;
        dot_products<T>(in, group.expert, n + s * second, n + s * second + rows, group.begin + i, count,
                        products.get() + s * count * rows, after);
      }
      finish(group.begin + i, count, n, rows, products.get());
    }
  }
}

// All products of units of a group and rows of its weight: emit(sorted row, row, V, number), at most kWidth at a time.
template <class T, class Emit>
inline void each_product(const Operands& in, const Group& group, char* panels, int64_t unit0, int64_t unit1, int64_t n0,
                         int64_t n1, const T* next, const Emit& emit) {
  if (group.gemm == Gemm::grouped)
    return grouped_products<T>(in, group, unit0, unit1, n0, n1, -1, next,
                               [&](int64_t i, int64_t count, int64_t n, int64_t rows, const float* products) {
                                 for (int64_t t = 0; t < count; ++t, products += rows)
                                   for (int64_t r = 0; r < rows; r += kWidth)
                                     emit(i + t, n + r, load_upto(products + r, rows - r), rows - r);
                               });
  dense_products<T>(in, group, panels, unit0, unit1, n0, n1, -1, [&](const DenseTile& tile, const float* products) {
    for (int j = 0; j < tile.vectors; ++j) {
      const int64_t i = group.begin + (tile.first + j) * kWidth;
      for (int64_t n = n0; n < n1; n += kWidth) {
        V block[kWidth];
        for (int r = 0; r < kWidth; ++r)
          block[r] = n + r < n1 ? load(products + ((n - n0 + r) * tile.vectors + j) * kWidth) : zero();
        transpose(block);
        for (int t = 0; t < kWidth && i + t < group.end; ++t) emit(i + t, n, block[t], n1 - n);
      }
    }
  });
}

// In place of the first n numbers, which are gates if there are any, the second n being what they are for.
template <Activation A>
inline void activate(float* __restrict products, int64_t n) {
  const float* __restrict second = products + n;
  if constexpr (is_gated(A))
    for (int64_t i = 0; i < n; ++i) products[i] = activated<A>(products[i], second[i]);
  else
    for (int64_t i = 0; i < n; ++i) products[i] = activated<A>(0.0f, products[i]);
}

inline void linear(const Linear& p, const Group& group, int64_t unit0, int64_t unit1, int64_t row0, int64_t row1) {
  with_float(p.in.type, [&]<class T>(T*) {
    with_float(p.out_type, [&]<class Y>(Y*) {
      const T* bias = p.bias ? static_cast<const T*>(p.bias) + group.expert * p.rows : nullptr;
      if constexpr (kSteps<Y> == 2) {  // as pairs half as much is transposed
        if (group.gemm == Gemm::dense)
          return dense_products<T>(
              p.in, group, group.x_panels, unit0, unit1, row0, row1, -1, [&](const DenseTile& tile, float* products) {
                const int64_t size = tile.vectors * kWidth, rows = row1 - row0;
                for (int64_t n = 0; bias && n < rows; ++n)
                  for (int64_t j = 0; j < size; ++j) products[n * size + j] += to_float(bias[row0 + n]);
                for (int j = 0; j < tile.vectors; ++j) {
                  const int64_t i = group.begin + (tile.first + j) * kWidth;
                  for (int64_t n = 0; n < rows; n += 2 * kWidth) {
                    V block[kWidth];
                    for (int r = 0; r < kWidth; ++r) {
                      const int64_t row = n + 2 * r;
                      block[r] = row < rows ? element<Y>(products + row * size + j * kWidth, row + 1 < rows ? size : 0)
                                            : zero();
                    }
                    transpose(block);
                    for (int t = 0; t < kWidth && i + t < group.end; ++t)
                      store_columns(static_cast<Y*>(p.y) + (i + t) * p.rows + row0 + n, block[t], rows - n);
                  }
                }
              });
      }
      each_product<T>(p.in, group, group.x_panels, unit0, unit1, row0, row1, row_of_w<T>(p.in, group.expert, row1),
                      [&](int64_t i, int64_t n, V v, int64_t count) {
                        if (bias) v = v + load_upto(bias + n, count);
                        store_upto(static_cast<Y*>(p.y) + i * p.rows + n, v, count);
                      });
    });
  });
}

inline void up(const Up& p, const Group& group, int64_t unit0, int64_t unit1, int64_t inner0, int64_t inner1) {
  with_float(p.in.type, [&]<class T>(T*) {
    with_activation(p.activation, [&](auto activation) {
      constexpr Activation A = activation();
      const int64_t second = is_gated(A) ? p.inner : -1;
      if (group.gemm == Gemm::grouped)
        return grouped_products<T>(p.in, group, unit0, unit1, inner0, inner1, second,
                                   row_of_w<T>(p.in, group.expert, inner1),
                                   [&](int64_t i, int64_t count, int64_t n, int64_t rows, float* products) {
                                     activate<A>(products, count * rows);
                                     for (int64_t t = 0; t < count; ++t, products += rows)
                                       for (int64_t r = 0; r < rows; r += kWidth)
                                         store_upto(static_cast<T*>(p.h) + (i + t) * p.inner + n + r,
                                                    load_upto(products + r, rows - r), rows - r);
                                   });
      dense_products<T>(p.in, group, group.x_panels, unit0, unit1, inner0, inner1, second,
                        [&](const DenseTile& tile, float* products) {
                          const int64_t size = tile.vectors * kWidth, rows = inner1 - inner0;
                          activate<A>(products, rows * size);
                          auto* to = tile.panel<T>(group.h_panels, p.inner) + inner0 / kSteps<T> * size;
                          for (int64_t n = 0; n < rows; n += kSteps<T>, to += size)
                            for (int64_t j = 0; j < size; j += kWidth)
                              store(reinterpret_cast<float*>(to + j),
                                    element<T>(products + n * size + j, n + 1 < rows ? size : 0));
                        });
    });
  });
}

inline void down(const Down& p, int64_t row0, int64_t row1) {
  with_float(p.in.type, [&]<class T>(T*) {
    const int64_t rows = row1 - row0;
    const Buffer<float> sums(p.tokens * rows);
    const auto added = [&](int64_t t) { return static_cast<float*>(p.y) + p.place[t] * p.rows + row0; };
    if (p.place)
      for (int64_t t = 0; t < p.tokens; ++t) std::memcpy(sums.get() + t * rows, added(t), rows * sizeof(float));
    else
      std::memset(sums.get(), 0, p.tokens * rows * sizeof(float));
    for (int64_t g = 0; g < p.num_groups; ++g) {
      const Group& group = p.groups[g];
      const int64_t all = group.end - group.begin, units = group.gemm == Gemm::dense ? tiles(all) : all;
      const bool more = g + 1 < p.num_groups;
      const T* next = row_of_w<T>(p.in, p.groups[more ? g + 1 : 0].expert, more ? row0 : row1);
      each_product<T>(p.in, group, group.h_panels, 0, units, row0, row1, next,
                      [&](int64_t i, int64_t n, V v, int64_t count) {
                        float* to = sums.get() + p.token[i] * rows + (n - row0);
                        store_upto(to, fma(splat(p.weight[i]), v, load_upto(to, count)), count);
                      });
    }
    for (int64_t t = 0; t < p.tokens; ++t)
      if (p.place)
        std::memcpy(added(t), sums.get() + t * rows, rows * sizeof(float));
      else
        for (int64_t n = 0; n < rows; n += kWidth)
          store_upto(static_cast<T*>(p.y) + t * p.rows + row0 + n, load_upto(sums.get() + t * rows + n, rows - n),
                     rows - n);
  });
}

// --- Gradients of weights -------------------------------------------------------------------------------------------

// Rows [n, n + MR) of a gradient, columns [k, k + 4 vectors).
template <int MR, class T>
inline void wgrad_tile(const Wgrad& p, const Group& group, int64_t n, int64_t k) {
  constexpr int kVectors = 4;
  V sums[MR][kVectors];
#pragma GCC unroll 16
  for (auto& row : sums)
#pragma GCC unroll 16
    for (V& v : row) v = zero();
  const int64_t cols = p.in.cols - k;
  for (int64_t i = group.begin; i < group.end; ++i) {
    const T* const x = row_of_x<T>(p.in, i) + k;
    const T* const grad = static_cast<const T*>(p.grad) + i * p.grad_stride + n;
    V xs[kVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j)
      xs[j] = cols >= kVectors * kWidth ? load(x + j * kWidth) : load_upto(x + j * kWidth, cols - j * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const V g = splat(to_float(grad[r]));
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sums[r][j] = fma(g, xs[j], sums[r][j]);
    }
  }
  T* const to = static_cast<T*>(p.dw) + (group.expert * p.rows + n) * p.in.cols + k;
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < kVectors; ++j) store_upto(to + r * p.in.cols + j * kWidth, sums[r][j], cols - j * kWidth);
}

inline void wgrad(const Wgrad& p, const Group& group, int64_t row0, int64_t row1) {
  constexpr int kRows = kWidth == 16 ? 4 : 2;
  with_float(p.in.type, [&]<class T>(T*) {
    for (int64_t n = row0; n < row1; n += kRows)
      with_count<kRows>(row1 - n, [&](auto rows) {
        for (int64_t k = 0; k < p.in.cols; k += 4 * kWidth) wgrad_tile<rows(), T>(p, group, n, k);
      });
  });
}

}  // namespace
}  // namespace effk::moe
