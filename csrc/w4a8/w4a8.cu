// w4a8: the CUDA side.
#include <tuple>

#include "../../kernels/w4a8/linear.cuh"
#include "../../kernels/w4a8/pack.cuh"
#include "../../kernels/w4a8/salience.cuh"
#include "../common/cuda.h"
#include "args.h"

namespace effk::w4a8 {
namespace {

std::tuple<Tensor, Tensor> quantize(const Tensor& x, int64_t group) {
  constexpr const char* op = "w4a8_quantize";
  QuantizeCall call = check_quantize(op, x, group);
  const cuda::DeviceGuard guard(x.get_device_index());
  const int64_t cols = call.args.cols;
  const Tensor q = empty_like_device(x, sizes_of(x, cols), ScalarType::Char),
               scale = empty_like_device(x, sizes_of(x, ceil_div(cols, group)), ScalarType::Float);
  call.args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  call.args.q_stride = cols;
  call.args.scale = static_cast<float*>(scale.mutable_data_ptr());
  cuda::check(op, launch_quantize(call.args, call.tokens, cuda::current_stream(x)));
  return {q, scale};
}

SixTensors pack(const Tensor& w, const OptTensor& is8, int64_t group) {
  constexpr const char* op = "w4a8_pack";
  check_pack(w, is8, group);
  const cuda::DeviceGuard guard(w.get_device_index());
  const cudaStream_t stream = cuda::current_stream(w);
  const int64_t n = w.size(0);
  const Tensor perm = empty_like_device(w, {n}, ScalarType::Int);
  auto* const order = static_cast<int32_t*>(perm.mutable_data_ptr());
  int64_t n8 = 0;
  if (is8 && n > 0) {
    // How many output features up to each one have 8 bits.
    const Tensor ends = cuda::call_torch("aten::cumsum", "", *is8, int64_t{0}, std::optional<ScalarType>());
    const auto* counts = static_cast<const int64_t*>(ends.const_data_ptr());
    cuda::check(op, launch_order(counts, n, order, stream));
    cudaError_t e = cudaMemcpyAsync(&n8, counts + n - 1, sizeof(n8), cudaMemcpyDeviceToHost, stream);
    if (e == cudaSuccess) e = cudaStreamSynchronize(stream);
    cuda::check(op, gpu::error_of(e));
  } else {
    cuda::check(op, launch_order(nullptr, n, order, stream));
  }
  const PackCall call = new_packed(w, {n - n8, n8, w.size(1), group}, perm);
  cuda::check(op, launch_pack(call.args, stream));
  return call.packed;
}

// Packed tensors as the kernels want them, and what they need to stay alive.
struct Aligned {
  Tensor q4, scale4, zero4, q8, scale8;
  Packed packed;
};

Aligned align(Packed packed, const PackedTensors& p) {
  Aligned a{cuda::aligned(p.q4), cuda::aligned(p.scale4), cuda::aligned(p.zero4),
            cuda::aligned(p.q8), cuda::aligned(p.scale8), packed};
  a.packed.q4 = static_cast<const uint8_t*>(a.q4.const_data_ptr());
  a.packed.scale4 = static_cast<const float*>(a.scale4.const_data_ptr());
  a.packed.zero4 = static_cast<const uint8_t*>(a.zero4.const_data_ptr());
  a.packed.q8 = static_cast<const uint8_t*>(a.q8.const_data_ptr());
  a.packed.scale8 = static_cast<const float*>(a.scale8.const_data_ptr());
  return a;
}

Tensor unpack(const Tensor& q4, const Tensor& scale4, const Tensor& zero4, const Tensor& q8, const Tensor& scale8,
              const Tensor& perm, int64_t group) {
  constexpr const char* op = "w4a8_unpack";
  const PackedTensors p{q4, scale4, zero4, q8, scale8, perm};
  const Packed packed = check_packed(op, p, group);
  const cuda::DeviceGuard guard(q8.get_device_index());
  const Aligned a = align(packed, p);
  const Shape& s = packed.shape;
  const Tensor out = empty_like_device(q8, {s.rows(), s.cols}, ScalarType::Float),
               inverse = empty_like_device(q8, {s.rows()}, ScalarType::Int);
  cuda::check(op, launch_unpack(a.packed, static_cast<int32_t*>(inverse.mutable_data_ptr()),
                                static_cast<float*>(out.mutable_data_ptr()), cuda::current_stream(q8)));
  return out;
}

Tensor accumulate(const Tensor& q, const Tensor& q4, const Tensor& scale4, const Tensor& zero4, const Tensor& q8,
                  const Tensor& scale8, const Tensor& perm, int64_t group) {
  constexpr const char* op = "w4a8_accumulate";
  const PackedTensors p{q4, scale4, zero4, q8, scale8, perm};
  Linear args = check_accumulate(q, p, group);
  const cuda::DeviceGuard guard(q8.get_device_index());
  const Aligned a = align(args.w, p);
  args.w = a.packed;
  const Shape& s = args.w.shape;
  const Tensor out = empty_like_device(q, {args.tokens, s.groups(), s.rows()}, ScalarType::Int),
               workspace = empty_like_device(q, {linear_workspace(s, args.tokens)}, ScalarType::Byte);
  args.accumulators = static_cast<int32_t*>(out.mutable_data_ptr());
  cuda::check(op, launch_accumulate(args, static_cast<const int8_t*>(q.const_data_ptr()), q.stride(0), q.stride(1),
                                    workspace.mutable_data_ptr(), cuda::current_stream(q)));
  return out;
}

Tensor linear(const Tensor& x, const Tensor& q4, const Tensor& scale4, const Tensor& zero4, const Tensor& q8,
              const Tensor& scale8, const Tensor& perm, int64_t group, const OptTensor& bias,
              std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "w4a8_linear";
  const cuda::DeviceGuard guard(x.get_device_index());
  const PackedTensors p{q4, scale4, zero4, q8, scale8, perm};
  LinearCall call = check_linear(x, p, group, bias, out_dtype);
  const Aligned a = align(call.args.w, p);
  call.args.w = a.packed;
  const Shape& s = call.args.w.shape;
  const Tensor workspace = empty_like_device(x, {linear_workspace(s, call.args.tokens)}, ScalarType::Byte);
  const LinearPlan plan = plan_linear(s, call.args.tokens, cuda::num_sms(op, x));
  cuda::check(op, launch_linear(call.args, call.x.args, plan, workspace.mutable_data_ptr(), cuda::current_stream(x)));
  return call.y;
}

Tensor salience(const Tensor& grad, const Tensor& w, const Tensor& w4) {
  constexpr const char* op = "w4a8_salience";
  const cuda::DeviceGuard guard(w.get_device_index());
  const SalienceCall call = check_salience(grad, w, w4);
  cuda::check(op, launch_salience(call.args, cuda::current_stream(w)));
  return call.out;
}

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  m.impl("w4a8_quantize", TORCH_BOX(&quantize));
  m.impl("w4a8_pack", TORCH_BOX(&pack));
  m.impl("w4a8_unpack", TORCH_BOX(&unpack));
  m.impl("w4a8_linear", TORCH_BOX(&linear));
  m.impl("w4a8_accumulate", TORCH_BOX(&accumulate));
  m.impl("w4a8_salience", TORCH_BOX(&salience));
}

}  // namespace
}  // namespace effk::w4a8
