// Quantizing on CUDA: w4a8_quantize, and what w4a8_linear and w4a8_accumulate do before their product.
//
// A warp takes a token's group: each lane 1, 2, 4 or 8 neighbouring values, so that the group is read and written once
// and as a whole. What limits it is memory: 2 + 1 bytes a value at 16 bits.
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
constexpr int kMostValues = 8;  // of a lane, in a group

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

// Notes where each output feature's row is. Where perm is no permutation, rows that share a feature overwrite each
// other's notes, and features of no row keep whatever was there.
EFFK_DEVICE void invert(const int32_t* perm, int64_t rows, int32_t* inverse) {
  for (int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x; row < rows; row += int64_t{gridDim.x} * kThreads) {
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

// The largest of the warp's lanes.
EFFK_DEVICE uint32_t warp_max(uint32_t v) {
  const int lane = threadIdx.x % gpu::kWarp;
#pragma unroll
  for (int by = 1; by < gpu::kWarp; by *= 2) {
    const uint32_t other = gpu::shuffle(v, lane ^ by);
    if (other > v) v = other;
  }
  return v;
}

EFFK_DEVICE int32_t warp_sum(int32_t v) {
  const int lane = threadIdx.x % gpu::kWarp;
#pragma unroll
  for (int by = 1; by < gpu::kWarp; by *= 2)
    v += static_cast<int32_t>(gpu::shuffle(static_cast<uint32_t>(v), lane ^ by));
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

// The lanes' values from -127 to 127, and their scale.
EFFK_DEVICE float symmetric(const float (&v)[kMostValues], int32_t (&q)[kMostValues]) {
  uint32_t magnitude = 0;  // ordered as the numbers are, NaN last
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) {
    const uint32_t bits = bits_of(v[i]) & 0x7fffffff;
    if (bits > magnitude) magnitude = bits;
  }
  const float scale = scale_of(float_of(warp_max(magnitude)), kMaxQuantized);
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) q[i] = to_integer(v[i], scale, 0, -kMaxQuantized, kMaxQuantized);
  return scale;
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

// kPrepare: to p instead of a.q and a.scale, with p.inverse. An int8 x is already quantized and gets no scales.
template <class X, bool kPrepare>
EFFK_KERNEL(kThreads, 2)
quantize_kernel(Quantize a, int64_t tokens, bool wide, Prepared p, const int32_t* perm, int64_t rows) {
  if constexpr (kPrepare) invert(perm, rows, p.inverse);
  const int lane = threadIdx.x % gpu::kWarp, count = static_cast<int>(a.group) / gpu::kWarp;
  const int64_t groups = (a.cols + a.group - 1) / a.group;
  // With those that hold nothing but zeros.
  const int64_t all_groups = kPrepare ? p.steps * kStep / a.group : groups, all_tokens = kPrepare ? p.tokens : tokens;
  for (int64_t item = int64_t{blockIdx.x} * kWarps + threadIdx.x / gpu::kWarp; item < all_tokens * all_groups;
       item += int64_t{gridDim.x} * kWarps) {
    const int64_t token = item / all_groups, group = item % all_groups;
    const int64_t k = group * a.group + lane * count;
    float v[kMostValues];
    load_values(static_cast<const X*>(a.x) + token * a.x_token_stride + k * a.x_col_stride, a.x_col_stride, count,
                token < tokens ? a.cols - k : 0, wide, v);
    int32_t q[kMostValues];
    float scale = 0;
    if constexpr (std::is_same_v<X, int8_t>) {
#pragma unroll
      for (int i = 0; i < kMostValues; ++i) q[i] = static_cast<int32_t>(v[i]);
    } else {
      scale = symmetric(v, q);
    }
    if constexpr (!kPrepare) {
      store_bytes(a.q + token * a.q_stride + k, q, count, a.cols - k);
      if (lane == 0) a.scale[token * groups + group] = scale;
    } else {
      const int64_t step = token / kTokenBlock * p.steps + k / kStep;
      store_bytes(p.q + (step * kTokenBlock + token % kTokenBlock) * kStep + k % kStep, q, count, count);
      if (group >= groups) continue;
      int32_t sum = 0;
#pragma unroll
      for (int i = 0; i < kMostValues; ++i) sum += q[i];
      sum = warp_sum(sum);
      float* const data = p.token_data + (group * p.tokens / 2 + token / 2) * 4 + token % 2;
      if (lane == 0) data[0] = scale;
      if (lane == 1) data[2] = static_cast<float>(sum);  // exact: at most 2^15
    }
  }
}

template <class X, bool kPrepare>
gpu::Error launch_quantize_of(const Quantize& a, int64_t tokens, const Prepared& p, const int32_t* perm, int64_t rows,
                              gpu::Stream stream) {
  constexpr int64_t kMostBlocks = 1 << 20;  // beyond, warps take several groups
  const int64_t warps = kPrepare ? p.tokens * (p.steps * kStep / a.group) : tokens * ceil_div(a.cols, a.group);
  const int64_t for_rows = kPrepare ? ceil_div(rows, 4 * kThreads) : 0, for_groups = ceil_div(warps, kWarps);
  const int64_t wanted = for_rows > for_groups ? for_rows : for_groups;
  if (wanted == 0) return nullptr;
  const bool wide = can_load_wide(a.x, a.x_token_stride, a.x_col_stride, a.group / gpu::kWarp, type_size(a.type));
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
