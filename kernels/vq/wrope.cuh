// vq_wrope on CUDA: a thread turns one pair of a row.
#pragma once

#include "load.cuh"

namespace effk::vq {

constexpr int kWropeThreads = 256;

struct WropeArgs {
  Wrope a;                    // without cos and sin
  bool cos_float, sin_float;  // float32; otherwise they have q's type
  const void *cos, *sin;      // [dim / 2]
};

template <class X>
EFFK_DEVICE float factor_at(const void* from, bool is_float, int64_t i) {
  return is_float ? static_cast<const float*>(from)[i] : to_float(static_cast<const X*>(from)[i]);
}

template <class X>
EFFK_KERNEL(kWropeThreads, 4)
wrope_kernel(EFFK_GRID_CONSTANT(WropeArgs) p) {
  const Wrope& a = p.a;
  const int64_t half = a.dim / 2, step = int64_t{gridDim.x} * kWropeThreads;
  for (int64_t i = int64_t{blockIdx.x} * kWropeThreads + threadIdx.x; i < a.rows * half; i += step) {
    const int64_t row = i / half, col = i % half;
    const X* const from = static_cast<const X*>(a.q) + row * a.stride + col;
    X* const to = static_cast<X*>(a.out) + row * a.dim + col;
    const float x = to_float(from[0]), y = to_float(from[half]);
    const float cos = factor_at<X>(p.cos, p.cos_float, col), sin = factor_at<X>(p.sin, p.sin_float, col);
    from_float(gpu::sum(gpu::product(x, cos), -gpu::product(y, sin)), to);
    from_float(gpu::sum(gpu::product(y, cos), gpu::product(x, sin)), to + half);
  }
}

inline gpu::Error launch_wrope(const WropeArgs& p, gpu::Stream stream) {
  const int64_t pairs = p.a.rows * (p.a.dim / 2);
  if (pairs == 0) return nullptr;
  const dim3 grid(static_cast<unsigned>(min_of(ceil_div(pairs, kWropeThreads), 1 << 16)));
  return by_type(p.a.type, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    return gpu::launch(wrope_kernel<X>, grid, kWropeThreads, 0, stream, p);
  });
}

}  // namespace effk::vq
