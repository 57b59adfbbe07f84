// The argument checks of vq, shared by its CPU and CUDA sides. None looks at the contents of a tensor.
#pragma once

#include <algorithm>
#include <cmath>

#include "../../kernels/vq/vq.h"
#include "../common/check.h"

namespace effk::vq {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 30;  // of a tensor
constexpr int64_t kMaxElements = int64_t{1} << 50;
constexpr int64_t kMaxWords = int64_t{1} << 15;
constexpr int64_t kMaxSubspaces = int64_t{1} << 16;  // of a score
constexpr int64_t kMaxSubspacesInt8 = 256;

constexpr std::pair<const char*, bool> kTables[] = {{"float32", false}, {"int8", true}};  // whether of 8 bits

inline void check_sides(const char* op, const char* arg, const Tensor& t) {
  for (const int64_t size : t.sizes())
    EFFK_CHECK(size <= kMaxSide, op, arg, " has shape ", check::str(t.sizes()), "; wanted at most 2^30 each way");
}

// Sizes of a result, each at most 2^30: what they multiply to is a number.
inline void check_result(const char* op, const char* arg, std::initializer_list<int64_t> sizes) {
  int64_t n = 1;
  for (const int64_t size : sizes)
    if (size == 0) return;
  for (const int64_t size : sizes) {
    EFFK_CHECK(n <= kMaxElements / size, op, "with ", arg, ", the result has shape ",
               check::str(std::vector<int64_t>(sizes)), "; wanted at most 2^50 elements");
    n *= size;
  }
}

inline void strides_of(const Tensor& t, int64_t n, int64_t* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = t.stride(i);
}

// Query heads (the second size of `queries`) to a key head.
inline int64_t check_groups(const char* op, const char* arg, const Tensor& queries, int64_t heads) {
  EFFK_CHECK(heads >= 1 && queries.size(1) >= 1 && queries.size(1) % heads == 0, op, arg, " has ", queries.size(1),
             " heads; wanted a multiple of the keys' ", heads);
  return queries.size(1) / heads;
}

inline Tensor check_codebook(const char* op, const Tensor& codebook, int64_t heads, int64_t dim, const char* like_arg,
                             const Tensor& like) {
  check::dtype(op, "codebook", codebook, {ScalarType::Float});
  check::shape(op, "codebook", codebook, {check::kAny, check::kAny, check::kAny, check::kAny});
  check_sides(op, "codebook", codebook);
  const int64_t words = codebook.size(2);
  EFFK_CHECK(codebook.size(0) == heads && codebook.size(1) * codebook.size(3) == dim && dim >= 1 && words >= 1 &&
                 words <= kMaxWords,
             op, "codebook has shape ", check::str(codebook.sizes()), "; wanted [", heads,
             ", m, C, D / m] of D = ", dim, ", C from 1 to ", kMaxWords);
  check::device(op, "codebook", codebook, like_arg, like);
  return as_contiguous(codebook);
}

// A matrix [dim, dim] a head, or none.
inline OptTensor check_square(const char* op, const char* arg, const OptTensor& t, int64_t heads, int64_t dim,
                              const char* like_arg, const Tensor& like) {
  if (!t) return t;
  check::dtype(op, arg, *t, {ScalarType::Float});
  check::shape(op, arg, *t, {heads, dim, dim});
  check::device(op, arg, *t, like_arg, like);
  return as_contiguous(*t);
}

inline const float* floats(const OptTensor& t) { return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr; }

struct EncodeCall {
  Encode args;
  Tensor keys, codebook;
  OptTensor chol;
  Tensor codes;
};

inline EncodeCall check_encode(const Tensor& keys, const Tensor& codebook, const OptTensor& chol, bool pack) {
  constexpr const char* op = "vq_encode";
  EncodeCall call;
  Encode& a = call.args;
  a.type = check::float_type(op, "keys", keys);
  check::shape(op, "keys", keys, {check::kAny, check::kAny, check::kAny, check::kAny});
  check_sides(op, "keys", keys);
  a.batch = keys.size(0), a.heads = keys.size(1), a.keys = keys.size(2), a.dim = keys.size(3);
  call.codebook = check_codebook(op, codebook, a.heads, a.dim, "keys", keys);
  a.subspaces = codebook.size(1), a.words = codebook.size(2);
  call.chol = check_square(op, "chol", chol, a.heads, a.dim, "keys", keys);
  check_result(op, "keys", {a.batch, a.heads, a.keys, a.dim});
  EFFK_CHECK(!pack || (a.words <= 16 && a.subspaces % 2 == 0), op, "pack with a codebook of ", a.subspaces,
             " subspaces of ", a.words, " words; wanted an even number of at most 16 words");
  a.codes = pack ? Codes::packed4 : a.words <= 256 ? Codes::u8 : Codes::i16;
  call.keys = with_unit_last(keys);
  call.codes = empty_like_device(keys, {a.batch, a.heads, a.keys, pack ? a.subspaces / 2 : a.subspaces},
                                 a.codes == Codes::i16 ? ScalarType::Short : ScalarType::Byte);
  a.k = call.keys.const_data_ptr();
  strides_of(call.keys, 3, a.k_stride);
  a.codebook = floats(call.codebook);
  a.chol = floats(call.chol);
  a.out = call.codes.mutable_data_ptr();
  return call;
}

struct LutCall {
  Lut args;
  Tensor q, codebook;
  OptTensor inv;
  Tensor out;
};

inline LutCall check_lut(const Tensor& q, const Tensor& codebook, const OptTensor& inv) {
  constexpr const char* op = "vq_lut";
  LutCall call;
  Lut& a = call.args;
  a.type = check::float_type(op, "q", q);
  check::shape(op, "q", q, {check::kAny, check::kAny, check::kAny});
  check_sides(op, "q", q);
  a.batch = q.size(0), a.heads = q.size(1), a.dim = q.size(2);
  const int64_t key_heads = codebook.dim() > 0 ? codebook.size(0) : 0;
  call.codebook = check_codebook(op, codebook, key_heads, a.dim, "q", q);
  a.subspaces = codebook.size(1), a.words = codebook.size(2);
  a.group = check_groups(op, "q", q, key_heads);
  call.inv = check_square(op, "inv", inv, key_heads, a.dim, "q", q);
  check_result(op, "q", {a.batch, a.heads, a.subspaces, a.words});
  call.q = with_unit_last(q);
  call.out = empty_like_device(q, {a.batch, a.heads, a.subspaces, a.words}, ScalarType::Float);
  a.q = call.q.const_data_ptr();
  strides_of(call.q, 2, a.q_stride);
  a.codebook = floats(call.codebook);
  a.inv = floats(call.inv);
  a.out = static_cast<float*>(call.out.mutable_data_ptr());
  return call;
}

// What vq_score and vq_topk read; lens is left to the caller, which must clamp or check it.
struct Scored {
  Score args;
  Tensor lut, codes;
  OptTensor lens;
};

inline Scored check_codes(const char* op, const Tensor& lut, const Tensor& codes, const OptTensor& lens,
                          const std::string& table) {
  Scored call;
  Score& a = call.args;
  check::dtype(op, "lut", lut, {ScalarType::Float});
  check::shape(op, "lut", lut, {check::kAny, check::kAny, check::kAny, check::kAny});
  check_sides(op, "lut", lut);
  a.batch = lut.size(0), a.heads = lut.size(1), a.subspaces = lut.size(2), a.words = lut.size(3);
  EFFK_CHECK(a.subspaces >= 1 && a.subspaces <= kMaxSubspaces && a.words >= 1 && a.words <= kMaxWords, op,
             "lut has shape ", check::str(lut.sizes()), "; wanted [B, H, m, C], 1 to ", kMaxSubspaces, " of m, 1 to ",
             kMaxWords, " of C");
  check::dtype(op, "codes", codes, {a.words <= 256 ? ScalarType::Byte : ScalarType::Short});
  check::shape(op, "codes", codes, {a.batch, check::kAny, check::kAny, check::kAny});
  check_sides(op, "codes", codes);
  check::device(op, "codes", codes, "lut", lut);
  a.keys = codes.size(2);
  const bool packed = a.words <= 16 && a.subspaces % 2 == 0 && codes.size(3) == a.subspaces / 2;
  EFFK_CHECK(packed || codes.size(3) == a.subspaces, op, "codes has shape ", check::str(codes.sizes()),
             "; wanted lut's ", a.subspaces,
             " subspaces as the last size, or half of them where 16 words of an even number are packed");
  a.codes = packed ? Codes::packed4 : a.words <= 256 ? Codes::u8 : Codes::i16;
  a.group = check_groups(op, "lut", lut, codes.size(1));
  if (lens) {
    check::index_type(op, "lens", *lens);
    check::shape(op, "lens", *lens, {a.batch});
    check::device(op, "lens", *lens, "lut", lut);
  }
  a.int8_table = check::choice(op, "table", table, kTables);
  EFFK_CHECK(!a.int8_table || a.subspaces <= kMaxSubspacesInt8, op, "lut has ", a.subspaces,
             " subspaces; wanted at most ", kMaxSubspacesInt8, " with table='int8'");
  check_result(op, "codes", {a.batch, a.heads, a.keys});
  call.lut = as_contiguous(lut);
  const bool follow = (codes.size(3) == 1 || codes.stride(3) == 1) && (a.keys <= 1 || codes.stride(2) == codes.size(3));
  call.codes = follow ? codes : as_contiguous(codes);
  call.lens = lens;
  a.lut = floats(call.lut);
  a.code = call.codes.const_data_ptr();
  strides_of(call.codes, 2, a.code_stride);
  a.lens = nullptr;
  a.out = nullptr;
  return call;
}

struct ScoreCall : Scored {
  Tensor out;
};

inline ScoreCall check_score(const Tensor& lut, const Tensor& codes, const OptTensor& lens, const std::string& table) {
  ScoreCall call{check_codes("vq_score", lut, codes, lens, table), {}};
  Score& a = call.args;
  call.out = empty_like_device(lut, {a.batch, a.heads, a.keys}, ScalarType::Float);
  a.out = static_cast<float*>(call.out.mutable_data_ptr());
  return call;
}

struct TopKCall {
  Scored scored;
  TopK args;  // its score is a copy of scored.args
  Tensor idx, count;
};

inline TopKCall check_topk(const Tensor& lut, const Tensor& codes, int64_t k, const OptTensor& lens, int64_t sink,
                           int64_t window, bool union_group, const std::string& table) {
  constexpr const char* op = "vq_topk";
  TopKCall call{check_codes(op, lut, codes, lens, table), {}, {}, {}};
  const Score& score = call.scored.args;
  EFFK_CHECK(k >= 0, op, "k is ", k, "; wanted 0 or more");
  EFFK_CHECK(sink >= 0, op, "sink is ", sink, "; wanted 0 or more");
  EFFK_CHECK(window >= 0, op, "window is ", window, "; wanted 0 or more");
  TopK& a = call.args;
  a = {score,
       std::min(k, score.keys),
       std::min(sink, score.keys),
       std::min(window, score.keys),
       union_group,
       0,
       nullptr,
       nullptr};
  a.cap = std::min(score.keys, a.sink + a.window + a.k * (union_group ? score.group : 1));
  const int64_t lists = union_group ? score.heads / score.group : score.heads;
  call.idx = empty_like_device(lut, {score.batch, lists, a.cap}, ScalarType::Long);
  call.count = empty_like_device(lut, {score.batch, lists}, ScalarType::Long);
  a.idx = static_cast<int64_t*>(call.idx.mutable_data_ptr());
  a.count = static_cast<int64_t*>(call.count.mutable_data_ptr());
  return call;
}

// idx and count are left to the caller, which must clamp or check them.
struct AttendCall {
  Attend args;
  Tensor q, k, v;
  OptTensor idx, count;
  Tensor out, lse;
};

// keys_anywhere: k and v needn't be where q is; the caller looks at where they are.
inline AttendCall check_attend(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& idx,
                               const OptTensor& count, std::optional<double> scale, bool keys_anywhere = false) {
  constexpr const char* op = "vq_attend";
  AttendCall call;
  Attend& a = call.args;
  a.type = check::float_type(op, "q", q);
  check::shape(op, "q", q, {check::kAny, check::kAny, check::kAny});
  check_sides(op, "q", q);
  a.batch = q.size(0), a.heads = q.size(1), a.dim = q.size(2);
  check::dtype(op, "k", k, {q.scalar_type()});
  check::shape(op, "k", k, {a.batch, check::kAny, check::kAny, a.dim});
  check_sides(op, "k", k);
  EFFK_CHECK(a.dim >= 1, op, "q has shape ", check::str(q.sizes()), "; wanted at least 1 as the last size");
  const int64_t key_heads = k.size(1);
  a.keys = k.size(2);
  check::dtype(op, "v", v, {q.scalar_type()});
  check::shape(op, "v", v, {a.batch, key_heads, a.keys, check::kAny});
  check_sides(op, "v", v);
  if (!keys_anywhere) {
    check::device(op, "k", k, "q", q);
    check::device(op, "v", v, "q", q);
  }
  a.value_dim = v.size(3);
  a.group = check_groups(op, "q", q, key_heads);
  check_result(op, "v", {a.batch, a.heads, a.value_dim});
  a.lists = key_heads, a.cap = a.keys;
  if (idx) {
    check::index_type(op, "idx", *idx);
    check::shape(op, "idx", *idx, {a.batch, check::kAny, check::kAny});
    check_sides(op, "idx", *idx);
    a.lists = idx->size(1), a.cap = idx->size(2);
    EFFK_CHECK(a.lists == key_heads || a.lists == a.heads, op, "idx has shape ", check::str(idx->sizes()), "; wanted ",
               key_heads, " or ", a.heads, " lists, one of each key head or query head");
    check::device(op, "idx", *idx, "q", q);
  }
  if (count) {
    check::index_type(op, "count", *count);
    if (idx)
      check::shape(op, "count", *count, {a.batch, a.lists});
    else
      check::shape(op, "count", *count, {a.batch});
    check::device(op, "count", *count, "q", q);
  }
  call.q = with_unit_last(q);
  call.k = with_unit_last(k);
  call.v = with_unit_last(v);
  call.idx = idx;
  call.count = count;
  call.out = empty_like_device(q, {a.batch, a.heads, a.value_dim});
  call.lse = empty_like_device(q, {a.batch, a.heads}, ScalarType::Float);
  a.q = call.q.const_data_ptr();
  a.k = call.k.const_data_ptr();
  a.v = call.v.const_data_ptr();
  strides_of(call.q, 2, a.q_stride);
  strides_of(call.k, 3, a.k_stride);
  strides_of(call.v, 3, a.v_stride);
  a.idx = a.count = nullptr;
  a.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(a.dim))));
  a.out = call.out.mutable_data_ptr();
  a.lse = static_cast<float*>(call.lse.mutable_data_ptr());
  return call;
}

