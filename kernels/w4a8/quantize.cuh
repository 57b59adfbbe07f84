// Quantizing on CUDA: w4a8_quantize, and what w4a8_linear and w4a8_accumulate do before their product.
//
// A lane takes eight neighbouring values, 4 to 32 lanes a token's group. What limits it is memory: 2 + 1 bytes a value
// at 16 bits; so that it is not instructions, a lane divides once.
#pragma once

#include <cmath>
#include <limits>

#include "../common/device.cuh"
#include "w4a8.h"

namespace effk::w4a8 {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * gpu::kWarp;
constexpr int kStep = 32;       // input features of an mma
constexpr int kTokenBlock = 8;  // tokens of an mma
constexpr int kMostValues = 8;  // of a lane
constexpr int kSpan = gpu::kWarp * kMostValues;

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN(),
                kTiny = std::numeric_limits<float>::min();

EFFK_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Activations as the product wants them, in workspace memory.
struct Prepared {
  int64_t tokens;     // a multiple of 8
  int64_t steps;      // of 32 input features; zeros behind the last ones
  int8_t* q;          // [tokens / 8, steps, 8, 32]: what an mma takes is 256 bytes in a row
  float* token_data;  // [groups, tokens / 2, 4]: the scales of two tokens, then the sums of their q
  int32_t* inverse;   // [rows]: the row of each output feature, where perm has it; anything where it hasn't
};

inline int64_t steps_of(const Shape& s) {
  constexpr int64_t kStageCols = 128;  // of the product's tiles, unless a group has more
  const int64_t cols = s.group > kStageCols ? s.group : kStageCols;
  return ceil_div(s.cols, cols) * (cols / kStep);
}

// The layout of one block of memory, aligned to 16 bytes; its size comes back.
inline int64_t place_prepared(const Shape& s, int64_t tokens, void* memory, Prepared* p) {
  p->tokens = ceil_div(tokens, kTokenBlock) * kTokenBlock;
  p->steps = steps_of(s);
  const int64_t q_bytes = p->tokens * p->steps * kStep, token_bytes = s.groups() * p->tokens * 8;
  char* const begin = static_cast<char*>(memory);
  p->q = reinterpret_cast<int8_t*>(begin);
  p->token_data = reinterpret_cast<float*>(begin + q_bytes);
  p->inverse = reinterpret_cast<int32_t*>(begin + q_bytes + token_bytes);
  return q_bytes + token_bytes + s.rows() * int64_t{sizeof(int32_t)};
}

// Notes where each output feature's row is, of `row` and those that the grid's number of threads leads to. Where perm
// is no permutation, rows that share a feature overwrite each other's notes, and features of no row keep whatever was
// there.
EFFK_DEVICE void invert(const int32_t* perm, int64_t rows, int32_t* inverse, int64_t row) {
  for (; row < rows; row += int64_t{gridDim.x} * kThreads) {
    const uint32_t feature = static_cast<uint32_t>(perm[row]);
    if (feature < rows) gpu::atomic_store(inverse + feature, static_cast<int32_t>(row));
  }
}

// Where a row's results go and what else must be filled: each output feature is written once, whatever perm holds.
struct Place {
  int32_t feature;  // or -1: the row is one too many for its feature, or its feature doesn't exist
  int32_t hole;     // the feature whose number is that of the row, where no row has it; or -1
};

EFFK_DEVICE Place place_of(const Packed& w, const int32_t* inverse, int64_t row) {
  const int64_t rows = w.shape.rows();
  Place place{-1, -1};
  if (row >= rows) return place;
  const uint32_t feature = static_cast<uint32_t>(w.perm[row]), owner = static_cast<uint32_t>(inverse[row]);
  if (feature < rows && inverse[feature] == row) place.feature = static_cast<int32_t>(feature);
  if (owner >= rows || w.perm[owner] != row) place.hole = static_cast<int32_t>(row);
  return place;
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T v[kCount];
};

template <class X, int kCount>
EFFK_DEVICE void load_vector(const X* from, float (&v)[kMostValues]) {
  const auto x = *reinterpret_cast<const Vector<X, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = to_float(x.v[i]);
}

// `count` values, those from the `valid`-th on 0. wide: all neighbours are there and aligned.
template <class X>
EFFK_DEVICE void load_values(const X* from, int64_t stride, int count, int64_t valid, bool wide,
                             float (&v)[kMostValues]) {
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) v[i] = 0;
  if (wide && valid >= count) {
    switch (count) {
      case 1: return load_vector<X, 1>(from, v);
      case 2: return load_vector<X, 2>(from, v);
      case 4: return load_vector<X, 4>(from, v);
      default:
        if constexpr (sizeof(X) == 4) {
          float upper[kMostValues];
          load_vector<X, 4>(from, v);
          load_vector<X, 4>(from + 4, upper);
#pragma unroll
          for (int i = 0; i < 4; ++i) v[4 + i] = upper[i];
          return;
        } else {
          return load_vector<X, 8>(from, v);
        }
    }
  }
#pragma unroll
  for (int i = 0; i < kMostValues; ++i)
    if (i < count && i < valid) v[i] = to_float(from[i * stride]);
}

