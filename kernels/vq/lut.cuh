// vq_lut on CUDA: a block turns a few queries of one key head by `inv`, which it keeps in shared memory, and each of
// its threads multiplies them with a word. Words are read once for several queries, inv comes from the L2 cache.
#pragma once

#include "load.cuh"

namespace effk::vq {

constexpr int kLutThreads = 256;

// The queries of one key head are numbered through: those of the group, of one batch after the other.
template <class X, int kRows>
EFFK_KERNEL(kLutThreads, 2)
lut_kernel(EFFK_GRID_CONSTANT(Lut) p) {
  const int dim = static_cast<int>(p.dim), sub = static_cast<int>(p.dim / p.subspaces);
  const int64_t words = p.subspaces * p.words, chunks = ceil_div(words, kLutThreads);
  const int64_t rows = p.batch * p.group, tiles = ceil_div(rows, kRows);
  const int64_t head = blockIdx.x / chunks / tiles, first = blockIdx.x / chunks % tiles * kRows;
  const int64_t word = blockIdx.x % chunks * kLutThreads + threadIdx.x;
  float* const given = reinterpret_cast<float*>(gpu::shared_memory());  // [kRows, dim]
  float* const turned = p.inv ? given + kRows * dim : given;

  const auto query = [&](int64_t row, int64_t& batch) {
    batch = row / p.group;
    return head * p.group + row % p.group;
  };
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first + r;
    int64_t batch = 0;
    const int64_t h = query(row, batch);
    const X* const from = static_cast<const X*>(p.q) + batch * p.q_stride[0] + h * p.q_stride[1];
    for (int d = threadIdx.x; d < dim; d += kLutThreads) given[r * dim + d] = row < rows ? to_float(from[d]) : 0;
  }
  gpu::sync_block();
  if (p.inv) {
    const float* const inv = p.inv + head * p.dim * p.dim;
    for (int e = threadIdx.x; e < dim; e += kLutThreads) {
      float sums[kRows] = {};
#pragma unroll 8
      for (int d = 0; d < dim; ++d) {
        const float v = inv[int64_t{d} * dim + e];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = fmaf(given[r * dim + d], v, sums[r]);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) turned[r * dim + e] = sums[r];
    }
    gpu::sync_block();
  }
  if (word >= words) return;

  const float* const from = p.codebook + (head * words + word) * sub;
  const float* const with = turned + word / p.words * sub;
  float sums[kRows] = {};
  if (sub % 4 == 0 && reinterpret_cast<uintptr_t>(p.codebook) % 16 == 0) {
#pragma unroll 2
    for (int d = 0; d < sub; d += 4) {
      float v[4];
      to_floats<float>(gpu::load_reused(from + d), v);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[r] = fmaf(with[r * dim + d + i], v[i], sums[r]);
    }
  } else {
    for (int d = 0; d < sub; ++d) {
      const float v = from[d];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = fmaf(with[r * dim + d], v, sums[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    int64_t batch = 0;
    const int64_t h = query(first + r, batch);
    if (first + r < rows) p.out[(batch * p.heads + h) * words + word] = sums[r];
  }
}

inline gpu::Error launch_lut(const Lut& p, gpu::Stream stream) {
  const int64_t words = p.subspaces * p.words, heads = p.heads / max_of(1, p.group), rows = p.batch * p.group;
  if (words == 0 || heads == 0 || rows == 0) return nullptr;
  const auto launch = [&](auto* kernel, int64_t tile) {
    const int64_t blocks = heads * ceil_div(rows, tile) * ceil_div(words, kLutThreads);
    const int64_t bytes = tile * p.dim * 4 * (p.inv ? 2 : 1);
    return gpu::launch(kernel, dim3(static_cast<unsigned>(blocks)), kLutThreads, static_cast<int>(bytes), stream, p);
  };
  return by_type(p.type, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    if (rows > 1 && p.dim <= kMostShared / (8 * 8)) return launch(lut_kernel<X, 8>, 8);
    if (p.dim <= kMostShared / 8) return launch(lut_kernel<X, 1>, 1);
    return gpu::Error{"a query's dimension is more than shared memory holds (12288)"};
  });
}

}  // namespace effk::vq