struct WropeCall {
  Wrope args;  // without cos and sin, which are left to the caller: float32, or of q's type
  Tensor q, cos, sin, out;
};

inline WropeCall check_wrope(const Tensor& q, const Tensor& cos, const Tensor& sin) {
  constexpr const char* op = "vq_wrope";
  WropeCall call;
  Wrope& a = call.args;
  a.type = check::float_type(op, "q", q);
  EFFK_CHECK(q.dim() >= 1 && q.size(q.dim() - 1) % 2 == 0, op, "q has shape ", check::str(q.sizes()),
             "; wanted an even last size");
  check_sides(op, "q", q);
  a.dim = q.size(q.dim() - 1);
  a.rows = check::tokens(op, "q", q, kMaxElements / std::max<int64_t>(1, a.dim));
  for (const auto& [arg, t] : {std::pair<const char*, const Tensor&>{"cos", cos}, {"sin", sin}}) {
    check::dtype(op, arg, t, {ScalarType::Float, q.scalar_type()});
    check::shape(op, arg, t, {a.dim / 2});
    check::device(op, arg, t, "q", q);
  }
  call.q = as_rows(q, a.rows, a.dim);
  call.cos = as_contiguous(cos);
  call.sin = as_contiguous(sin);
  call.out = empty_like_device(q, std::vector<int64_t>(q.sizes().begin(), q.sizes().end()));
  a.q = call.q.const_data_ptr();
  a.stride = call.q.stride(0);
  a.cos = a.sin = nullptr;
  a.out = call.out.mutable_data_ptr();
  return call;
}

}  // namespace
}  // namespace effk::vq
