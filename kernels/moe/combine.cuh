// moe_combine on CUDA, which is also the end of moe_mlp: a thread adds up a few neighbouring columns of a token, by
// ascending j. Limited by memory.
#pragma once

#include "load.cuh"

namespace effk::moe {

constexpr int kCombineThreads = 128, kThreadCols = 4;

struct CombineArgs {
  Combine a;        // without type and inverse; no weights: rows have them already
  Indices inverse;  // [tokens, k]
  int64_t rows;     // of y
  // Places from the last of these on have no row either.
  Indices ends;  // [experts] or none
  int64_t experts;
  bool adds;  // to out
};

// Neighbouring values, those before the `valid`-th.
template <class Y>
EFFK_DEVICE void load_columns(const Y* from, int64_t valid, float (&v)[kThreadCols]) {
  if (valid >= kThreadCols && is_multiple(from, kThreadCols * sizeof(Y))) {
    if constexpr (sizeof(Y) == 4) {
      const uint4 u = *reinterpret_cast<const uint4*>(from);
      v[0] = float_of(u.x), v[1] = float_of(u.y), v[2] = float_of(u.z), v[3] = float_of(u.w);
    } else {
      const uint2 u = *reinterpret_cast<const uint2*>(from);
      gpu::unpack_pair<Y>(u.x, v[0], v[1]);
      gpu::unpack_pair<Y>(u.y, v[2], v[3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kThreadCols; ++i) v[i] = i < valid ? to_float(from[i]) : 0;
  }
}

template <class Y, class Out>
EFFK_KERNEL(kCombineThreads, 8)
combine_kernel(EFFK_GRID_CONSTANT(CombineArgs) p) {
  const Combine& a = p.a;
  const int64_t slices = ceil_div(a.cols, kCombineThreads * kThreadCols);
  int64_t rows = p.rows;
  if (p.ends.data) rows = p.experts > 0 ? min_of(rows, index_at(p.ends, p.experts - 1)) : 0;
  for (int64_t item = blockIdx.x; item < a.tokens * slices; item += gridDim.x) {
    const int64_t token = item / slices, col = (item % slices * kCombineThreads + threadIdx.x) * kThreadCols;
    if (col >= a.cols) continue;
    Out* const out = static_cast<Out*>(a.out) + token * a.cols + col;
    float sums[kThreadCols] = {};
    if (p.adds) load_columns(out, a.cols - col, sums);
#pragma unroll 2
    for (int64_t j = 0; j < a.k; ++j) {
      const int64_t row = index_at(p.inverse, token * a.k + j);
      if (row < 0 || row >= rows) continue;
      float v[kThreadCols];
      load_columns(static_cast<const Y*>(a.y) + row * a.y_stride + col, a.cols - col, v);
      const float weight = a.weights ? a.weights[token * a.k + j] : 1;
#pragma unroll
      for (int i = 0; i < kThreadCols; ++i) sums[i] = fmaf(weight, v[i], sums[i]);
    }
    store_values(out, sums, a.cols - col);
  }
}

template <class Y, class Out>
gpu::Error launch_combine_of(const CombineArgs& p, gpu::Stream stream) {
  constexpr int64_t kMostBlocks = 1 << 20;
  const int64_t items = p.a.tokens * ceil_div(p.a.cols, kCombineThreads * kThreadCols);
  if (items == 0) return nullptr;
  return gpu::launch(combine_kernel<Y, Out>, dim3(static_cast<unsigned>(min_of(items, kMostBlocks))), kCombineThreads,
                     0, stream, p);
}

inline gpu::Error launch_combine(const CombineArgs& p, gpu::Stream stream) {
  switch (p.a.type) {
    case Type::f32: return launch_combine_of<float, float>(p, stream);
    case Type::f16: return launch_combine_of<Half, Half>(p, stream);
    default: return launch_combine_of<BFloat16, BFloat16>(p, stream);
  }
}

// Of rows in float32; the type is the result's.
inline gpu::Error launch_combine_floats(const CombineArgs& p, gpu::Stream stream) {
  switch (p.a.type) {
    case Type::f32: return launch_combine_of<float, float>(p, stream);
    case Type::f16: return launch_combine_of<float, Half>(p, stream);
    default: return launch_combine_of<float, BFloat16>(p, stream);
  }
}

}  // namespace effk::moe
