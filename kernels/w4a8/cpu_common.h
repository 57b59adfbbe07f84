// What the CPU levels of w4a8 share: everything but the product. Loops are written so that each level's compiler
// vectorizes them for it; all in an anonymous namespace, so that each level has its own copy.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../common/cpu.h"
#include "w4a8.h"

namespace effk::w4a8 {
namespace {

constexpr int kMaxGroup = 256;
constexpr int kLanes = 16;  // of a reduction

// n values, `stride` apart, as floats; to has room for whole registers.
template <class X>
inline void load_row(const X* from, int64_t stride, float* to, int64_t n) {
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i * stride]);
    return;
  }
  int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<X, Half>)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

// To the nearest integer, ties to even, of |v| < 2^22. One addition each way, so that loops vectorize.
inline float nearest(float v) {
  constexpr float kMagic = 12582912;  // 1.5 * 2^23
  return (v + kMagic) - kMagic;
}

inline float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }

struct Range {
  float low, high;  // with 0 inside
  bool finite;
};

// Of n values, n <= kMaxGroup, with room for whole registers in v: the room is zeroed.
inline Range range_of(float* v, int64_t n) {
  const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = n; i < whole; ++i) v[i] = 0;
  float low[kLanes] = {}, high[kLanes] = {}, check[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      low[j] = v[i + j] < low[j] ? v[i + j] : low[j];
      high[j] = v[i + j] > high[j] ? v[i + j] : high[j];
      check[j] += v[i + j] * 0;  // NaN where v isn't finite
    }
  Range r{0, 0, true};
  for (int j = 0; j < kLanes; ++j) {
    r.low = low[j] < r.low ? low[j] : r.low;
    r.high = high[j] > r.high ? high[j] : r.high;
    r.finite &= check[j] == 0;
  }
  return r;
}

inline float scale_of(float size, float levels, bool finite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kTiny = std::numeric_limits<float>::min();
  if (!finite || size == kInfinity) return std::numeric_limits<float>::quiet_NaN();
  if (size == 0) return 1;
  const float scale = size / levels;
  return scale < kTiny ? kTiny : scale;
}

// round(v / scale) + zero, between low and high; `none` where scale is NaN.
template <class Q>
inline void to_integers(const float* v, int64_t n, float scale, float zero, float low, float high, Q none, Q* q) {
  if (scale != scale) {
    for (int64_t i = 0; i < n; ++i) q[i] = none;
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    q[i] = static_cast<Q>(static_cast<int32_t>(clamp(nearest(v[i] / scale) + zero, low, high)));
}

// A group's scale and its integers from -127 to 127.
inline float symmetric(float* v, int64_t n, int8_t* q) {
  const Range r = range_of(v, n);
  const float scale = scale_of(-r.low > r.high ? -r.low : r.high, kMaxQuantized, r.finite);
  to_integers<int8_t>(v, n, scale, 0, -kMaxQuantized, kMaxQuantized, 0, q);
  return scale;
}

// A group's scale, zero point and integers from 0 to 15.
inline float asymmetric(float* v, int64_t n, uint8_t* q, uint8_t* zero) {
  const Range r = range_of(v, n);
  const float scale = scale_of(r.high - r.low, 15, r.finite);
  const float z = scale == scale ? clamp(nearest(-r.low / scale), 0, 15) : 0;
  to_integers<uint8_t>(v, n, scale, z, 0, 15, 0, q);
  *zero = static_cast<uint8_t>(z);
  return scale;
}

inline int32_t sum_of(const int8_t* q, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += q[i];
  return sum;
}

inline void quantize(const Quantize& a, int64_t t0, int64_t t1) {
  const int64_t groups = (a.cols + a.group - 1) / a.group;
  with_float(a.type, [&]<class X>(X*) {
    alignas(64) float v[kMaxGroup];
    for (int64_t t = t0; t < t1; ++t) {
      int8_t* q = a.q + t * a.q_stride;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k = g * a.group, n = a.cols - k < a.group ? a.cols - k : a.group;
        load_row(static_cast<const X*>(a.x) + t * a.x_token_stride + k * a.x_col_stride, a.x_col_stride, v, n);
        a.scale[t * groups + g] = symmetric(v, n, q + k);
        if (a.sums) a.sums[t * groups + g] = sum_of(q + k, n);
      }
      std::memset(q + a.cols, 0, a.q_stride - a.cols);
    }
  });
}

// Block b of all, 4-bit ones first, as a block of its kind.
struct Block {
  bool is8;
  int64_t index, rows, first_row;  // first_row in packed order, of both kinds
};

inline Block block_at(const Shape& s, int64_t b) {
  if (b < s.blocks4()) return {false, b, block_rows(s.n4, b), b * kBlock};
  const int64_t i = b - s.blocks4();
  return {true, i, block_rows(s.n8, i), s.n4 + i * kBlock};
}

