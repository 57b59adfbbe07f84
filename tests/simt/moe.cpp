// The launchers of moe for Python. Compiled with the checker's hooks; csrc/moe/moe.cu is what it stands for.
#include "../../kernels/moe/mlp.cuh"
#include "../../kernels/moe/route.cuh"
#include "../../kernels/moe/wgrad.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

template <class T = void>
T* pointer(Address a) {
  return reinterpret_cast<T*>(a);
}

effk::Indices indices(const Indices& v) { return {pointer<const void>(std::get<0>(v)), std::get<1>(v)}; }

}  // namespace

gpu::Error moe_route(int type, int64_t tokens, int64_t experts, int64_t k, Address logits, int64_t stride, Address bias,
                     int score, bool renormalize, Address weights, Address ids, int num_sms) {
  return moe::launch_route(
      {static_cast<Type>(type), tokens, experts, k, pointer<const void>(logits), stride, pointer<const float>(bias),
       static_cast<moe::Score>(score), renormalize, pointer<float>(weights), pointer<int64_t>(ids)},
      num_sms, 0);
}

gpu::Error moe_sort(Indices ids, int64_t pairs, int64_t experts, Address perm, Address inverse, Address offsets) {
  moe::SortScratch layout;
  const Memory scratch("scratch", nullptr, moe::place_sort(pairs, experts, nullptr, &layout), Memory::Kind::output);
  return moe::launch_sort(
      {indices(ids), pairs, experts, pointer<int64_t>(perm), pointer<int64_t>(inverse), pointer<int32_t>(offsets)},
      scratch.data(), 0);
}

gpu::Error moe_grouped_gemm(int type, MoeMatrix x, MoeWeights w, Indices offsets, int64_t rows, Indices gather,
                            Address bias, int out_type, Address y, int tiling, int num_sms) {
  moe::Product p{};
  const auto& [x_rows, cols, x_data, x_stride] = x;
  const auto& [experts, w_rows, w_data, w_expert, w_stride] = w;
  p.in = {static_cast<Type>(type),
          cols,
          pointer<const void>(x_data),
          x_stride,
          nullptr,
          pointer<const void>(w_data),
          w_expert,
          w_stride};
  p.x_rows = x_rows;
  p.gather = indices(gather);
  p.divisor = 1;
  p.groups = {indices(offsets), experts, rows, true};
  p.cols = w_rows;
  p.y = pointer(y);
  p.bias = pointer<const void>(bias);
  p.out_type = static_cast<Type>(out_type);
  return moe::launch_product<moe::LinearKind>(
      p, tiling < 0 ? choose_tiling(p, nullptr, num_sms) : static_cast<moe::Tiling>(tiling), num_sms, 0);
}

gpu::Error moe_grouped_wgrad(int type, MoeMatrix grad, MoeMatrix x, Indices offsets, int64_t experts, Indices gather,
                             Address dw, int num_sms) {
  const auto& [rows, grad_cols, grad_data, grad_stride] = grad;
  const auto& [x_rows, cols, x_data, x_stride] = x;
  moe::WgradArgs p{};
  p.a.in.type = static_cast<Type>(type);
  p.a.in.cols = cols;
  p.a.in.x = pointer<const void>(x_data);
  p.a.in.x_stride = x_stride;
  p.a.rows = grad_cols;
  p.a.grad = pointer<const void>(grad_data);
  p.a.grad_stride = grad_stride;
  p.a.dw = pointer(dw);
  p.x_rows = x_rows;
  p.gather = indices(gather);
  p.groups = {indices(offsets), experts, rows, false};
  return launch_wgrad(p, num_sms, 0);
}

gpu::Error moe_combine(int type, MoeMatrix y, int64_t tokens, int64_t k, Indices inverse, Address weights,
                       Address out) {
  const auto& [rows, cols, data, stride] = y;
  moe::CombineArgs p{};
  p.a = {static_cast<Type>(type),       tokens,      k, cols, pointer<const void>(data), stride, nullptr,
         pointer<const float>(weights), pointer(out)};
  p.inverse = indices(inverse);
  p.rows = rows;
  return launch_combine(p, 0);
}

gpu::Error moe_mlp(int type, MoeMatrix x, MoeWeights w13, MoeWeights w2, int64_t k, Indices ids, Address weights,
                   int activation, int gemm, Address y, bool adds, int num_sms) {
  const auto& [tokens, cols, x_data, x_stride] = x;
  const auto& [experts, rows13, data13, expert13, stride13] = w13;
  const auto& [experts2, rows2, data2, expert2, stride2] = w2;
  moe::MlpArgs p{};
  p.activation = static_cast<moe::Activation>(activation);
  p.tokens = tokens;
  p.pairs = k;
  p.experts = experts;
  p.inner = rows13 / (is_gated(p.activation) ? 2 : 1);
  p.rows = cols;
  p.first = {static_cast<Type>(type),
             cols,
             pointer<const void>(x_data),
             x_stride,
             nullptr,
             pointer<const void>(data13),
             expert13,
             stride13};
  p.second = {static_cast<Type>(type), p.inner, nullptr, 0, nullptr, pointer<const void>(data2), expert2, stride2};
  p.ids = indices(ids);
  p.weights = pointer<const float>(weights);
  p.y = pointer(y);
  p.adds = adds;
  const Memory workspace("workspace", nullptr, mlp_workspace(p), Memory::Kind::output);
  const auto given = static_cast<moe::Gemm>(gemm);
  return launch_mlp(p, gemm < 0 ? nullptr : &given, workspace.data(), num_sms, 0);
}

}  // namespace effk::simt
