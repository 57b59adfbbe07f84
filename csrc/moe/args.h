// The argument checks of moe, shared by its CPU and CUDA sides. None looks at the contents of a tensor.
#pragma once

#include <algorithm>

#include "../../kernels/moe/moe.h"
#include "../common/check.h"

namespace effk::moe {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 30;   // of a matrix: bounds what sizes can multiply to
constexpr int64_t kMaxPairs = int64_t{1} << 30;  // of a token and an expert

constexpr std::pair<const char*, Activation> kActivations[] = {{"swiglu", Activation::swiglu},
                                                               {"geglu", Activation::geglu},
                                                               {"geglu_tanh", Activation::geglu_tanh},
                                                               {"relu2", Activation::relu2}};
constexpr std::pair<const char*, Score> kScores[] = {{"softmax", Score::softmax}, {"sigmoid", Score::sigmoid}};
constexpr std::pair<const char*, std::optional<Gemm>> kGemms[] = {
    {"auto", std::nullopt}, {"grouped", Gemm::grouped}, {"dense", Gemm::dense}};

inline void check_sides(const char* op, const char* arg, const Tensor& t) {
  for (const int64_t size : t.sizes())
    EFFK_CHECK(size <= kMaxSide, op, arg, " has shape ", check::str(t.sizes()), "; wanted at most 2^30 each way");
}

// A tensor with at least one dimension as rows of its last.
inline int64_t check_rows(const char* op, const char* arg, const Tensor& t, int64_t most) {
  EFFK_CHECK(t.dim() >= 1, op, arg, " has shape []; wanted at least one dimension");
  const int64_t last = t.size(t.dim() - 1);
  EFFK_CHECK(last <= kMaxSide, op, arg, " has shape ", check::str(t.sizes()), "; wanted at most 2^30 columns");
  return check::tokens(op, arg, t, most / std::max<int64_t>(1, last));
}

// The sizes of a tensor with another last one.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return sizes;
}

// t has the leading sizes of `like` and its own last.
inline void check_leading(const char* op, const char* arg, const Tensor& t, const char* like_arg, const Tensor& like) {
  const auto have = t.sizes(), want = like.sizes();
  EFFK_CHECK(have.size() == want.size() && std::equal(have.begin(), have.end() - 1, want.begin()), op, arg,
             " has shape ", check::str(have), "; wanted ", like_arg, "'s leading sizes, ", like_arg, " has shape ",
             check::str(want));
}

// Weights of pairs: float32, shaped as `like`.
inline void check_weights(const char* op, const Tensor& weights, const char* like_arg, const Tensor& like) {
  check::dtype(op, "weights", weights, {ScalarType::Float});
  const auto have = weights.sizes(), want = like.sizes();
  EFFK_CHECK(have.size() == want.size() && std::equal(have.begin(), have.end(), want.begin()), op, "weights has shape ",
             check::str(have), "; wanted ", like_arg, "'s ", check::str(want));
  check::device(op, "weights", weights, like_arg, like);
}

// Weights [experts, rows, cols] of x's type, and those whose columns follow each other.
inline Tensor check_experts(const char* op, const char* arg, const Tensor& w, const Tensor& x, int64_t rows,
                            int64_t cols) {
  check::dtype(op, arg, w, {x.scalar_type()});
  check::shape(op, arg, w, {check::kAny, rows, cols});
  check_sides(op, arg, w);
  check::device(op, arg, w, "x", x);
  return with_unit_last(w);
}

inline void point_to_w(Operands& in, const Tensor& w) {
  in.w = w.const_data_ptr();
  in.w_expert = w.stride(0);
  in.w_stride = w.stride(1);
}

// Rows sorted by expert, as offsets tell, which rows of x they are, and x's part of the operands.
struct Rows {
  Tensor x;
  OptTensor gather;
  Operands in;
  int64_t rows;
};

inline Rows check_sorted(const char* op, const Tensor& x, const Tensor& offsets, const OptTensor& gather) {
  Rows out;
  out.in.type = check::float_type(op, "x", x);
  check::shape(op, "x", x, {check::kAny, check::kAny});
  check_sides(op, "x", x);
  check::index_type(op, "offsets", offsets);
  check::shape(op, "offsets", offsets, {check::kAny});
  check_sides(op, "offsets", offsets);
  check::device(op, "offsets", offsets, "x", x);
  out.rows = x.size(0);
  if (gather) {
    check::index_type(op, "gather", *gather);
    check::shape(op, "gather", *gather, {check::kAny});
    check_sides(op, "gather", *gather);
    check::device(op, "gather", *gather, "x", x);
    out.rows = gather->size(0);
  }
  out.gather = gather;
  out.x = as_rows(x, x.size(0), x.size(1));
  out.in.cols = x.size(1);
  out.in.x = out.x.const_data_ptr();
  out.in.x_stride = out.x.stride(0);
  out.in.source = nullptr;
  return out;
}