// Whether lanes of `count` values each can load them as one, 16 bytes at most.
inline bool can_load_wide(const void* p, int64_t row_stride, int64_t col_stride, int64_t count, int64_t bytes) {
  const int64_t size = count * bytes < 16 ? count * bytes : 16;
  return col_stride == 1 && row_stride * bytes % size == 0 && reinterpret_cast<uintptr_t>(p) % size == 0;
}

// The largest of `lanes` neighbouring lanes, a power of 2.
EFFK_DEVICE uint32_t max_of_lanes(uint32_t v, int lanes) {
  const int lane = threadIdx.x % gpu::kWarp;
#pragma unroll 1
  for (int by = 1; by < lanes; by *= 2) {
    const uint32_t other = gpu::shuffle(v, lane ^ by);
    if (other > v) v = other;
  }
  return v;
}

EFFK_DEVICE int32_t sum_of_lanes(int32_t v, int lanes) {
  const int lane = threadIdx.x % gpu::kWarp;
#pragma unroll 1
  for (int by = 1; by < lanes; by *= 2) v += static_cast<int32_t>(gpu::shuffle(static_cast<uint32_t>(v), lane ^ by));
  return v;
}

// Of a group whose largest magnitude, or range, is `size`: 1 for constant zero, NaN where size isn't finite.
EFFK_DEVICE float scale_of(float size, float levels) {
  if (!(size < kInfinity)) return kNaN;
  if (size == 0) return 1;
  const float scale = size / levels;
  return scale < kTiny ? kTiny : scale;
}

// round(v / scale) + zero, between low and high; 0 where scale is NaN.
EFFK_DEVICE int32_t to_integer(float v, float scale, float zero, float low, float high) {
  if (scale != scale) return 0;
  const float q = rintf(v / scale) + zero;
  return static_cast<int32_t>(q < low ? low : q > high ? high : q);
}

// Of a lane's values; ordered as the numbers are, NaN last.
EFFK_DEVICE uint32_t largest_magnitude(const float (&v)[kMostValues]) {
  uint32_t magnitude = 0;
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) {
    const uint32_t bits = bits_of(v[i]) & 0x7fffffff;
    if (bits > magnitude) magnitude = bits;
  }
  return magnitude;
}

// The warp's values from -127 to 127, and their scale.
EFFK_DEVICE float symmetric(const float (&v)[kMostValues], int32_t (&q)[kMostValues]) {
  const float scale = scale_of(float_of(max_of_lanes(largest_magnitude(v), gpu::kWarp)), kMaxQuantized);
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) q[i] = to_integer(v[i], scale, 0, -kMaxQuantized, kMaxQuantized);
  return scale;
}

// Stores eight bytes, the first `valid` of them.
template <class Q>
EFFK_DEVICE void store_words(Q* to, uint2 words, int64_t valid) {
  if (valid >= 8 && reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<uint2*>(to) = words;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < valid) to[i] = static_cast<Q>((i < 4 ? words.x : words.y) >> i % 4 * 8);
  }
}

