// The launchers of w4a8 for Python. Compiled with the checker's hooks; csrc/w4a8/w4a8.cu is what it stands for.
#include "../../kernels/w4a8/linear.cuh"
#include "../../kernels/w4a8/pack.cuh"
#include "../../kernels/w4a8/salience.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

using w4a8::Linear, w4a8::LinearPlan, w4a8::Pack, w4a8::Packed, w4a8::Quantize, w4a8::Salience;

template <class T = void>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

Packed packed(const W4a8Packed& p) {
  const auto& [n4, n8, cols, group, q4, scale4, zero4, q8, scale8, perm] = p;
  return {{n4, n8, cols, group},         pointer<const uint8_t>(q4), pointer<const float>(scale4),
          pointer<const uint8_t>(zero4), pointer<const uint8_t>(q8), pointer<const float>(scale8),
          pointer<const int32_t>(perm)};
}

// Of one launch, never written before.
Memory workspace_of(const Packed& w, int64_t tokens) {
  return Memory("workspace", nullptr, linear_workspace(w.shape, tokens), Memory::Kind::output);
}

}  // namespace

gpu::Error w4a8_quantize(int type, int64_t tokens, int64_t cols, int64_t group, Address x, int64_t token_stride,
                         int64_t col_stride, Address q, Address scale) {
  return launch_quantize(Quantize{static_cast<Type>(type), pointer(x), token_stride, col_stride, cols, group,
                                  pointer<int8_t>(q), cols, pointer<float>(scale), nullptr},
                         tokens, 0);
}

gpu::Error w4a8_order(Address ends, int64_t rows, Address perm) {
  return w4a8::launch_order(pointer<const int64_t>(ends), rows, pointer<int32_t>(perm), 0);
}

gpu::Error w4a8_pack(W4a8Packed p, int type, Address w, int64_t row_stride, int64_t col_stride) {
  return launch_pack(Pack{packed(p), static_cast<Type>(type), pointer(w), row_stride, col_stride}, 0);
}

gpu::Error w4a8_unpack(W4a8Packed p, Address out) {
  const Packed w = packed(p);
  const Memory inverse("inverse", nullptr, w.shape.rows() * 4, Memory::Kind::output);
  return launch_unpack(w, reinterpret_cast<int32_t*>(inverse.data()), pointer<float>(out), 0);
}

gpu::Error w4a8_linear(W4a8Packed p, int x_type, int64_t tokens, Address x, int64_t token_stride, int64_t col_stride,
                       Address y, int y_type, Address bias, int num_sms, int kernel) {
  Linear a{};
  a.w = packed(p);
  a.tokens = tokens;
  a.y = pointer(y);
  a.y_type = static_cast<Type>(y_type);
  a.bias = pointer<const float>(bias);
  const Quantize source{static_cast<Type>(x_type),
                        pointer(x),
                        token_stride,
                        col_stride,
                        a.w.shape.cols,
                        a.w.shape.group,
                        nullptr,
                        0,
                        nullptr,
                        nullptr};
  const LinearPlan plan = kernel < 0 ? plan_linear(a.w.shape, tokens, num_sms)
                                     : plan_of(static_cast<LinearPlan::Kernel>(kernel), a.w.shape, tokens, num_sms);
  const Memory workspace = workspace_of(a.w, tokens);
  return launch_linear(a, source, plan, workspace.data(), 0);
}

gpu::Error w4a8_accumulate(W4a8Packed p, int64_t tokens, Address q, int64_t token_stride, int64_t col_stride,
                           Address out) {
  Linear a{};
  a.w = packed(p);
  a.tokens = tokens;
  a.accumulators = pointer<int32_t>(out);
  const Memory workspace = workspace_of(a.w, tokens);
  return launch_accumulate(a, pointer<const int8_t>(q), token_stride, col_stride, workspace.data(), 0);
}

gpu::Error w4a8_salience(int64_t samples, int64_t rows, int64_t cols, int grad_type, Address grad, int w_type,
                         Address w, int w4_type, Address w4, Address out) {
  return launch_salience(
      Salience{samples, rows, cols, static_cast<Type>(grad_type), static_cast<Type>(w_type), static_cast<Type>(w4_type),
               pointer(grad), pointer(w), pointer(w4), pointer<float>(out)},
      0);
}

}  // namespace effk::simt
