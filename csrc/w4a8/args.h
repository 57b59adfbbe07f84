// The argument checks of w4a8, shared by its CPU and CUDA sides.
#pragma once

#include <algorithm>
#include <tuple>

#include "../../kernels/w4a8/w4a8.h"
#include "../common/check.h"

namespace effk::w4a8 {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 30;  // of a matrix: bounds what sizes can multiply to

inline void check_group_size(const char* op, int64_t group) {
  EFFK_CHECK(group == 32 || group == 64 || group == 128 || group == 256, op, "group_size is ", group,
             "; wanted one of 32, 64, 128, 256");
}

// The six packed tensors under their names.
struct PackedTensors {
  const Tensor &q4, &scale4, &zero4, &q8, &scale8, &perm;
};

// The contents of perm are left to the caller.
inline Packed check_packed(const char* op, const PackedTensors& p, int64_t group) {
  check_group_size(op, group);
  check::dtype(op, "q8", p.q8, {ScalarType::Byte});
  check::shape(op, "q8", p.q8, {check::kAny, check::kAny});
  check::dtype(op, "perm", p.perm, {ScalarType::Int});
  check::shape(op, "perm", p.perm, {check::kAny});
  const int64_t n8 = p.q8.size(0), cols = p.q8.size(1), rows = p.perm.size(0);
  EFFK_CHECK(rows <= kMaxSide && cols <= kMaxSide, op, "perm and q8 make a weight of [", rows, ", ", cols,
             "]; wanted at most 2^30 each way");
  EFFK_CHECK(n8 <= rows, op, "perm has ", rows, " entries; wanted at least q8's ", n8, " rows");
  const Shape shape{rows - n8, n8, cols, group};
  check::dtype(op, "q4", p.q4, {ScalarType::Byte});
  check::shape(op, "q4", p.q4, {shape.blocks4(), shape.chunks(), kBlock, 4});
  check::dtype(op, "scale4", p.scale4, {ScalarType::Float});
  check::shape(op, "scale4", p.scale4, {shape.blocks4(), shape.groups(), kBlock});
  check::dtype(op, "zero4", p.zero4, {ScalarType::Byte});
  check::shape(op, "zero4", p.zero4, {shape.blocks4(), shape.groups(), kBlock});
  check::dtype(op, "scale8", p.scale8, {ScalarType::Float});
  check::shape(op, "scale8", p.scale8, {shape.blocks8(), shape.groups(), kBlock});
  const std::pair<const char*, const Tensor&> all[] = {{"q4", p.q4}, {"scale4", p.scale4}, {"zero4", p.zero4},
                                                       {"q8", p.q8}, {"scale8", p.scale8}, {"perm", p.perm}};
  for (const auto& [name, t] : all) {
    check::contiguous(op, name, t);
    check::device(op, name, t, "q8", p.q8);
  }
  return {shape,
          static_cast<const uint8_t*>(p.q4.const_data_ptr()),
          static_cast<const float*>(p.scale4.const_data_ptr()),
          static_cast<const uint8_t*>(p.zero4.const_data_ptr()),
          static_cast<const uint8_t*>(p.q8.const_data_ptr()),
          static_cast<const float*>(p.scale8.const_data_ptr()),
          static_cast<const int32_t*>(p.perm.const_data_ptr())};
}

// x as a matrix of tokens.
struct Tokens {
  Tensor x;  // [tokens, cols]
  int64_t tokens;
};

inline Tokens as_tokens(const char* op, const char* arg, const Tensor& x) {
  const int64_t cols = x.size(x.dim() - 1);
  const int64_t tokens = check::tokens(op, arg, x, (int64_t{1} << 50) / std::max<int64_t>(kBlock, cols));
  return {x.dim() == 2 ? x : torch::stable::reshape(x, {tokens, cols}), tokens};
}

inline std::vector<int64_t> sizes_of(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out.back() = last;
  return out;
}

// A checked call of w4a8_quantize but for its outputs.
struct QuantizeCall {
  Quantize args;
  Tensor x;
  int64_t tokens;
};

inline QuantizeCall check_quantize(const char* op, const Tensor& x, int64_t group) {
  check_group_size(op, group);
  const Type type = check::float_type(op, "x", x);
  EFFK_CHECK(x.dim() >= 1, op, "x has shape []; wanted at least one dimension");
  EFFK_CHECK(x.size(x.dim() - 1) <= kMaxSide, op, "x has shape ", check::str(x.sizes()),
             "; wanted a last size of at most 2^30");
  const Tokens t = as_tokens(op, "x", x);
  return {{type, t.x.const_data_ptr(), t.x.stride(0), t.x.stride(1), t.x.size(1), group, nullptr, 0, nullptr, nullptr},
          t.x,
          t.tokens};
}

// A checked call of w4a8_linear but for its quantized activations.
struct LinearCall {
  Linear args;
  QuantizeCall x;
  Tensor y, bias;
};

inline LinearCall check_linear(const Tensor& x, const PackedTensors& p, int64_t group, const OptTensor& bias,
                               std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "w4a8_linear";
  const Packed w = check_packed(op, p, group);
  check::float_type(op, "x", x);
  EFFK_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == w.shape.cols, op, "x has shape ", check::str(x.sizes()),
             "; wanted the last size to be q8's ", w.shape.cols);
  check::device(op, "x", x, "q8", p.q8);
  const ScalarType dtype = out_dtype.value_or(x.scalar_type());
  EFFK_CHECK(check::is_float(dtype), op, "out_dtype is ", check::str(dtype), "; wanted float32, float16 or bfloat16");
  LinearCall call;
  const float* bias_data = nullptr;
  if (bias) {
    check::float_type(op, "bias", *bias);
    check::shape(op, "bias", *bias, {w.shape.rows()});
    check::device(op, "bias", *bias, "q8", p.q8);
    call.bias = bias->scalar_type() == ScalarType::Float ? *bias : torch::stable::to(*bias, ScalarType::Float);
    call.bias = as_contiguous(call.bias);
    bias_data = static_cast<const float*>(call.bias.const_data_ptr());
  }
  call.x = check_quantize(op, x, group);
  call.y = empty_like_device(x, sizes_of(x, w.shape.rows()), dtype);
  call.args = {w,         call.x.tokens, nullptr, 0, nullptr, nullptr, call.y.mutable_data_ptr(), type_of(dtype),
               bias_data, nullptr};
  return call;
}

