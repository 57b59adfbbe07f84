// The argument checks of lscd, shared by its CPU and CUDA sides.
#pragma once

#include <algorithm>

#include "../../kernels/lscd/lscd.h"
#include "../common/check.h"

namespace effk::lscd {
namespace {

// Of values: they may be integers.
inline Type value_type(const char* op, const char* arg, const Tensor& t) {
  check::dtype(op, arg, t, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Char});
  return type_of(t.scalar_type());
}

// Of a matrix: bounds what sizes can multiply to.
constexpr int64_t kMaxSide = int64_t{1} << 31;

inline Packed check_packed(const char* op, const Tensor& values, const Tensor& bitmap, const Tensor& offsets,
                           int64_t rows, int64_t cols) {
  EFFK_CHECK(rows >= 0 && rows <= kMaxSide && cols >= 0 && cols <= kMaxSide, op, "rows and cols are ", rows, " and ",
             cols, "; wanted 0 to 2^31");
  const Shape shape{rows, cols};
  const Type type = value_type(op, "values", values);
  check::dtype(op, "bitmap", bitmap, {ScalarType::Long});
  check::dtype(op, "offsets", offsets, {ScalarType::Long});
  check::shape(op, "values", values, {check::kAny});
  check::shape(op, "bitmap", bitmap, {shape.strips(), shape.sub_cols(), kStripSubs});
  check::shape(op, "offsets", offsets, {shape.offsets()});
  check::contiguous(op, "values", values);
  check::contiguous(op, "bitmap", bitmap);
  check::contiguous(op, "offsets", offsets);
  check::device(op, "bitmap", bitmap, "values", values);
  check::device(op, "offsets", offsets, "values", values);
  EFFK_CHECK(values.numel() >= kValuePad, op, "values has ", values.numel(), " entries; wanted at least the ",
             kValuePad, " of padding");
  return {shape,
          type,
          values.const_data_ptr(),
          values.numel(),
          static_cast<const uint64_t*>(bitmap.const_data_ptr()),
          static_cast<const int64_t*>(offsets.const_data_ptr())};
}

inline const float* check_scale(const char* op, const OptTensor& scale, const Tensor& values, int64_t rows) {
  if (!scale) return nullptr;
  check::dtype(op, "scale", *scale, {ScalarType::Float});
  check::shape(op, "scale", *scale, {rows});
  check::contiguous(op, "scale", *scale);
  check::device(op, "scale", *scale, "values", values);
  return static_cast<const float*>(scale->const_data_ptr());
}

constexpr std::pair<const char*, Activation> kActivations[] = {{"none", Activation::none},
                                                               {"relu", Activation::relu},
                                                               {"gelu", Activation::gelu},
                                                               {"gelu_tanh", Activation::gelu_tanh},
                                                               {"silu", Activation::silu}};

// A checked call of lscd_linear with the tensors that its pointers need.
struct LinearCall {
  Linear args;
  Tensor x, y, bias;
};

inline LinearCall check_linear(const Tensor& x, const Tensor& values, const Tensor& bitmap, const Tensor& offsets,
                               int64_t rows, int64_t cols, const OptTensor& bias, const OptTensor& scale,
                               const std::string& activation) {
  constexpr const char* op = "lscd_linear";
  const Packed w = check_packed(op, values, bitmap, offsets, rows, cols);
  const Type x_type = check::float_type(op, "x", x);
  EFFK_CHECK(w.type == x_type || w.type == Type::i8, op, "values has dtype ", check::str(values.scalar_type()),
             "; wanted x's ", check::str(x.scalar_type()), " or int8");
  EFFK_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == cols, op, "x has shape ", check::str(x.sizes()),
             "; wanted the last size to be cols = ", cols);
  check::device(op, "x", x, "values", values);

  LinearCall call;
  const auto sizes = x.sizes();
  std::vector<int64_t> y_sizes(sizes.begin(), sizes.end());
  y_sizes.back() = rows;
  const int64_t tokens = check::tokens(op, "x", x, (int64_t{1} << 56) / std::max<int64_t>(1, w.shape.padded_cols()));
  call.x = x.dim() == 2 ? x : torch::stable::reshape(x, {tokens, cols});
  call.y = empty_like_device(x, y_sizes);
  const void* bias_data = nullptr;
  if (bias) {
    check::dtype(op, "bias", *bias, {x.scalar_type()});
    check::shape(op, "bias", *bias, {rows});
    check::device(op, "bias", *bias, "values", values);
    call.bias = as_contiguous(*bias);
    bias_data = call.bias.const_data_ptr();
  }
  call.args = Linear{w,
                     x_type,
                     tokens,
                     call.x.const_data_ptr(),
                     call.x.stride(0),
                     call.x.stride(1),
                     call.y.mutable_data_ptr(),
                     bias_data,
                     check_scale(op, scale, values, rows),
                     check::choice(op, "activation", activation, kActivations),
                     nullptr};
  return call;
}

// The dtype of unpacked weights: a scale turns integers into float32.
inline ScalarType unpacked_dtype(const Tensor& values, const OptTensor& scale) {
  return scale && values.scalar_type() == ScalarType::Char ? ScalarType::Float : values.scalar_type();
}

// w as it will be packed.
inline Tensor check_pack(const Tensor& w, std::optional<ScalarType> dtype) {
  constexpr const char* op = "lscd_pack";
  value_type(op, "w", w);
  check::shape(op, "w", w, {check::kAny, check::kAny});
  EFFK_CHECK(w.size(0) <= kMaxSide && w.size(1) <= kMaxSide, op, "w has shape ", check::str(w.sizes()),
             "; wanted at most 2^31 rows and columns");
  if (!dtype || *dtype == w.scalar_type()) return w;
  const bool float_to_float =
      w.scalar_type() != ScalarType::Char &&
      (*dtype == ScalarType::Float || *dtype == ScalarType::Half || *dtype == ScalarType::BFloat16);
  EFFK_CHECK(float_to_float, op, "dtype is ", check::str(*dtype), " for w of ", check::str(w.scalar_type()),
             "; wanted float32, float16 or bfloat16 for w of such a type (quantize to int8 before packing)");
  return torch::stable::to(w, *dtype);
}

}  // namespace
}  // namespace effk::lscd
