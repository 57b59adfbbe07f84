// vq for vectors of floats of any width. A level that includes this has the vectors of kernels/common/vector_<level>.h
// and defines before, in effk::vq's anonymous namespace:
//   kDotQueries, kValuePairs: of tiles of products in attention; kEncodeVectors, kEncodeWords: of those of encoding
//   load_pair(p, a, b), load_pair(p, n, a, b): 2 kWidth elements of T, or n of them and zeros, as two vectors, in the
//     order that kAlternating<T> tells: the even ones and the odd ones, or the first and the second half
//   larger(x, y); largest(v); any_above(x, y): whether a number of x is larger; nearest_integer(v); power(n): 2^n;
//   zero_below(y, x, limit): 0 where x < limit, else y Numbers, kWidth signed integers of 32 bits: load_numbers(p),
//   splat_number(i); nearer(x, y, at, best, code), which
//     takes x and `at` into best and code where x < best
//   ranks_of(v): numbers that order as floats do, NaN lowest; count_above(x, y): how many numbers of x are larger
//   append(scores, threshold, position, kept, positions): stores those scores that aren't below (nor NaN) and their
//     positions, `position` being that of the first, and tells how many; writes kWidth of both
//   store_quads(p, v): quads as every fourth of those at p
//   scores_of(p, pair, head, heads, key0, key1, out, stride, raw): the scores of at most kHeads heads of a pair from
//     `head` on, kHeads being 4 at most; or, raw, the sums of an 8-bit table as floats, NaN if it has none; false as
//     Cpu::score
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "cpu_common.h"

namespace effk::vq {
namespace {

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int kPair = 2 * kWidth;

// --- Products of rows with queries ----------------------------------------------------------------------------------

constexpr int kDotRows = 4;

// q as load_pair() orders elements, zeros up to a pair's end.
template <class T, class From>
inline void order_as(const From* q, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += kPair) {
    float block[kPair] = {};
    for (int64_t d = 0; d < kPair && i + d < n; ++d)
      block[kAlternating<T> ? d % 2 * kWidth + d / 2 : d] = to_float(q[i + d]);
    std::memcpy(out + i, block, sizeof(block));
  }
}

// out[q * out_stride + r] = queries[q] . rows[r], for KQ queries and kDotRows rows; then, if asked for, rows[r] .
// rows[r].
template <int KQ, bool kSquares, class T>
[[gnu::noinline]] void dot_tile(const T* const* rows, int64_t dim, const float* queries, int64_t q_stride, float* out,
                                int64_t out_stride, const T* const* ahead) {
  const T* r[kDotRows];
  V sums[KQ + kSquares][kDotRows];
#pragma GCC unroll 8
  for (int j = 0; j < kDotRows; ++j) r[j] = rows[j];
#pragma GCC unroll 8
  for (auto& query : sums)
#pragma GCC unroll 8
    for (V& v : query) v = zero();
  const auto step = [&](int64_t d, const auto& take) {
    V low[KQ], high[KQ];
#pragma GCC unroll 8
    for (int i = 0; i < KQ; ++i)
      low[i] = load(queries + i * q_stride + d), high[i] = load(queries + i * q_stride + d + kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kDotRows; ++j) {
      V a, b;
      take(r[j] + d, a, b);
#pragma GCC unroll 8
      for (int i = 0; i < KQ; ++i) sums[i][j] = fma(b, high[i], fma(a, low[i], sums[i][j]));
      if constexpr (kSquares) sums[KQ][j] = fma(b, b, fma(a, a, sums[KQ][j]));
    }
  };
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t d = 0, row = 0, at = 0;
  for (; d + kPair <= dim; d += kPair) {
    if (ahead)  // in the order of addresses, which the machine's own prefetcher understands
#pragma GCC unroll 8
      for (int64_t i = 0; i < kDotRows * kPair; i += kLine) {
        __builtin_prefetch(ahead[row] + at, 0, 2);
        at += kLine;
        if (at >= dim) at = 0, ++row;
      }
    step(d, [](const T* p, V& a, V& b) { load_pair(p, a, b); });
  }
  if (d < dim) step(d, [&](const T* p, V& a, V& b) { load_pair(p, dim - d, a, b); });
#pragma GCC unroll 8
  for (int i = 0; i < KQ + kSquares; ++i) store_sums(out + i * out_stride, sums[i]);
}

template <class T>
inline void dot_tiles(const T* const* rows, int64_t dim, const float* queries, int64_t q_stride, int64_t count,
                      float* out, int64_t out_stride, const T* const* ahead) {
  for (int64_t i = 0; i < count; i += kDotQueries)
    with_count<kDotQueries>(count - i, [&](auto kq) {
      dot_tile<kq(), false, T>(rows, dim, queries + i * q_stride, q_stride, out + i * out_stride, out_stride,
                               i == 0 ? ahead : nullptr);
    });
}

// --- Attention ------------------------------------------------------------------------------------------------------

constexpr int64_t kKeys = 16;      // of a block: their rows stay in a near cache between the two products
constexpr int kWeightQueries = 4;  // of a tile of weights

inline V exponential(V x) {
  const V n = nearest_integer(x * splat(1.44269504f));
  const V r = fma(n, splat(-0x1.7f7d1cp-20f), fma(n, splat(-0x1.62e4p-1f), x));  // ln 2 in two parts
  V y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1));
  y = fma(y, r, splat(1));
  return zero_below(y * power(n), x, -87);
}