struct LinearCall {
  Linear args;
  Rows x;
  Tensor w;
  OptTensor bias;
  Tensor y;
};

inline LinearCall check_linear(const Tensor& x, const Tensor& w, const Tensor& offsets, const OptTensor& bias,
                               const OptTensor& gather, std::optional<ScalarType> out_dtype) {
  constexpr const char* op = "moe_grouped_gemm";
  LinearCall call{{}, check_sorted(op, x, offsets, gather), {}, {}, {}};
  call.w = check_experts(op, "w", w, x, check::kAny, x.size(1));
  EFFK_CHECK(offsets.size(0) == w.size(0), op, "offsets has shape ", check::str(offsets.sizes()), "; wanted w's ",
             w.size(0), " experts");
  if (bias) {
    check::dtype(op, "bias", *bias, {x.scalar_type()});
    check::shape(op, "bias", *bias, {w.size(0), w.size(1)});
    check::device(op, "bias", *bias, "x", x);
    call.bias = as_contiguous(*bias);
  }
  const ScalarType out = out_dtype.value_or(x.scalar_type());
  EFFK_CHECK(check::is_float(out), op, "out_dtype is ", check::str(out), "; wanted float32, float16, bfloat16");
  call.y = empty_like_device(x, {call.x.rows, w.size(1)}, out);
  point_to_w(call.x.in, call.w);
  call.args = {call.x.in, w.size(1), call.bias ? call.bias->const_data_ptr() : nullptr, type_of(out),
               call.y.mutable_data_ptr()};
  return call;
}

struct WgradCall {
  Wgrad args;
  Rows x;
  Tensor grad, dw;
};

inline WgradCall check_wgrad(const Tensor& grad, const Tensor& x, const Tensor& offsets, const OptTensor& gather) {
  constexpr const char* op = "moe_grouped_wgrad";
  WgradCall call{{}, check_sorted(op, x, offsets, gather), {}, {}};
  check::dtype(op, "grad", grad, {x.scalar_type()});
  check::shape(op, "grad", grad, {call.x.rows, check::kAny});
  check_sides(op, "grad", grad);
  check::device(op, "grad", grad, "x", x);
  call.grad = as_rows(grad, grad.size(0), grad.size(1));
  call.dw = empty_like_device(x, {offsets.size(0), grad.size(1), x.size(1)});
  call.args = {call.x.in, grad.size(1), call.grad.const_data_ptr(), call.grad.stride(0), call.dw.mutable_data_ptr()};
  return call;
}

struct RouteCall {
  Route args;
  Tensor logits;
  OptTensor bias;
  Tensor weights, ids;
};

inline RouteCall check_route(const Tensor& logits, int64_t k, const OptTensor& bias, const std::string& score,
                             bool renormalize) {
  constexpr const char* op = "moe_route";
  RouteCall call;
  const Type type = check::float_type(op, "logits", logits);
  const int64_t tokens = check_rows(op, "logits", logits, int64_t{1} << 50), experts = logits.size(logits.dim() - 1);
  EFFK_CHECK(k >= 0 && k <= experts, op, "k is ", k, "; wanted 0 to logits' ", experts, " experts");
  EFFK_CHECK(tokens <= kMaxPairs / std::max<int64_t>(1, k), op, "logits has shape ", check::str(logits.sizes()),
             "; wanted at most 2^30 pairs");
  if (bias) {
    check::dtype(op, "bias", *bias, {ScalarType::Float});
    check::shape(op, "bias", *bias, {experts});
    check::device(op, "bias", *bias, "logits", logits);
    call.bias = as_contiguous(*bias);
  }
  call.logits = as_rows(logits, tokens, experts);
  call.weights = empty_like_device(logits, with_last(logits, k), ScalarType::Float);
  call.ids = empty_like_device(logits, with_last(logits, k), ScalarType::Long);
  call.args = {type,
               tokens,
               experts,
               k,
               call.logits.const_data_ptr(),
               call.logits.stride(0),
               call.bias ? static_cast<const float*>(call.bias->const_data_ptr()) : nullptr,
               check::choice(op, "score", score, kScores),
               renormalize,
               static_cast<float*>(call.weights.mutable_data_ptr()),
               static_cast<int64_t*>(call.ids.mutable_data_ptr())};
  return call;
}

struct SortCall {
  Tensor perm, inverse, offsets;
};