inline void check_pack(const Tensor& w, const OptTensor& is8, int64_t group) {
  constexpr const char* op = "w4a8_pack";
  check_group_size(op, group);
  check::float_type(op, "w", w);
  check::shape(op, "w", w, {check::kAny, check::kAny});
  EFFK_CHECK(w.size(0) <= kMaxSide && w.size(1) <= kMaxSide, op, "w has shape ", check::str(w.sizes()),
             "; wanted at most 2^30 each way");
  if (!is8) return;
  check::dtype(op, "is8", *is8, {ScalarType::Bool});
  check::shape(op, "is8", *is8, {w.size(0)});
  check::device(op, "is8", *is8, "w", w);
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Room for a packed weight, but for perm, and the call that fills it.
struct PackCall {
  Pack args;
  SixTensors packed;
};

inline PackCall new_packed(const Tensor& w, const Shape& s, const Tensor& perm) {
  const Tensor q4 = empty_like_device(w, {s.blocks4(), s.chunks(), kBlock, 4}, ScalarType::Byte),
               scale4 = empty_like_device(w, {s.blocks4(), s.groups(), kBlock}, ScalarType::Float),
               zero4 = empty_like_device(w, {s.blocks4(), s.groups(), kBlock}, ScalarType::Byte),
               q8 = empty_like_device(w, {s.n8, s.cols}, ScalarType::Byte),
               scale8 = empty_like_device(w, {s.blocks8(), s.groups(), kBlock}, ScalarType::Float);
  const PackedTensors p{q4, scale4, zero4, q8, scale8, perm};
  return {
      {check_packed("w4a8_pack", p, s.group), type_of(w.scalar_type()), w.const_data_ptr(), w.stride(0), w.stride(1)},
      {q4, scale4, zero4, q8, scale8, perm}};
}

// A checked call of w4a8_salience with the tensors that its pointers need.
struct SalienceCall {
  Salience args;
  Tensor grad, w, w4, out;
};

inline SalienceCall check_salience(const Tensor& grad, const Tensor& w, const Tensor& w4) {
  constexpr const char* op = "w4a8_salience";
  const Type w_type = check::float_type(op, "w", w), w4_type = check::float_type(op, "w4", w4),
             grad_type = check::float_type(op, "grad", grad);
  check::shape(op, "w", w, {check::kAny, check::kAny});
  const int64_t rows = w.size(0), cols = w.size(1);
  check::shape(op, "w4", w4, {rows, cols});
  const int64_t dims = grad.dim();
  EFFK_CHECK((dims == 2 || dims == 3) && grad.size(dims - 2) == rows && grad.size(dims - 1) == cols, op,
             "grad has shape ", check::str(grad.sizes()), "; wanted ", check::str(w.sizes()), ", or samples of it");
  check::device(op, "w4", w4, "w", w);
  check::device(op, "grad", grad, "w", w);
  SalienceCall call{
      {dims == 3 ? grad.size(0) : 1, rows, cols, grad_type, w_type, w4_type, nullptr, nullptr, nullptr, nullptr},
      as_contiguous(grad),
      as_contiguous(w),
      as_contiguous(w4),
      empty_like_device(w, {rows}, ScalarType::Float)};
  call.args.grad = call.grad.const_data_ptr();
  call.args.w = call.w.const_data_ptr();
  call.args.w4 = call.w4.const_data_ptr();
  call.args.out = static_cast<float*>(call.out.mutable_data_ptr());
  return call;
}

// A checked call of w4a8_accumulate, into out [tokens, groups, rows].
inline Linear check_accumulate(const Tensor& q, const PackedTensors& p, int64_t group) {
  constexpr const char* op = "w4a8_accumulate";
  const Packed w = check_packed(op, p, group);
  check::dtype(op, "q", q, {ScalarType::Char});
  check::shape(op, "q", q, {check::kAny, w.shape.cols});
  check::device(op, "q", q, "q8", p.q8);
  Linear args{};
  args.w = w;
  args.tokens = as_tokens(op, "q", q).tokens;
  return args;
}

}  // namespace
}  // namespace effk::w4a8