// sums[q][d] += weights[q][i] * rows[i][d] over n rows, for KQ queries and KP pairs of columns.
template <int KQ, int KP, class T>
[[gnu::noinline]] void weigh(const T* const* rows, int64_t n, int64_t column, int64_t columns, const float* weights,
                             float* sums, int64_t stride, const T* const* ahead) {
  V s[KQ][KP][2];
#pragma GCC unroll 8
  for (int q = 0; q < KQ; ++q)
#pragma GCC unroll 8
    for (int p = 0; p < KP; ++p)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) s[q][p][half] = load(sums + q * stride + (2 * p + half) * kWidth);
  const auto add = [&](const auto& take) {
    for (int64_t i = 0; i < n; ++i) {
      V v[KP][2];
#pragma GCC unroll 8
      for (int p = 0; p < KP; ++p) take(rows[i] + column + p * kPair, v[p][0], v[p][1]);
      if (ahead)
#pragma GCC unroll 8
        for (int64_t p = 0; p < KP * kPair; p += 64 / static_cast<int64_t>(sizeof(T)))
          __builtin_prefetch(ahead[i] + column + p, 0, 2);
#pragma GCC unroll 8
      for (int q = 0; q < KQ; ++q) {
        const V w = splat(weights[q * kKeys + i]);
#pragma GCC unroll 8
        for (int p = 0; p < KP; ++p) {
          s[q][p][0] = fma(w, v[p][0], s[q][p][0]);
          s[q][p][1] = fma(w, v[p][1], s[q][p][1]);
        }
      }
    }
  };
  if (column + KP * kPair <= columns)
    add([](const T* p, V& a, V& b) { load_pair(p, a, b); });
  else
    add([&](const T* p, V& a, V& b) { load_pair(p, columns - column, a, b); });
#pragma GCC unroll 8
  for (int q = 0; q < KQ; ++q)
#pragma GCC unroll 8
    for (int p = 0; p < KP; ++p)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) store(sums + q * stride + (2 * p + half) * kWidth, s[q][p][half]);
}

template <class T>
inline void weigh_all(const T* const* rows, int64_t n, int64_t columns, const float* weights, int64_t queries,
                      float* sums, int64_t stride, const T* const* ahead) {
  for (int64_t q = 0; q < queries; q += kWeightQueries)
    with_count<kWeightQueries>(queries - q, [&](auto kq) {
      const auto block = [&](auto kp, int64_t column) {
        weigh<kq(), kp(), T>(rows, n, column, columns, weights + q * kKeys, sums + q * stride + column, stride,
                             q == 0 ? ahead : nullptr);
      };
      int64_t column = 0;
      for (; column + kValuePairs * kPair <= columns; column += kValuePairs * kPair)
        block(std::integral_constant<int, kValuePairs>(), column);
      for (; column < columns; column += kPair) block(std::integral_constant<int, 1>(), column);
    });
}

