// What vq's CUDA kernels share: indices of either type, and rows of values in pieces of 16 bytes.
#pragma once

#include <cmath>

#include "../common/indices.cuh"
#include "vq.h"

namespace effk::vq {

EFFK_HD constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int kMostShared = 96 << 10;  // of a block: less than any GPU has

// A number from a stranger that counts some of `most` things; all of them if there is none.
EFFK_DEVICE int64_t count_at(const Indices& v, int64_t i, int64_t most) {
  if (!v.data) return most;
  const int64_t n = index_at(v, i);
  return n < 0 ? 0 : min_of(n, most);
}

template <class X>
constexpr int kPieceValues = 16 / sizeof(X);

// 16 bytes of a row; values from the `valid`-th on aren't read and are 0. is_wide: rows are pieces of aligned 16 bytes.
template <class X>
EFFK_DEVICE uint4 load_piece(const X* from, int64_t valid, bool is_wide) {
  if (valid <= 0) return {0, 0, 0, 0};
  if (is_wide) return gpu::load_once(from);
  constexpr int kPerWord = 4 / sizeof(X);
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kPieceValues<X>; ++i)
    if (i < valid) word[i / kPerWord] |= bits_of_value(from[i]) << i % kPerWord * 16;
  return {word[0], word[1], word[2], word[3]};
}

template <class X>
EFFK_DEVICE void to_floats(const uint4& piece, float (&out)[kPieceValues<X>]) {
  const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(X) == 4)
      out[i] = float_of(word[i]);
    else
      gpu::unpack_pair<X>(word[i], out[2 * i], out[2 * i + 1]);
}

// Of integers, by all threads of a block of kWarps warps: the sum of those of the threads before; `total` is
// everybody's. `sums` is theirs until the next barrier but one.
template <int kWarps>
EFFK_DEVICE uint32_t scan_block(uint32_t own, uint32_t (&sums)[kWarps], uint32_t& total) {
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  uint32_t upto = own;
#pragma unroll
  for (int by = 1; by < gpu::kWarp; by *= 2) {
    const uint32_t before = gpu::shuffle_up(upto, by);
    if (lane >= by) upto += before;
  }
  gpu::sync_block();  // readers of the last time have read
  if (lane == gpu::kWarp - 1) sums[warp] = upto;
  gpu::sync_block();
  uint32_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += sums[w];
  }
  return before + upto - own;
}

// Calls f with a null pointer to the type.
template <class F>
auto by_type(Type type, const F& f) {
  switch (type) {
    case Type::f32: return f(static_cast<float*>(nullptr));
    case Type::f16: return f(static_cast<Half*>(nullptr));
    default: return f(static_cast<BFloat16*>(nullptr));
  }
}

}  // namespace effk::vq