inline SortCall check_sort(const Tensor& ids, int64_t experts) {
  constexpr const char* op = "moe_sort";
  check::index_type(op, "ids", ids);
  check_rows(op, "ids", ids, kMaxPairs);
  EFFK_CHECK(experts >= 0 && experts <= kMaxSide, op, "num_experts is ", experts, "; wanted 0 to 2^30");
  return {empty_like_device(ids, {ids.numel()}, ScalarType::Long),
          empty_like_device(ids, std::vector<int64_t>(ids.sizes().begin(), ids.sizes().end()), ScalarType::Long),
          empty_like_device(ids, {experts}, ScalarType::Int)};
}

struct CombineCall {
  Combine args;
  Tensor y, inverse, weights, out;
};

inline CombineCall check_combine(const Tensor& y, const Tensor& inverse, const Tensor& weights) {
  constexpr const char* op = "moe_combine";
  CombineCall call;
  const Type type = check::float_type(op, "y", y);
  check::shape(op, "y", y, {check::kAny, check::kAny});
  check_sides(op, "y", y);
  check::index_type(op, "inverse", inverse);
  const int64_t tokens = check_rows(op, "inverse", inverse, kMaxPairs);
  check::device(op, "inverse", inverse, "y", y);
  check_weights(op, weights, "inverse", inverse);
  call.y = as_rows(y, y.size(0), y.size(1));
  call.inverse = as_contiguous(inverse);
  call.weights = as_contiguous(weights);
  call.out = empty_like_device(y, with_last(inverse, y.size(1)));
  call.args = {type,
               tokens,
               inverse.size(inverse.dim() - 1),
               y.size(1),
               call.y.const_data_ptr(),
               call.y.stride(0),
               nullptr,
               static_cast<const float*>(call.weights.const_data_ptr()),
               call.out.mutable_data_ptr()};
  return call;
}

// A checked call of moe_mlp or moe_mlp_; what is sorted and what is between the two products is left to the caller.
struct MlpCall {
  const char* op;
  Activation activation;
  std::optional<Gemm> gemm;
  Operands first, second;                       // second without x, which is what the first gives
  int64_t tokens, pairs, experts, inner, rows;  // pairs: of a token
  Tensor x, w13, w2, weights, ids, y;
  bool adds;  // to y, in float32
};

inline MlpCall check_mlp(const OptTensor& y, const Tensor& x, const Tensor& w13, const Tensor& w2,
                         const Tensor& weights, const Tensor& ids, const std::string& activation,
                         const std::string& gemm) {
  const char* const op = y ? "moe_mlp_" : "moe_mlp";
  MlpCall call;
  call.op = op;
  call.adds = y.has_value();
  call.activation = check::choice(op, "activation", activation, kActivations);
  call.gemm = check::choice(op, "gemm", gemm, kGemms);
  const Type type = check::float_type(op, "x", x);
  call.tokens = check_rows(op, "x", x, int64_t{1} << 50);
  const int64_t cols = x.size(x.dim() - 1), factor = is_gated(call.activation) ? 2 : 1;
  call.w2 = check_experts(op, "w2", w2, x, cols, check::kAny);
  call.inner = w2.size(2);
  call.w13 = check_experts(op, "w13", w13, x, factor * call.inner, cols);
  EFFK_CHECK(w13.size(0) == w2.size(0), op, "w13 has ", w13.size(0), " experts; wanted w2's ", w2.size(0));
  check::index_type(op, "ids", ids);
  EFFK_CHECK(ids.dim() >= 1, op, "ids has shape []; wanted at least one dimension");
  check_leading(op, "ids", ids, "x", x);
  check_rows(op, "ids", ids, kMaxPairs);
  check::device(op, "ids", ids, "x", x);
  check_weights(op, weights, "ids", ids);
  call.experts = w2.size(0);
  call.rows = cols;
  call.pairs = ids.size(ids.dim() - 1);
  call.x = as_rows(x, call.tokens, cols);
  call.ids = as_contiguous(ids);
  call.weights = as_contiguous(weights);
  if (y) {
    check::dtype(op, "y", *y, {ScalarType::Float});
    EFFK_CHECK(std::equal(y->sizes().begin(), y->sizes().end(), x.sizes().begin(), x.sizes().end()), op, "y has shape ",
               check::str(y->sizes()), "; wanted x's, ", check::str(x.sizes()));
    check::contiguous(op, "y", *y);
    check::device(op, "y", *y, "x", x);
  }
  call.y = y ? *y : empty_like_device(x, with_last(x, cols));
  call.first = {type, cols, call.x.const_data_ptr(), call.x.stride(0), nullptr, nullptr, 0, 0};
  call.second = {type, call.inner, nullptr, call.inner, nullptr, nullptr, 0, 0};
  point_to_w(call.first, call.w13);
  point_to_w(call.second, call.w2);
  return call;
}

}  // namespace
}  // namespace effk::moe