template <class T>
inline void attend_entries(const Attend& p, int64_t unit, int64_t begin, int64_t end, float* partial) {
  const Unit u(p, unit);
  const int64_t dim = padded(p.dim, kPair), values = padded(p.value_dim, kPair);
  const Buffer<float> queries(u.heads * dim), sums(u.heads * values), weights(u.heads * kKeys);
  const Buffer<float> most(u.heads), totals(u.heads * kWidth);
  float* const w = weights.get();
  for (int64_t i = 0; i < u.heads; ++i) {
    order_as<T>(query_at<T>(p, u.b, u.first + i), p.dim, queries.get() + i * dim);
    most.get()[i] = -INFINITY;
    store(totals.get() + i * kWidth, zero());
  }
  std::memset(sums.get(), 0, u.heads * values * sizeof(float));
  // Rows of two blocks in turn. Beyond the last entry it comes again. The entries of a block are `apart`, not beside
  // each other: a core reads several streams of addresses a good deal faster than one.
  const int64_t apart = (end - begin) / kKeys;
  const T *keys[2][kKeys], *rows[2][kKeys];
  const auto find = [&](int64_t from, int which) {
    const T *const first_key = key_at<T>(p, u, 0), *const first_row = value_at<T>(p, u, 0);
    const int64_t* const list = p.idx ? p.idx + unit * p.cap : nullptr;
    for (int64_t i = 0; i < kKeys; ++i) {
      const int64_t n = from + i < end ? from + i - begin : end - begin - 1;
      const int64_t at = begin + (n < kKeys * apart ? n / kKeys + n % kKeys * apart : n), s = list ? list[at] : at;
      keys[which][i] = first_key + s * p.k_stride[2];
      rows[which][i] = first_row + s * p.v_stride[2];
    }
  };
  if (begin < end) find(begin, 0);
  for (int64_t from = begin, which = 0; from < end; from += kKeys, which ^= 1) {
    const int64_t n = end - from < kKeys ? end - from : kKeys;
    find(from + kKeys < end ? from + kKeys : end - 1, which ^ 1);
    for (int64_t i = 0; i < n; i += kDotRows)
      dot_tiles<T>(keys[which] + i, p.dim, queries.get(), dim, u.heads, w + i, kKeys, keys[which ^ 1] + i);
    bool none = false;  // whether a score is -inf
    for (int64_t i = 0; i < u.heads; ++i) {
      float* const own = w + i * kKeys;
      V scores[kKeys / kWidth], total = load(totals.get() + i * kWidth);
#pragma GCC unroll 4
      for (int k = 0; k < kKeys / kWidth; ++k) scores[k] = load(own + k * kWidth) * splat(p.scale);
      if (n < kKeys) {
        for (int k = 0; k < kKeys / kWidth; ++k) store(own + k * kWidth, scores[k]);
        for (int64_t k = 0; k < n; ++k) none |= own[k] == -INFINITY;
        for (int64_t k = n; k < kKeys; ++k) own[k] = -INFINITY;
        for (int k = 0; k < kKeys / kWidth; ++k) scores[k] = load(own + k * kWidth);
      }
      bool above = false;
#pragma GCC unroll 4
      for (int k = 0; k < kKeys / kWidth; ++k) {
        above |= any_above(scores[k], splat(most.get()[i]));
        none |= n == kKeys && any_above(splat(std::numeric_limits<float>::lowest()), scores[k]);
      }
      if (above) {
        V high = splat(most.get()[i]);
        for (const V s : scores) high = larger(s, high);
        const float top = largest(high), factor = most.get()[i] == -INFINITY ? 0.0f : std::exp(most.get()[i] - top);
        total *= splat(factor);
        for (int64_t d = 0; d < values; d += kWidth) {
          float* const at = sums.get() + i * values + d;
          store(at, load(at) * splat(factor));
        }
        most.get()[i] = top;
      }
      const V from_most = splat(most.get()[i] == -INFINITY ? 0.0f : most.get()[i]);
#pragma GCC unroll 4
      for (int k = 0; k < kKeys / kWidth; ++k) {
        const V weight = exponential(scores[k] - from_most);
        store(own + k * kWidth, weight);
        total += weight;
      }
      store(totals.get() + i * kWidth, total);
    }
    if (!none) {
      weigh_all<T>(rows[which], n, p.value_dim, w, u.heads, sums.get(), values, rows[which ^ 1]);
      continue;
    }
    for (int64_t i = 0; i < u.heads; ++i) {  // what adds nothing may be infinite
      const T* some[kKeys];
      float own[kKeys];
      int64_t left = 0;
      for (int64_t k = 0; k < n; ++k)
        if (w[i * kKeys + k] != 0) {
          some[left] = rows[which][k];
          own[left++] = w[i * kKeys + k];
        }
      weigh_all<T>(some, left, p.value_dim, own, 1, sums.get() + i * values, values, nullptr);
    }
  }
  for (int64_t i = 0; i < u.heads; ++i) {
    float *const to = partial + i * (p.value_dim + 2), *const own = sums.get() + i * values;
    for (int64_t d = 0; d < p.value_dim; ++d) {
      const int64_t at = d % kPair;
      to[d] = own[d - at + (kAlternating<T> ? at % 2 * kWidth + at / 2 : at)];
    }
    to[p.value_dim] = sum(load(totals.get() + i * kWidth));
    to[p.value_dim + 1] = most.get()[i];
  }
}

inline void attend(const Attend& p, int64_t unit, int64_t begin, int64_t end, float* partial) {
  with_float(p.type, [&]<class T>(T*) { attend_entries<T>(p, unit, begin, end, partial); });
}

// --- Tables ---------------------------------------------------------------------------------------------------------

// x m, of a row and a matrix [dim, dim].
template <class T>
inline void times(const T* x, const float* matrix, int64_t dim, float* out) {
  constexpr int kVectors = 4;
  for (int64_t e = 0; e < dim; e += kVectors * kWidth) {
    V sums[kVectors] = {zero(), zero(), zero(), zero()};
    const bool whole = e + kVectors * kWidth <= dim;
    for (int64_t d = 0; d < dim; ++d) {
      const V v = splat(to_float(x[d]));
      const float* const row = matrix + d * dim + e;
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i)
        sums[i] = fma(v, whole ? load(row + i * kWidth) : load_upto(row + i * kWidth, dim - e - i * kWidth), sums[i]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) store_upto(out + e + i * kWidth, sums[i], dim - e - i * kWidth);
  }
}

