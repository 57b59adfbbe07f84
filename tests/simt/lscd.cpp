// The launchers of lscd for Python. Compiled with the checker's hooks; csrc/lscd/lscd.cu is what it stands for.
#include "../../kernels/lscd/linear.cuh"
#include "../../kernels/lscd/pack.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

using lscd::Activation, lscd::Dense, lscd::Linear, lscd::LinearPlan, lscd::Packed, lscd::Shape;

template <class T = void>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

Packed packed(int64_t rows, int64_t cols, int type, Address values, int64_t num_values, Address bitmap,
              Address offsets) {
  return {{rows, cols}, static_cast<Type>(type),         pointer(values),
          num_values,   pointer<const uint64_t>(bitmap), pointer<const int64_t>(offsets)};
}

}  // namespace

gpu::Error lscd_count(int64_t rows, int64_t cols, int type, Address w, int64_t row_stride, int64_t col_stride,
                      Address bitmap, Address sizes) {
  return launch_count(Shape{rows, cols}, static_cast<Type>(type), Dense{pointer(w), row_stride, col_stride},
                      pointer<uint64_t>(bitmap), pointer<int64_t>(sizes), 0);
}

gpu::Error lscd_fill(int64_t rows, int64_t cols, int type, Address w, int64_t row_stride, int64_t col_stride,
                     Address values, int64_t num_values, Address bitmap, Address offsets) {
  return launch_fill(packed(rows, cols, type, values, num_values, bitmap, offsets),
                     Dense{pointer(w), row_stride, col_stride}, 0);
}

gpu::Error lscd_unpack(int64_t rows, int64_t cols, int type, Address values, int64_t num_values, Address bitmap,
                       Address offsets, Address scale, Address out, int out_type) {
  return launch_unpack(packed(rows, cols, type, values, num_values, bitmap, offsets), pointer<const float>(scale),
                       pointer(out), static_cast<Type>(out_type), 0);
}

gpu::Error lscd_linear(int64_t rows, int64_t cols, int type, Address values, int64_t num_values, Address bitmap,
                       Address offsets, int x_type, int64_t tokens, Address x, int64_t token_stride, int64_t col_stride,
                       Address y, Address bias, Address scale, int activation, int num_sms) {
  Linear a{packed(rows, cols, type, values, num_values, bitmap, offsets),
           static_cast<Type>(x_type),
           tokens,
           pointer(x),
           token_stride,
           col_stride,
           pointer(y),
           pointer(bias),
           pointer<const float>(scale),
           static_cast<Activation>(activation),
           nullptr};
  const LinearPlan plan = plan_linear(a, num_sms);
  const Memory workspace("workspace", nullptr, linear_workspace(a, plan), Memory::Kind::output);
  a.prepared = workspace.data();
  return launch_linear(a, plan, 0);
}

gpu::Error lscd_finish(int64_t rows, int64_t tokens, int x_type, Address sums, int splits, Address y, Address bias,
                       Address scale, int activation) {
  Linear a{};
  a.w.shape = {rows, 0};
  a.x_type = static_cast<Type>(x_type);
  a.tokens = tokens;
  a.y = pointer(y);
  a.bias = pointer(bias);
  a.scale = pointer<const float>(scale);
  a.activation = static_cast<Activation>(activation);
  return launch_finish(a, pointer<const float>(sums), splits, 0);
}

}  // namespace effk::simt