// Stores the low bytes of `count` values, the first `valid` of them.
template <class Q>
EFFK_DEVICE void store_bytes(Q* to, const int32_t (&q)[kMostValues], int count, int64_t valid) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) words[i / 4] |= static_cast<uint32_t>(q[i] & 255) << i % 4 * 8;
  const auto address = reinterpret_cast<uintptr_t>(to);
  if (count == 8 && valid >= 8 && address % 8 == 0) {
    *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
  } else if (count == 4 && valid >= 4 && address % 4 == 0) {
    *reinterpret_cast<uint32_t*>(to) = words[0];
  } else {
#pragma unroll
    for (int i = 0; i < kMostValues; ++i)
      if (i < count && i < valid) to[i] = static_cast<Q>(q[i]);
  }
}

// The bits of 1.5 * 2^23 are this; adding that number to one within +-2^22 rounds it to an integer, which is then the
// difference of the bits. Sums of a group are within that: 256 * 128 * 127.
constexpr int32_t kMagicBits = 0x4b400000;
constexpr float kMagic = 12582912;

// A lane's values as kMagicBits + q.
EFFK_DEVICE void round_to_integers(const float (&v)[kMostValues], float scale, int32_t (&bits)[kMostValues]) {
  // Where neither reciprocals nor remainders leave the normal numbers. NaN isn't here either.
  constexpr float kSmallest = 8.077935669463161e-28f;  // 2^-90; the largest is 2^121
  if (scale >= kSmallest) {
    const float reciprocal = 1 / scale;
#pragma unroll
    for (int i = 0; i < kMostValues; ++i) {
      // Two corrections by the exact remainder: the quotient, rounded to nearest.
      float quotient = v[i] * reciprocal;
      quotient = fmaf(fmaf(-quotient, scale, v[i]), reciprocal, quotient);
      quotient = fmaf(fmaf(-quotient, scale, v[i]), reciprocal, quotient);
      bits[i] = static_cast<int32_t>(bits_of(quotient + kMagic));  // within +-127, as scale comes from the largest
    }
  } else {
#pragma unroll
    for (int i = 0; i < kMostValues; ++i)
      bits[i] = kMagicBits + to_integer(v[i], scale, 0, -kMaxQuantized, kMaxQuantized);
  }
}

// kPrepare: to p instead of a.q and a.scale, with p.inverse. An int8 x is already quantized and gets no scales.
template <class X, bool kPrepare>
EFFK_KERNEL(kThreads, 2)
quantize_kernel(Quantize a, int64_t tokens, bool wide, Prepared p, const int32_t* perm, int64_t rows) {
  // Loaded here and stored in the end, so that nothing waits for both x and perm.
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  uint32_t feature = ~0u;
  if constexpr (kPrepare) {
    if (row < rows) feature = static_cast<uint32_t>(perm[row]);
  }
  const int lane = threadIdx.x % gpu::kWarp, group_lanes = static_cast<int>(a.group) / kMostValues;
  const int64_t groups = (a.cols + a.group - 1) / a.group;
  // With columns and tokens that hold nothing but zeros.
  const int64_t all_cols = kPrepare ? p.steps * kStep : a.cols, all_tokens = kPrepare ? p.tokens : tokens;
  const int64_t spans = (all_cols + kSpan - 1) / kSpan;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / gpu::kWarp; item < all_tokens * spans;
       item += int64_t{gridDim.x} * kWarps) {
    const int64_t token =
        (item | spans) >> 32 == 0 ? static_cast<uint32_t>(item) / static_cast<uint32_t>(spans) : item / spans;
    const int64_t k = (item - token * spans) * kSpan + lane * kMostValues;
    const int group = static_cast<int>(k >> (gpu::popcount(static_cast<uint32_t>(a.group) - 1)));
    float v[kMostValues];
    load_values(static_cast<const X*>(a.x) + token * a.x_token_stride + k * a.x_col_stride, a.x_col_stride, kMostValues,
                token < tokens ? a.cols - k : 0, wide, v);
    int32_t bits[kMostValues];
    float scale = 0;
    if constexpr (std::is_same_v<X, int8_t>) {
#pragma unroll
      for (int i = 0; i < kMostValues; ++i) bits[i] = kMagicBits + static_cast<int32_t>(v[i]);
    } else {
      scale = scale_of(float_of(max_of_lanes(largest_magnitude(v), group_lanes)), kMaxQuantized);
      round_to_integers(v, scale, bits);
    }
    // Their low bytes.
    uint2 q;
    q.x = gpu::join_halves(gpu::permute_bytes(bits[0], bits[1], 0x0040), gpu::permute_bytes(bits[2], bits[3], 0x0040));
    q.y = gpu::join_halves(gpu::permute_bytes(bits[4], bits[5], 0x0040), gpu::permute_bytes(bits[6], bits[7], 0x0040));
    if constexpr (!kPrepare) {
      store_words(a.q + token * a.q_stride + k, q, a.cols - k);
      if (lane % group_lanes == 0 && group < groups) a.scale[token * groups + group] = scale;
    } else {
      int32_t sum = 0;
#pragma unroll
      for (int i = 0; i < kMostValues; ++i) sum += bits[i] - kMagicBits;
      sum = sum_of_lanes(sum, group_lanes);
      if (k >= all_cols) continue;
      const int64_t step = token / kTokenBlock * p.steps + k / kStep;
      *reinterpret_cast<uint2*>(p.q + (step * kTokenBlock + token % kTokenBlock) * kStep + k % kStep) = q;
      if (lane % group_lanes != 0 || group >= groups) continue;
      float* const data = p.token_data + (group * p.tokens / 2 + token / 2) * 4 + token % 2;
      data[0] = scale;
      data[2] = static_cast<float>(sum);  // exact: at most 2^15
    }
  }
  if constexpr (kPrepare) {
    if (feature < rows) gpu::atomic_store(p.inverse + feature, static_cast<int32_t>(row));
    invert(perm, rows, p.inverse, row + int64_t{gridDim.x} * kThreads);
  }
}