inline void transform(const Lut& p, int64_t query0, int64_t query1) {
  with_float(p.type, [&]<class T>(T*) {
    for (int64_t i = query0; i < query1; ++i) {
      const int64_t b = i / p.heads, h = i % p.heads;
      const T* const q = static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1];
      float* const out = p.query + i * p.dim;
      if (p.inv)
        times(q, p.inv + h / p.group * p.dim * p.dim, p.dim, out);
      else
        for (int64_t d = 0; d < p.dim; ++d) out[d] = to_float(q[d]);
    }
  });
}

constexpr int64_t kLutAhead = 16;  // rows

inline void lut(const Lut& p, int64_t head, int64_t row0, int64_t row1) {
  const int64_t rows = p.subspaces * p.words, size = p.dim / p.subspaces, stride = padded(size, kPair);
  const Buffer<float> queries(p.batch * p.group * stride), room(p.group * kDotRows);
  for (int64_t row = row0; row < row1;) {
    const int64_t j = row / p.words, end = row1 < (j + 1) * p.words ? row1 : (j + 1) * p.words;
    for (int64_t i = 0; i < p.batch * p.group; ++i) {
      const int64_t query = i / p.group * p.heads + head * p.group + i % p.group;
      order_as<float>(p.query + query * p.dim + j * size, size, queries.get() + i * stride);
    }
    for (; row < end; row += kDotRows) {
      const float *words[kDotRows], *ahead[kDotRows];
      const int64_t some = end - row < kDotRows ? end - row : kDotRows;
      for (int64_t i = 0; i < kDotRows; ++i) {
        words[i] = p.codebook + (head * rows + row + (i < some ? i : some - 1)) * size;
        ahead[i] = row + kLutAhead + i < rows ? words[i] + kLutAhead * size : words[i];
      }
      for (int64_t b = 0; b < p.batch; ++b) {
        float* const out = p.out + (b * p.heads + head * p.group) * rows + row;
        const bool whole = some == kDotRows;
        dot_tiles<float>(words, size, queries.get() + b * p.group * stride, stride, p.group, whole ? out : room.get(),
                         whole ? rows : kDotRows, b == 0 ? ahead : nullptr);
        if (whole) continue;
        for (int64_t g = 0; g < p.group; ++g)
          for (int64_t i = 0; i < some; ++i) out[g * rows + i] = room.get()[g * kDotRows + i];
      }
    }
    row = end;
  }
}

// The quads of those queries that have three others of their group behind them, every fourth.
inline void write_quads(const Score& p, int64_t query0, int64_t query1) {
  const int64_t rows = p.subspaces * p.words;
  for (int64_t query = query0; query < query1; ++query) {
    const int64_t head = query % p.group;
    if (head % kQuad || head + kQuad > p.group) continue;
    float* const out = quads_of(p, query);
    for (int64_t row = 0; row < rows; row += kWidth) {
      V v[4];
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h) v[h] = load_upto(p.lut + (query + h) * rows + row, rows - row);
      transpose_quads(v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store_quads(out + (row + i) * kQuad, v[i]);
    }
  }
}

// As quantize_table(), to the bit.
inline void quantize(const float* lut, int64_t subspaces, int64_t words, uint8_t* out, int64_t words_stride,
                     float* scale) {
  const Buffer<float> lows(subspaces);
  float range = 0, base = 0;
  V finite = zero();
  for (int64_t j = 0; j < subspaces; ++j) {
    const float* const row = lut + j * words;
    V negative = splat(-INFINITY), high = splat(-INFINITY);
    int64_t c = 0;
    for (; c + kWidth <= words; c += kWidth) {
      const V x = load(row + c);
      finite += x * zero();
      negative = larger(-x, negative);
      high = larger(x, high);
    }
    float low = -largest(negative), most = largest(high);
    for (; c < words; ++c) {
      finite += splat(row[c] * 0.0f);
      low = row[c] < low ? row[c] : low;
      most = row[c] > most ? row[c] : most;
    }
    lows.get()[j] = low;
    range = most - low > range ? most - low : range;
    base += low;
  }
  const float step = range / 255, whole = sum(finite);
  std::memset(out, 0, subspaces * words_stride);
  if (whole != whole || step - step != 0) {
    scale[0] = scale[1] = NAN;
    return;
  }
  scale[0] = step;
  scale[1] = base;
  if (!(step > 0)) return;
  for (int64_t j = 0; j < subspaces; ++j) {
    const float* const row = lut + j * words;
    const V low = splat(lows.get()[j]), by = splat(step);
    for (int64_t c = 0; c < words; c += kWidth) {
      uint8_t bytes[kWidth];
      store_bytes(bytes, (load_upto(row + c, words - c) - low) / by);
      std::memcpy(out + j * words_stride + c, bytes, words - c < kWidth ? words - c : kWidth);
    }
  }
}

// --- Encoding -------------------------------------------------------------------------------------------------------
// Many keys are lanes of vectors, and words are broadcast to them; a few keys are multiplied as they lie.

