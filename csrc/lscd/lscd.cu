// lscd: the CUDA side.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <tuple>

#include "../../kernels/lscd/linear.cuh"
#include "../../kernels/lscd/pack.cuh"
#include "../common/cuda.h"
#include "args.h"

namespace effk::lscd {
namespace {

// Past so many tokens W is unpacked and multiplied as a dense matrix: expanding it is no longer free.
constexpr int64_t kMostSparseTokens = 64;

std::tuple<Tensor, Tensor, Tensor> pack(const Tensor& w, std::optional<ScalarType> dtype) {
  constexpr const char* op = "lscd_pack";
  const cuda::DeviceGuard guard(w.get_device_index());
  const Tensor source = check_pack(w, dtype);
  const Type type = type_of(source.scalar_type());
  const Shape shape{source.size(0), source.size(1)};
  const Dense dense{const_cast<void*>(source.const_data_ptr()), source.stride(0), source.stride(1)};
  const cudaStream_t stream = cuda::current_stream(w);

  Tensor bitmap = torch::stable::new_empty(w, {shape.strips(), shape.sub_cols(), kStripSubs}, ScalarType::Long);
  Tensor sizes = torch::stable::new_zeros(w, {shape.offsets()}, ScalarType::Long);
  auto* words = static_cast<uint64_t*>(bitmap.mutable_data_ptr());
  cuda::check(op, launch_count(shape, type, dense, words, static_cast<int64_t*>(sizes.mutable_data_ptr()) + 1, stream));
  const Tensor offsets = cuda::call_torch("aten::cumsum", "", sizes, int64_t{0}, std::optional<ScalarType>());

  int64_t end = 0;
  const auto* ends = static_cast<const int64_t*>(offsets.const_data_ptr());
  cudaError_t e = cudaMemcpyAsync(&end, ends + shape.offsets() - 1, sizeof(end), cudaMemcpyDeviceToHost, stream);
  if (e == cudaSuccess) e = cudaStreamSynchronize(stream);
  cuda::check(op, gpu::error_of(e));

  Tensor values = torch::stable::new_empty(source, {end + kValuePad});
  const Packed packed{shape, type, values.mutable_data_ptr(), end + kValuePad, words, ends};
  cuda::check(op, launch_fill(packed, dense, stream));
  return {values, bitmap, offsets};
}

// Packed tensors as the kernels want them, and what they need to stay alive.
struct Aligned {
  Tensor values, bitmap;
  Packed packed;
};

Aligned align(Packed packed, const Tensor& values, const Tensor& bitmap) {
  Aligned a{cuda::aligned(values), cuda::aligned(bitmap), packed};
  a.packed.values = a.values.const_data_ptr();
  a.packed.bitmap = static_cast<const uint64_t*>(a.bitmap.const_data_ptr());
  return a;
}

Tensor unpack(const Tensor& values, const Tensor& bitmap, const Tensor& offsets, int64_t rows, int64_t cols,
              const OptTensor& scale) {
  constexpr const char* op = "lscd_unpack";
  const Packed packed = check_packed(op, values, bitmap, offsets, rows, cols);
  const cuda::DeviceGuard guard(values.get_device_index());
  const Aligned a = align(packed, values, bitmap);
  const float* scales = check_scale(op, scale, values, rows);
  Tensor out = torch::stable::new_empty(values, {rows, cols}, unpacked_dtype(values, scale));
  cuda::check(op, launch_unpack(a.packed, scales, out.mutable_data_ptr(), type_of(out.scalar_type()),
                                cuda::current_stream(values)));
  return out;
}

// y = x W^T by torch, where its switches for TF32 and for reductions in 16 bits hold as in F.linear; then scale, bias
// and activation in float32. 16-bit results are rounded once, be it by torch (bias too) or in the end.
void dense_linear(const char* op, const LinearCall& call, const Tensor& values, cudaStream_t stream) {
  const Linear& a = call.args;
  const int64_t rows = a.w.shape.rows, cols = a.w.shape.cols;
  Tensor w = torch::stable::new_empty(values, {rows, cols}, call.x.scalar_type());
  cuda::check(op, launch_unpack(a.w, nullptr, w.mutable_data_ptr(), a.x_type, stream));
  w = torch::stable::transpose(w, 0, 1);

  Tensor y = torch::stable::view(call.y, {a.tokens, rows});
  Tensor sums = y;
  // Out variants: autocast leaves them alone.
  if (!a.scale && a.activation == Activation::none) {
    if (!a.bias) {
      cuda::call_torch("aten::mm", "out", call.x, w, y);
    } else {
      static auto* const addmm_out =
          cuda::torch_function<decltype(aoti_torch_cuda_addmm_out)>("aoti_torch_cuda_addmm_out");
      TORCH_ERROR_CODE_CHECK(addmm_out(y.get(), call.bias.get(), call.x.get(), w.get(), 1, 1));
    }
    return;
  }
  if (a.x_type == Type::f32) {
    cuda::call_torch("aten::mm", "out", call.x, w, sums);
  } else {
    sums = torch::stable::new_empty(y, {a.tokens, rows}, ScalarType::Float);
    cuda::call_torch("aten::mm", "dtype_out", call.x, w, ScalarType::Float, sums);
  }
  cuda::check(op, launch_finish(a, static_cast<const float*>(sums.const_data_ptr()), 1, stream));
}

Tensor linear(const Tensor& x, const Tensor& values, const Tensor& bitmap, const Tensor& offsets, int64_t rows,
              int64_t cols, const OptTensor& bias, const OptTensor& scale, const std::string& activation) {
  constexpr const char* op = "lscd_linear";
  LinearCall call = check_linear(x, values, bitmap, offsets, rows, cols, bias, scale, activation);
  const cuda::DeviceGuard guard(x.get_device_index());
  Linear& args = call.args;
  const Aligned a = align(args.w, values, bitmap);
  args.w = a.packed;
  const cudaStream_t stream = cuda::current_stream(x);
  if (cols == 0) {
    cuda::check(op, launch_finish(args, nullptr, 0, stream));
  } else if (args.tokens > kMostSparseTokens && rows > 0) {
    dense_linear(op, call, values, stream);
  } else {
    const LinearPlan plan = plan_linear(args, cuda::num_sms(op, x));
    const Tensor workspace = torch::stable::new_empty(x, {linear_workspace(args, plan)}, ScalarType::Byte);
    args.prepared = workspace.mutable_data_ptr();
    cuda::check(op, launch_linear(args, plan, stream));
  }
  return call.y;
}

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  m.impl("lscd_pack", TORCH_BOX(&pack));
  m.impl("lscd_unpack", TORCH_BOX(&unpack));
  m.impl("lscd_linear", TORCH_BOX(&linear));
}

}  // namespace
}  // namespace effk::lscd
