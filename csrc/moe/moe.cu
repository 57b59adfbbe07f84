// moe: the CUDA side.
#include "../../kernels/moe/mlp.cuh"
#include "../../kernels/moe/route.cuh"
#include "../../kernels/moe/wgrad.cuh"
#include "../common/cuda.h"
#include "args.h"

namespace effk::moe {
namespace {

Tensor grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& offsets, const OptTensor& bias,
                    const OptTensor& gather, std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "moe_grouped_gemm";
  const cuda::DeviceGuard guard(x.get_device_index());
  const LinearCall call = check_linear(x, w, offsets, bias, gather, out_dtype);
  const cuda::IndexTensor ends = cuda::indices(offsets), sources = cuda::indices(gather);
  Product p{};
  p.in = call.args.in;
  p.x_rows = x.size(0);
  p.gather = sources.args;
  p.divisor = 1;
  p.groups = {ends.args, w.size(0), call.x.rows, true};
  p.cols = call.args.rows;
  p.y = call.args.y;
  p.bias = call.args.bias;
  p.out_type = call.args.out_type;
  const int num_sms = cuda::num_sms(op, x);
  cuda::check(op, launch_product<LinearKind>(p, choose_tiling(p, nullptr, num_sms), num_sms, cuda::current_stream(x)));
  return call.y;
}

Tensor grouped_wgrad(const Tensor& grad, const Tensor& x, const Tensor& offsets, const OptTensor& gather) {
  constexpr const char* op = "moe_grouped_wgrad";
  const cuda::DeviceGuard guard(x.get_device_index());
  const WgradCall call = check_wgrad(grad, x, offsets, gather);
  const cuda::IndexTensor ends = cuda::indices(offsets), sources = cuda::indices(gather);
  const WgradArgs p{call.args, x.size(0), sources.args, {ends.args, offsets.size(0), call.x.rows, false}};
  cuda::check(op, launch_wgrad(p, cuda::num_sms(op, x), cuda::current_stream(x)));
  return call.dw;
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k, const OptTensor& bias, std::string score,
                                 bool renormalize) {
  constexpr const char* op = "moe_route";
  const cuda::DeviceGuard guard(logits.get_device_index());
  const RouteCall call = check_route(logits, k, bias, score, renormalize);
  cuda::check(op, launch_route(call.args, cuda::num_sms(op, logits), cuda::current_stream(logits)));
  return {call.weights, call.ids};
}

std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& ids, int64_t num_experts) {
  constexpr const char* op = "moe_sort";
  const cuda::DeviceGuard guard(ids.get_device_index());
  const auto [perm, inverse, offsets] = check_sort(ids, num_experts);
  const cuda::IndexTensor given = cuda::indices(ids);
  const int64_t pairs = ids.numel();
  SortScratch layout;
  const Tensor scratch = cuda::workspace(ids, place_sort(pairs, num_experts, nullptr, &layout));
  const SortArgs args{given.args,
                      pairs,
                      num_experts,
                      static_cast<int64_t*>(perm.mutable_data_ptr()),
                      static_cast<int64_t*>(inverse.mutable_data_ptr()),
                      static_cast<int32_t*>(offsets.mutable_data_ptr())};
  cuda::check(op, launch_sort(args, scratch.mutable_data_ptr(), cuda::current_stream(ids)));
  return {perm, inverse, offsets};
}

Tensor combine(const Tensor& y, const Tensor& inverse, const Tensor& weights) {
  const cuda::DeviceGuard guard(y.get_device_index());
  const CombineCall call = check_combine(y, inverse, weights);
  CombineArgs p{};
  p.a = call.args;
  p.inverse = {call.inverse.const_data_ptr(), inverse.scalar_type() == ScalarType::Long};
  p.rows = y.size(0);
  cuda::check("moe_combine", launch_combine(p, cuda::current_stream(y)));
  return call.out;
}

// Inside the guard of x's device.
Tensor run_mlp(const MlpCall& call) {
  const MlpArgs p{call.first,
                  call.second,
                  call.activation,
                  call.tokens,
                  call.pairs,
                  call.experts,
                  call.inner,
                  call.rows,
                  {call.ids.const_data_ptr(), call.ids.scalar_type() == ScalarType::Long},
                  static_cast<const float*>(call.weights.const_data_ptr()),
                  call.y.mutable_data_ptr(),
                  call.adds};
  const Tensor memory = cuda::workspace(call.x, mlp_workspace(p));
  cuda::check(call.op, launch_mlp(p, call.gemm ? &*call.gemm : nullptr, memory.mutable_data_ptr(),
                                  cuda::num_sms(call.op, call.x), cuda::current_stream(call.x)));
  return call.y;
}

Tensor mlp(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& weights, const Tensor& ids,
           std::string activation, std::string gemm) {
  const cuda::DeviceGuard guard(x.get_device_index());
  return run_mlp(check_mlp(std::nullopt, x, w13, w2, weights, ids, activation, gemm));
}

void mlp_(const Tensor& y, const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& weights,
          const Tensor& ids, std::string activation, std::string gemm) {
  const cuda::DeviceGuard guard(x.get_device_index());
  run_mlp(check_mlp(y, x, w13, w2, weights, ids, activation, gemm));
}

STABLE_TORCH_LIBRARY_IMPL(effk, CUDA, m) {
  m.impl("moe_route", TORCH_BOX(&route));
  m.impl("moe_sort", TORCH_BOX(&sort));
  m.impl("moe_grouped_gemm", TORCH_BOX(&grouped_gemm));
  m.impl("moe_grouped_wgrad", TORCH_BOX(&grouped_wgrad));
  m.impl("moe_combine", TORCH_BOX(&combine));
  m.impl("moe_mlp", TORCH_BOX(&mlp));
  m.impl("moe_mlp_", TORCH_BOX(&mlp_));
}

}  // namespace
}  // namespace effk::moe