constexpr int64_t kLanes = kEncodeVectors * kWidth, kFewKeys = 8;

inline bool has_few_keys(const Encode& p) { return p.keys < kFewKeys; }

// Squared lengths of the words, and chol's columns as rows.
inline int64_t encode_floats(const Encode& p) {
  return has_few_keys(p) ? 0 : p.subspaces * p.words + (p.chol ? p.dim * p.dim : 0);
}

inline void encode_prepare(const Encode& p, int64_t head0, int64_t head1) {
  const int64_t size = p.dim / p.subspaces, rows = p.subspaces * p.words;
  if (has_few_keys(p)) return;
  for (int64_t head = head0; head < head1; ++head) {
    float* const to = p.prepared + head * encode_floats(p);
    for (int64_t i = 0; i < rows; ++i) {
      const float* const word = p.codebook + (head * rows + i) * size;
      V total = zero();
      for (int64_t d = 0; d < size; d += kWidth) {
        const V v = load_upto(word + d, size - d);
        total = fma(v, v, total);
      }
      to[i] = sum(total);
    }
    if (!p.chol) continue;
    for (int64_t d = 0; d < p.dim; ++d)
      for (int64_t e = 0; e < p.dim; ++e) to[rows + e * p.dim + d] = p.chol[(head * p.dim + d) * p.dim + e];
  }
}

inline void write_code(const Encode& p, char* key, int64_t j, int32_t code) {
  if (p.codes == Codes::i16)
    reinterpret_cast<int16_t*>(key)[j] = static_cast<int16_t>(code);
  else if (p.codes == Codes::u8)
    key[j] = static_cast<char>(code);
  else
    key[j / 2] = static_cast<char>(j % 2 ? key[j / 2] | code << 4 : code);
}

// Products of KW rows and the lanes of a panel [size, kLanes]; the rows after them come next.
template <int KW>
[[gnu::always_inline]] inline void panel_tile(const float* rows, int64_t size, const float* panel,
                                              V (&sums)[KW][kEncodeVectors]) {
#pragma GCC unroll 8
  for (auto& row : sums)
#pragma GCC unroll 8
    for (V& v : row) v = zero();
  for (int64_t i = 0; i < KW * size; i += 16) __builtin_prefetch(rows + KW * size + i, 0, 3);
  for (int64_t d = 0; d < size; ++d, panel += kLanes) {
    V x[kEncodeVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kEncodeVectors; ++v) x[v] = load(panel + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < KW; ++r) {
      const V w = splat(rows[r * size + d]);
#pragma GCC unroll 8
      for (int v = 0; v < kEncodeVectors; ++v) sums[r][v] = fma(w, x[v], sums[r][v]);
    }
  }
}

template <int KW>
[[gnu::noinline]] void multiply_tile(const float* rows, int64_t size, const float* panel, float* out) {
  V sums[KW][kEncodeVectors];
  panel_tile<KW>(rows, size, panel, sums);
#pragma GCC unroll 8
  for (int r = 0; r < KW; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kEncodeVectors; ++v) store(out + r * kLanes + v * kWidth, sums[r][v]);
}

template <int KW>
[[gnu::noinline]] void nearest_tile(const float* rows, int64_t size, const float* panel, const float* squares,
                                    int32_t first, float* best, int32_t* codes) {
  V sums[KW][kEncodeVectors];
  panel_tile<KW>(rows, size, panel, sums);
#pragma GCC unroll 8
  for (int v = 0; v < kEncodeVectors; ++v) {
    V least = load(best + v * kWidth);
    Numbers code = load_numbers(codes + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < KW; ++r)
      nearer(fma(splat(-2), sums[r][v], splat(squares[r])), splat_number(first + r), least, code);
    store(best + v * kWidth, least);
    store_numbers(codes + v * kWidth, code);
  }
}

