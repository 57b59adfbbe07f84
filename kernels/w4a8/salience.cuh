// w4a8_salience on CUDA. A warp takes an output feature: for each sample its lanes sum over the columns, each four
// neighbours at a time. Memory limits it: the gradients are read once; w and w4 come from L2 after the first sample.
#pragma once

#include "quantize.cuh"

namespace effk::w4a8 {

template <class X>
EFFK_DEVICE void load_four(const void* from, int64_t i, float (&v)[4]) {
  const auto x = *reinterpret_cast<const Vector<X, 4>*>(static_cast<const X*>(from) + i);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = to_float(x.v[j]);
}

EFFK_DEVICE float load_one(Type t, const void* from, int64_t i) {
  return t == Type::f32   ? static_cast<const float*>(from)[i]
         : t == Type::f16 ? to_float(static_cast<const Half*>(from)[i])
                          : to_float(static_cast<const BFloat16*>(from)[i]);
}

EFFK_DEVICE void load_four(Type t, const void* from, int64_t i, float (&v)[4]) {
  if (t == Type::f32)
    load_four<float>(from, i, v);
  else if (t == Type::f16)
    load_four<Half>(from, i, v);
  else
    load_four<BFloat16>(from, i, v);
}

// wide: four neighbours can be loaded at once.
EFFK_KERNEL(kThreads, 2) salience_kernel(Salience a, bool wide) {
  const int lane = threadIdx.x % gpu::kWarp;
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / gpu::kWarp;
  if (row >= a.rows) return;
  float total = 0;
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    const int64_t at = row * a.cols, grad_at = (sample * a.rows + row) * a.cols;
    float sum = 0;
    if (wide) {
      for (int64_t k = lane * 4; k < a.cols; k += gpu::kWarp * 4) {
        float w[4], w4[4], grad[4];
        load_four(a.w_type, a.w, at + k, w);
        load_four(a.w4_type, a.w4, at + k, w4);
        load_four(a.grad_type, a.grad, grad_at + k, grad);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += grad[i] * (w4[i] - w[i]);
      }
    } else {
      for (int64_t k = lane; k < a.cols; k += gpu::kWarp)
        sum += load_one(a.grad_type, a.grad, grad_at + k) *
               (load_one(a.w4_type, a.w4, at + k) - load_one(a.w_type, a.w, at + k));
    }
#pragma unroll
    for (int by = 1; by < gpu::kWarp; by *= 2) sum += gpu::shuffle_xor(sum, by);
    total += fabsf(sum + sum * sum / 2);
  }
  if (lane == 0) a.out[row] = total;
}

inline gpu::Error launch_salience(const Salience& a, gpu::Stream stream) {
  if (a.rows == 0) return nullptr;
  const auto aligned = [&](const void* p, Type t) { return can_load_wide(p, a.cols, 1, 4, type_size(t)); };
  const bool wide = aligned(a.grad, a.grad_type) && aligned(a.w, a.w_type) && aligned(a.w4, a.w4_type);
  return gpu::launch(salience_kernel, dim3(static_cast<unsigned>(ceil_div(a.rows, kWarps))), kThreads, 0, stream, a,
                     wide);
}

}  // namespace effk::w4a8