inline void pack(const Pack& a, int64_t b0, int64_t b1) {
  const Shape& s = a.w.shape;
  auto* const q4 = const_cast<uint8_t*>(a.w.q4);
  auto* const q8 = const_cast<uint8_t*>(a.w.q8);
  auto *const scale4 = const_cast<float*>(a.w.scale4), *const scale8 = const_cast<float*>(a.w.scale8);
  auto* const zero4 = const_cast<uint8_t*>(a.w.zero4);
  with_float(a.type, [&]<class X>(X*) {
    alignas(64) float v[kMaxGroup];
    alignas(64) uint8_t q[kMaxGroup + kChunk];
    for (int64_t b = b0; b < b1; ++b) {
      const Block block = block_at(s, b);
      const int64_t row = block.index * kBlock;  // of its kind
      if (!block.is8) {
        std::memset(q4 + q4_at(s, row, 0), 0, s.chunks() * kBlock * 4);
        std::memset(zero4 + group_at(s, row, 0), 0, s.groups() * kBlock);
      }
      std::memset((block.is8 ? scale8 : scale4) + group_at(s, row, 0), 0, s.groups() * kBlock * 4);
      for (int64_t i = 0; i < block.rows; ++i) {
        const X* dense = static_cast<const X*>(a.dense) + a.w.perm[block.first_row + i] * a.row_stride;
        for (int64_t g = 0; g < s.groups(); ++g) {
          const int64_t k0 = g * s.group, n = s.cols - k0 < s.group ? s.cols - k0 : s.group;
          load_row(dense + k0 * a.col_stride, a.col_stride, v, n);
          const int64_t at = group_at(s, row + i, g);
          if (block.is8) {
            scale8[at] = symmetric(v, n, reinterpret_cast<int8_t*>(q));
            for (int64_t j = 0; j < n; ++j) q8[q8_at(s, row + i, k0 + j)] = q[j] ^ kZero8;
          } else {
            scale4[at] = asymmetric(v, n, q, &zero4[at]);
            std::memset(q + n, 0, kChunk);  // the last chunk may be cut
            uint8_t* to = q4 + q4_at(s, row + i, k0);
            for (int64_t j = 0; j < n; j += kChunk, to += kBlock * 4)
              for (int64_t l = 0; l < 4; ++l) to[l] = static_cast<uint8_t>(q[j + l] | q[j + 4 + l] << 4);
          }
        }
      }
    }
  });
}

inline void unpack(const Packed& w, float* dense, int64_t b0, int64_t b1) {
  const Shape& s = w.shape;
  alignas(64) uint8_t q[kMaxGroup];
  for (int64_t b = b0; b < b1; ++b) {
    const Block block = block_at(s, b);
    for (int64_t i = 0; i < block.rows; ++i) {
      const int64_t row = block.index * kBlock + i;
      float* out = dense + w.perm[block.first_row + i] * s.cols;
      for (int64_t g = 0; g < s.groups(); ++g) {
        const int64_t k0 = g * s.group, n = s.cols - k0 < s.group ? s.cols - k0 : s.group, at = group_at(s, row, g);
        int32_t zero = kZero8;
        float scale;
        if (block.is8) {
          for (int64_t j = 0; j < n; ++j) q[j] = w.q8[q8_at(s, row, k0 + j)];
          scale = w.scale8[at];
        } else {
          const uint8_t* from = w.q4 + q4_at(s, row, k0);
          for (int64_t j = 0; j < n; j += kChunk, from += kBlock * 4)
            for (int64_t l = 0; l < 4; ++l) q[j + l] = from[l] & 15, q[j + 4 + l] = from[l] >> 4;
          zero = w.zero4[at];
          scale = w.scale4[at];
        }
        for (int64_t j = 0; j < n; ++j) out[k0 + j] = static_cast<float>(q[j] - zero) * scale;
      }
    }
  }
}

inline void salience(const Salience& a, int64_t r0, int64_t r1) {
  with_float(a.grad_type, [&]<class G>(G*) {
    with_float(a.w_type, [&]<class W>(W*) {
      with_float(a.w4_type, [&]<class W4>(W4*) {
        alignas(64) float w[kMaxGroup], w4[kMaxGroup], grad[kMaxGroup];
        for (int64_t r = r0; r < r1; ++r) {
          float total = 0;
          for (int64_t sample = 0; sample < a.samples; ++sample) {
            float lanes[kLanes] = {};
            for (int64_t k = 0; k < a.cols; k += kMaxGroup) {
              const int64_t n = a.cols - k < kMaxGroup ? a.cols - k : kMaxGroup;
              load_row(static_cast<const W*>(a.w) + r * a.cols + k, 1, w, n);
              load_row(static_cast<const W4*>(a.w4) + r * a.cols + k, 1, w4, n);
              load_row(static_cast<const G*>(a.grad) + (sample * a.rows + r) * a.cols + k, 1, grad, n);
              const int64_t whole = (n + kLanes - 1) / kLanes * kLanes;
              for (int64_t i = n; i < whole; ++i) w[i] = w4[i] = grad[i] = 0;
              for (int64_t i = 0; i < whole; i += kLanes)
                for (int j = 0; j < kLanes; ++j) lanes[j] += grad[i + j] * (w4[i + j] - w[i + j]);
            }
            float d = 0;
            for (float lane : lanes) d += lane;
            const float change = d + d * d / 2;
            total += change < 0 ? -change : change;
          }
          a.out[r] = total;
        }
      });
    });
  });
}

// Ends the sums of a block and token: bias and one rounding, to the places that perm says.
template <class Y>
inline void finish(const Linear& a, const Block& block, int64_t token, const float* sums) {
  Y* y = static_cast<Y*>(a.y) + token * a.w.shape.rows();
  const int32_t* perm = a.w.perm + block.first_row;
  for (int64_t i = 0; i < block.rows; ++i) from_float(a.bias ? sums[i] + a.bias[perm[i]] : sums[i], &y[perm[i]]);
}

}  // namespace
}  // namespace effk::w4a8