template <class T>
inline void encode_many(const Encode& p, int64_t pair, int64_t key0, int64_t key1) {
  const int64_t b = pair / p.heads, head = pair % p.heads, size = p.dim / p.subspaces, rows = p.subspaces * p.words;
  const float* const squares = p.prepared + head * encode_floats(p);
  const Buffer<float> panel(p.dim * kLanes), product(p.chol ? p.dim * kLanes : 1), best(kLanes);
  const Buffer<int32_t> codes(p.subspaces * kLanes);
  const T* const keys = static_cast<const T*>(p.k) + b * p.k_stride[0] + head * p.k_stride[1];
  for (int64_t s = key0; s < key1; s += kLanes) {
    const int64_t n = key1 - s < kLanes ? key1 - s : kLanes;
    for (int64_t lane = 0; lane < kLanes; lane += kWidth)
      for (int64_t d = 0; d < p.dim; d += kWidth) {
        V block[kWidth];
        for (int64_t i = 0; i < kWidth; ++i)
          block[i] = lane + i < n ? load_upto(keys + (s + lane + i) * p.k_stride[2] + d, p.dim - d) : zero();
        transpose(block);
        for (int64_t i = 0; i < kWidth && d + i < p.dim; ++i) store(panel.get() + (d + i) * kLanes + lane, block[i]);
      }
    const float* x = panel.get();
    if (p.chol) {
      for (int64_t e = 0; e < p.dim; e += kEncodeWords)
        with_count<kEncodeWords>(p.dim - e, [&](auto kw) {
          multiply_tile<kw()>(squares + rows + e * p.dim, p.dim, panel.get(), product.get() + e * kLanes);
        });
      x = product.get();
    }
    for (int64_t j = 0; j < p.subspaces; ++j) {
      int32_t* const own = codes.get() + j * kLanes;
      for (int64_t i = 0; i < kLanes; ++i) best.get()[i] = INFINITY, own[i] = 0;
      for (int64_t c = 0; c < p.words; c += kEncodeWords)
        with_count<kEncodeWords>(p.words - c, [&](auto kw) {
          nearest_tile<kw()>(p.codebook + (head * rows + j * p.words + c) * size, size, x + j * size * kLanes,
                             squares + j * p.words + c, static_cast<int32_t>(c), best.get(), own);
        });
    }
    char* out = static_cast<char*>(p.out) + (pair * p.keys + s) * code_bytes(p.codes, p.subspaces);
    for (int64_t i = 0; i < n; ++i, out += code_bytes(p.codes, p.subspaces))
      for (int64_t j = 0; j < p.subspaces; ++j) write_code(p, out, j, codes.get()[j * kLanes + i]);
  }
}

template <class T>
inline void encode_few(const Encode& p, int64_t pair, int64_t key0, int64_t key1) {
  const int64_t b = pair / p.heads, head = pair % p.heads, size = p.dim / p.subspaces, rows = p.subspaces * p.words;
  const int64_t stride = padded(size, kPair);
  const Buffer<float> x(p.dim), queries(p.subspaces * kDotQueries * stride);
  for (int64_t s = key0; s < key1; s += kDotQueries)
    with_count<kDotQueries>(key1 - s, [&](auto kq) {
      constexpr int KQ = kq();
      for (int64_t i = 0; i < KQ; ++i) {
        const T* const key =
            static_cast<const T*>(p.k) + b * p.k_stride[0] + head * p.k_stride[1] + (s + i) * p.k_stride[2];
        if (p.chol)
          times(key, p.chol + head * p.dim * p.dim, p.dim, x.get());
        else
          for (int64_t d = 0; d < p.dim; ++d) x.get()[d] = to_float(key[d]);
        for (int64_t j = 0; j < p.subspaces; ++j)
          order_as<float>(x.get() + j * size, size, queries.get() + (j * KQ + i) * stride);
      }
      for (int64_t j = 0; j < p.subspaces; ++j) {
        float best[KQ];
        int32_t codes[KQ] = {};
        for (float& least : best) least = INFINITY;
        for (int64_t c = 0; c < p.words; c += kDotRows) {
          const float* words[kDotRows];
          for (int64_t i = 0; i < kDotRows; ++i)
            words[i] = p.codebook + (head * rows + j * p.words + (c + i < p.words ? c + i : p.words - 1)) * size;
          float products[KQ + 1][kDotRows];
          dot_tile<KQ, true, float>(words, size, queries.get() + j * KQ * stride, stride, products[0], kDotRows,
                                    nullptr);
          for (int i = 0; i < KQ; ++i)
            for (int r = 0; r < kDotRows; ++r) {
              const float distance = products[KQ][r] - 2 * products[i][r];
              if (distance < best[i]) {
                best[i] = distance;
                codes[i] = static_cast<int32_t>(c + r);
              }
            }
        }
        for (int64_t i = 0; i < KQ; ++i)
          write_code(p, static_cast<char*>(p.out) + (pair * p.keys + s + i) * code_bytes(p.codes, p.subspaces), j,
                     codes[i]);
      }
    });
}

inline void encode(const Encode& p, int64_t pair, int64_t key0, int64_t key1) {
  with_float(p.type, [&]<class T>(T*) {
    if (has_few_keys(p))
      encode_few<T>(p, pair, key0, key1);
    else
      encode_many<T>(p, pair, key0, key1);
  });
}

// --- Scores ---------------------------------------------------------------------------------------------------------

constexpr int64_t kHeads = 4;  // that share codes on their way

inline bool score(const Score& p, int64_t pair, int64_t key0, int64_t key1) {
  const int64_t len = length(p, pair / (p.heads / p.group)), end = key1 < len ? key1 : len;
  for (int64_t g = 0; g < p.group; g += kHeads) {
    const int64_t heads = p.group - g < kHeads ? p.group - g : kHeads;
    float* const out = p.out + (first_query(p, pair) + g) * p.keys;
    if (key0 < end && !scores_of(p, pair, g, heads, key0, end, out + key0, p.keys, false)) return false;
    for (int64_t i = 0; i < heads; ++i)
      for (int64_t s = key0 > end ? key0 : end; s < key1; ++s) out[i * p.keys + s] = -INFINITY;
  }
  return true;
}