template <class X, bool kPrepare>
gpu::Error launch_quantize_of(const Quantize& a, int64_t tokens, const Prepared& p, const int32_t* perm, int64_t rows,
                              gpu::Stream stream) {
  constexpr int64_t kMostBlocks = 1 << 20;  // beyond, warps take several spans
  const int64_t warps = kPrepare ? p.tokens * ceil_div(p.steps * kStep, kSpan) : tokens * ceil_div(a.cols, kSpan);
  const int64_t for_rows = kPrepare ? ceil_div(rows, kThreads) : 0, for_spans = ceil_div(warps, kWarps);
  const int64_t wanted = for_rows > for_spans ? for_rows : for_spans;
  if (wanted == 0) return nullptr;
  const bool wide = can_load_wide(a.x, a.x_token_stride, a.x_col_stride, kMostValues, type_size(a.type));
  return gpu::launch(quantize_kernel<X, kPrepare>,
                     dim3(static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks)), kThreads, 0, stream, a,
                     tokens, wide, p, perm, rows);
}

// a.q [tokens, cols] and a.scale; a.sums are not written.
inline gpu::Error launch_quantize(const Quantize& a, int64_t tokens, gpu::Stream stream) {
  switch (a.type) {
    case Type::f32: return launch_quantize_of<float, false>(a, tokens, {}, nullptr, 0, stream);
    case Type::f16: return launch_quantize_of<Half, false>(a, tokens, {}, nullptr, 0, stream);
    default: return launch_quantize_of<BFloat16, false>(a, tokens, {}, nullptr, 0, stream);
  }
}

// Of a only x, its strides and sizes are used. Its type may be i8: integers that need no scales.
inline gpu::Error launch_prepare(const Quantize& a, int64_t tokens, const Packed& w, const Prepared& p,
                                 gpu::Stream stream) {
  const int64_t rows = w.shape.rows();
  switch (a.type) {
    case Type::f32: return launch_quantize_of<float, true>(a, tokens, p, w.perm, rows, stream);
    case Type::f16: return launch_quantize_of<Half, true>(a, tokens, p, w.perm, rows, stream);
    case Type::bf16: return launch_quantize_of<BFloat16, true>(a, tokens, p, w.perm, rows, stream);
    default: return launch_quantize_of<int8_t, true>(a, tokens, p, w.perm, rows, stream);
  }
}

}  // namespace effk::w4a8