// --- The best -------------------------------------------------------------------------------------------------------

// Ranks order as scores do, NaN lowest.
inline float score_at(int32_t rank) { return float_of(static_cast<uint32_t>(rank ^ (rank >> 31 & 0x7fffffff))); }

// Takes all above a rank, and so many that equal it.
struct Limit {
  int32_t rank;
  int64_t equals;
};

// Of the k best of n ranks, 0 < k <= n, which all are above `low`. There is room for kWidth more.
inline Limit limit_of(int32_t* ranks, int64_t n, int64_t k, int64_t low) {
  int64_t high = INT32_MIN, above = 0;
  for (int64_t i = 0; i < n; ++i) high = ranks[i] > high ? ranks[i] : high;
  for (int64_t i = 0; i < kWidth; ++i) ranks[n + i] = INT32_MIN;
  // At least k are above `low`, fewer above `high`.
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += kWidth)
      count += count_above(load_numbers(ranks + i), splat_number(static_cast<int32_t>(middle)));
    if (count == k) return {static_cast<int32_t>(middle), 0};
    if (count < k) {
      high = middle;
      above = count;
    } else {
      low = middle;
    }
  }
  return {static_cast<int32_t>(high), k - above};
}

// A set of positions.
class Positions {
 public:
  explicit Positions(int64_t n) : words_((n + 63) / 64), bits_(words_ + 1) { clear(); }
  void clear() { std::memset(bits_.get(), 0, words_ * 8); }
  void add(int64_t i) { bits_.get()[i / 64] |= uint64_t{1} << i % 64; }
  void add(int64_t begin, int64_t end) {
    for (; begin < end && begin % 64; ++begin) add(begin);
    for (; begin + 64 <= end; begin += 64) bits_.get()[begin / 64] = ~uint64_t{0};
    for (; begin < end; ++begin) add(begin);
  }
  uint64_t* words() const { return bits_.get(); }
  void write(int64_t cap, int64_t* idx, int64_t* count) const {
    int64_t found = 0;
    for (int64_t i = 0; i < words_; ++i) {
      uint64_t word = bits_.get()[i];
      const int64_t next = found + __builtin_popcountll(word), base = i * 64;
      if (next + 8 <= cap) {
        // Eight at a time, without a look at how many are left: they are overwritten.
        for (int64_t* to = idx + found; to < idx + next;) {
#pragma GCC unroll 8
          for (int j = 0; j < 8; ++j, ++to) {
            *to = base + static_cast<int64_t>(_tzcnt_u64(word));  // 64 where none is left
            word &= word - 1;
          }
        }
      } else {
        for (int64_t* to = idx + found; word; word &= word - 1) *to++ = base + __builtin_ctzll(word);
      }
      found = next;
    }
    *count = found;
    for (; found < cap; ++found) idx[found] = -1;
  }

 private:
  int64_t words_;
  Buffer<uint64_t> bits_;
};

constexpr int64_t kBlock = 256;                     // keys scored at a time
constexpr int64_t kSample = 1024, kSampleRun = 16;  // scores that the guess is made from, and neighbours among them

// Marks the k best of keys [first, last) of some heads in `sets`, one a head or the same.
inline bool mark_best_of(const TopK& top, int64_t pair, int64_t g, int64_t heads, int64_t first, int64_t last,
                         Positions* const* sets) {
  const Score& p = top.score;
  const int64_t n = last - first, k = top.k;
  float block[kHeads * (kBlock + kWidth)];
  constexpr int64_t kStride = kBlock + kWidth;
  // What a sample says will let the k best through, and little more.
  float guess[kHeads];
  const double share = static_cast<double>(kSample) * static_cast<double>(k) / static_cast<double>(n);
  const auto among = static_cast<int64_t>(share + 4 * std::sqrt(share)) + 4;
  bool guessed = n >= 4 * kSample && among < kSample / 2;
  if (guessed) {
    Buffer<int32_t> sample(kHeads * (kSample + kWidth));
    for (int64_t i = 0, at = 0; i < kSample; i += kSampleRun, ++at) {
      const int64_t s = first + at * ((n - kSampleRun) / (kSample / kSampleRun - 1));
      if (!scores_of(p, pair, g, heads, s, s + kSampleRun, block, kStride, true)) return false;
      for (int64_t h = 0; h < heads; ++h)
        for (int64_t j = 0; j < kSampleRun; j += kWidth)
          store_numbers(sample.get() + h * (kSample + kWidth) + i + j, ranks_of(load(block + h * kStride + j)));
    }
    for (int64_t h = 0; h < heads; ++h) {
      const Limit limit = limit_of(sample.get() + h * (kSample + kWidth), kSample, among, int64_t{INT32_MIN} - 1);
      guess[h] = score_at(limit.rank);
    }
  }
  const Buffer<int32_t> memory(heads * 2 * (n + kBlock));
  const auto ranks_at = [&](int64_t h) { return memory.get() + h * 2 * (n + kBlock); };
  int64_t counts[kHeads] = {};
  bool all[kHeads];
  for (int64_t h = 0; h < heads; ++h) all[h] = !guessed;
  for (int64_t s = first; s < last; s += kBlock) {
    const int64_t size = last - s < kBlock ? last - s : kBlock;
    if (!scores_of(p, pair, g, heads, s, s + size, block, kStride, true)) return false;
    for (int64_t h = 0; h < heads; ++h) {
      float* const own = block + h * kStride;
      int32_t* const ranks = ranks_at(h);
      if (!guessed) {
        for (int64_t i = 0; i < size; i += kWidth) store_numbers(ranks + (s - first) + i, ranks_of(load(own + i)));
        continue;
      }
      for (int64_t i = size; i < size + kWidth; ++i) own[i] = NAN;
      int64_t count = counts[h];
      int32_t* const positions = ranks + n + kBlock;
      for (int64_t i = 0; i < size; i += kWidth)
        count += append(load(own + i), guess[h], static_cast<int32_t>(s + i), reinterpret_cast<float*>(ranks) + count,
                        positions + count);  // ranked when all are there
      counts[h] = count;
    }
  }
  for (int64_t h = 0; h < heads; ++h) {
    int32_t* const ranks = ranks_at(h);
    int64_t low = int64_t{INT32_MIN} - 1;
    if (guessed && counts[h] < k) {  // a wrong guess: all ranks after all
      all[h] = true;
      for (int64_t s = first; s < last; s += kBlock) {
        const int64_t size = last - s < kBlock ? last - s : kBlock;
        scores_of(p, pair, g + h, 1, s, s + size, block, kStride, true);
        for (int64_t i = 0; i < size; i += kWidth) store_numbers(ranks + (s - first) + i, ranks_of(load(block + i)));
      }
    }
    if (!all[h])
      for (int64_t i = 0; i < counts[h]; i += kWidth)
        store_numbers(ranks + i, ranks_of(load(reinterpret_cast<const float*>(ranks) + i)));
    const int64_t count = all[h] ? n : counts[h];
    int32_t* const positions = ranks + n + kBlock;
    const Limit limit = limit_of(ranks, count, k, low);
    int64_t left = limit.equals;
    Positions& set = *sets[h];
    if (all[h]) {
      uint64_t* const words = set.words();
      for (int64_t i = 0; i < n; ++i) {
        const bool equal = ranks[i] == limit.rank && left > 0;
        left -= equal;
        words[(first + i) / 64] |= static_cast<uint64_t>(ranks[i] > limit.rank || equal) << (first + i) % 64;
      }
    } else {
      if (left > 0)
        for (int64_t i = 0; left > 0; ++i)
          if (ranks[i] == limit.rank) {
            set.add(positions[i]);
            --left;
          }
      const int64_t kept = keep_above(ranks, positions, count, limit.rank);
      for (int64_t i = 0; i < kept; ++i) set.add(positions[i]);
    }
  }
  return true;
}

inline bool topk(const TopK& top, int64_t pair) {
  const Score& p = top.score;
  const int64_t len = length(p, pair / (p.heads / p.group));
  const int64_t first = top.sink < len ? top.sink : len, last = len - top.window > first ? len - top.window : first;
  const int64_t lists = top.union_group ? 1 : kHeads;
  std::optional<Positions> sets[kHeads];
  Positions* list[kHeads];
  for (int64_t i = 0; i < kHeads; ++i) {
    if (i < lists) sets[i].emplace(len);
    list[i] = &*sets[i < lists ? i : 0];
  }
  for (int64_t g = 0; g < p.group; g += kHeads) {
    const int64_t heads = p.group - g < kHeads ? p.group - g : kHeads;
    for (int64_t i = 0; i < lists; ++i) {
      if (g > 0 && top.union_group) continue;
      list[i]->clear();
      list[i]->add(0, first);
      list[i]->add(last, len);
    }
    if (top.k > 0 && top.k < last - first) {
      if (!mark_best_of(top, pair, g, heads, first, last, list)) return false;
    } else {
      float block[kHeads * kBlock];
      for (int64_t s = first; s < last; s += kBlock)
        if (!scores_of(p, pair, g, 1, s, s + kBlock < last ? s + kBlock : last, block, kBlock, true)) return false;
      if (top.k > 0)
        for (int64_t i = 0; i < lists; ++i) list[i]->add(first, last);
    }
    if (top.union_group) continue;
    for (int64_t i = 0; i < heads; ++i) {
      const int64_t query = first_query(p, pair) + g + i;
      list[i]->write(top.cap, top.idx + query * top.cap, top.count + query);
    }
  }
  if (top.union_group) list[0]->write(top.cap, top.idx + pair * top.cap, top.count + pair);
  return true;
}

}  // namespace
}  // namespace effk::vq
