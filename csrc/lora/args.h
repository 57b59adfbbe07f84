// The argument checks of lora, shared by its CPU and CUDA sides.
#pragma once

#include <algorithm>

#include "../../kernels/lora/lora.h"
#include "../common/check.h"

namespace effk::lora {
namespace {

constexpr int64_t kMaxSide = int64_t{1} << 30;  // of a matrix: bounds what sizes can multiply to

using TensorList = std::vector<Tensor>;

inline std::string at(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }
constexpr size_t kAlone = SIZE_MAX;  // the index of a tensor that isn't in a list

// A list of adapters and their gates. ids has the sizes of tokens and then the number of pairs.
inline void check_pairs(const char* op, const char* ids_arg, const Tensor& ids, const char* gates_arg,
                        const Tensor& gates) {
  check::index_type(op, ids_arg, ids);
  check::dtype(op, gates_arg, gates, {ScalarType::Float});
  const auto have = gates.sizes(), want = ids.sizes();
  EFFK_CHECK(have.size() == want.size() && std::equal(have.begin(), have.end(), want.begin()), op, gates_arg,
             " has shape ", check::str(have), "; wanted ", ids_arg, "'s ", check::str(want));
  EFFK_CHECK(!want.empty() && want[want.size() - 1] <= kMaxPairs, op, ids_arg, " has shape ", check::str(want),
             "; wanted at most ", kMaxPairs, " pairs");
  check::device(op, gates_arg, gates, ids_arg, ids);
}

inline void check_ranks(const char* op, const OptTensor& ranks, int64_t adapters, const Tensor& ids) {
  if (!ranks) return;
  check::index_type(op, "ranks", *ranks);
  check::shape(op, "ranks", *ranks, {adapters});
  check::device(op, "ranks", *ranks, "ids", ids);
}

// a [E, R, K] and b [E, N, R], contiguous, of the type and device of what they are for.
inline void check_adapters(const char* op, const char* a_arg, const Tensor& a, const char* b_arg, const Tensor& b,
                           const char* for_arg, const Tensor& for_tensor, int64_t rows, int64_t cols) {
  check::dtype(op, a_arg, a, {for_tensor.scalar_type()});
  check::dtype(op, b_arg, b, {for_tensor.scalar_type()});
  check::shape(op, a_arg, a, {check::kAny, check::kAny, cols});
  check::shape(op, b_arg, b, {a.size(0), rows, a.size(1)});
  EFFK_CHECK(a.size(1) <= kMaxSide && a.size(0) <= kMaxSide, op, a_arg, " has shape ", check::str(a.sizes()),
             "; wanted at most 2^30 adapters and ranks");
  check::contiguous(op, a_arg, a);
  check::contiguous(op, b_arg, b);
  check::device(op, a_arg, a, for_arg, for_tensor);
  check::device(op, b_arg, b, for_arg, for_tensor);
}

// [N, K] with columns that follow each other and rows that don't overlap.
inline void check_weight(const char* op, const std::string& arg, const Tensor& w) {
  check::float_type(op, arg.c_str(), w);
  check::shape(op, arg.c_str(), w, {check::kAny, check::kAny});
  const int64_t rows = w.size(0), cols = w.size(1);
  EFFK_CHECK(rows <= kMaxSide && cols <= kMaxSide, op, arg, " has shape ", check::str(w.sizes()),
             "; wanted at most 2^30 rows and columns");
  EFFK_CHECK((cols <= 1 || w.stride(1) == 1) && (rows <= 1 || w.stride(0) >= cols), op, arg, " has strides [",
             w.stride(0), ", ", w.stride(1), "]; wanted rows that are contiguous and don't overlap");
}

// Of a tensor that isn't empty.
struct Extent {
  const char *begin, *end;
  const char* list;
  size_t index;
  bool written;
  std::string name() const { return index == kAlone ? list : at(list, index); }
};

inline void add_extent(std::vector<Extent>& extents, const char* list, size_t index, const Tensor& t, int64_t elements,
                       bool written = false) {
  if (t.numel() == 0) return;
  const auto* begin = static_cast<const char*>(t.const_data_ptr());
  extents.push_back({begin, begin + elements * static_cast<int64_t>(t.element_size()), list, index, written});
}

// What is written shares no memory with anything else.
inline void check_disjoint(const char* op, std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& x, const Extent& y) { return x.begin < y.begin; });
  const Extent *last = nullptr, *last_written = nullptr;  // those that reach furthest
  for (const Extent& e : extents) {
    const Extent* const other = e.written ? last : last_written;
    EFFK_CHECK(!other || other->end <= e.begin, op, e.name(), " and ", other->name(),
               " share memory; wanted tensors of their own");
    if (!last || e.end > last->end) last = &e;
    if (e.written && (!last_written || e.end > last_written->end)) last_written = &e;
  }
}

// The layers of a checked call.
struct MergeCall {
  Type type = Type::f32;
  int64_t adapters = 0;
  int64_t rank = 0;        // the largest
  bool with_base = false;  // an empty layer's pointer is null all the same
  std::vector<Layer> layers;
};

inline MergeCall check_merge(const char* op, const TensorList& w, const TensorList& a, const TensorList& b,
                             const Tensor& ids, const std::optional<TensorList>& base, const OptTensor& ranks,
                             std::initializer_list<std::pair<const char*, const Tensor&>> lists) {
  EFFK_CHECK(a.size() == w.size(), op, "a has ", a.size(), " tensors; wanted w's ", w.size());
  EFFK_CHECK(b.size() == w.size(), op, "b has ", b.size(), " tensors; wanted w's ", w.size());
  EFFK_CHECK(!base || base->size() == w.size(), op, "base has ", base->size(), " tensors; wanted w's ", w.size());
  MergeCall call;
  call.with_base = base.has_value();
  call.layers.reserve(w.size());
  std::vector<Extent> extents;
  extents.reserve(4 * w.size());
  for (size_t i = 0; i < w.size(); ++i) {
    const std::string name = at("w", i);
    check_weight(op, name, w[i]);
    EFFK_CHECK(w[i].scalar_type() == w[0].scalar_type(), op, name, " has dtype ", check::str(w[i].scalar_type()),
               "; wanted w[0]'s ", check::str(w[0].scalar_type()));
    check::device(op, name.c_str(), w[i], "ids", ids);
    const int64_t rows = w[i].size(0), cols = w[i].size(1);
    check_adapters(op, at("a", i).c_str(), a[i], at("b", i).c_str(), b[i], name.c_str(), w[i], rows, cols);
    EFFK_CHECK(a[i].size(0) == a[0].size(0), op, at("a", i), " has shape ", check::str(a[i].sizes()),
               "; wanted a[0]'s ", a[0].size(0), " adapters");
    Layer layer{
        w[i].mutable_data_ptr(), nullptr, a[i].const_data_ptr(), b[i].const_data_ptr(), rows, cols, a[i].size(1),
        w[i].stride(0),          0};
    const auto elements = [&](const Tensor& t) { return (rows - 1) * t.stride(0) + cols; };
    add_extent(extents, "w", i, w[i], elements(w[i]), true);
    add_extent(extents, "a", i, a[i], a[i].numel());
    add_extent(extents, "b", i, b[i], b[i].numel());
    if (base) {
      const Tensor& from = (*base)[i];
      check_weight(op, at("base", i), from);
      check::dtype(op, at("base", i).c_str(), from, {w[i].scalar_type()});
      check::shape(op, at("base", i).c_str(), from, {rows, cols});
      check::device(op, at("base", i).c_str(), from, name.c_str(), w[i]);
      add_extent(extents, "base", i, from, elements(from));
      layer.base = from.const_data_ptr();
      layer.base_stride = from.stride(0);
    }
    call.rank = std::max(call.rank, layer.rank);
    call.layers.push_back(layer);
  }
  if (w.empty()) return call;
  call.type = type_of(w[0].scalar_type());
  call.adapters = a[0].size(0);
  check_ranks(op, ranks, call.adapters, ids);
  const auto add_vector = [&](const char* name, const Tensor& t) {
    add_extent(extents, name, kAlone, t, (t.size(0) - 1) * t.stride(0) + 1);
  };
  for (const auto& [name, t] : lists) add_vector(name, t);
  if (ranks) add_vector("ranks", *ranks);
  check_disjoint(op, extents);
  return call;
}

// Lists of pairs of a merge: of one dimension.
inline void check_list(const char* op, const char* ids_arg, const Tensor& ids, const char* gates_arg,
                       const Tensor& gates, const Tensor& first_ids) {
  check::shape(op, ids_arg, ids, {check::kAny});
  check_pairs(op, ids_arg, ids, gates_arg, gates);
  check::device(op, ids_arg, ids, "ids", first_ids);
}

// A checked call of lora_apply with the tensors that its pointers need; the groups are left to the caller.
struct ApplyCall {
  Apply args;
  Tensor x, ids, gates, y_in, y;
  int64_t adapters, pairs;  // pairs of a token
};

inline ApplyCall check_apply(const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& ids, const Tensor& gates,
                             const OptTensor& y, const OptTensor& ranks) {
  constexpr const char* op = "lora_apply";
  const Type type = check::float_type(op, "x", x);
  EFFK_CHECK(x.dim() >= 1, op, "x has shape []; wanted at least one dimension");
  check::shape(op, "b", b, {check::kAny, check::kAny, check::kAny});
  const int64_t rows = b.size(1), cols = x.size(x.dim() - 1);
  check_adapters(op, "a", a, "b", b, "x", x, rows, cols);
  EFFK_CHECK(rows <= kMaxSide && cols <= kMaxSide, op, "b and x make a weight of [", rows, ", ", cols,
             "]; wanted at most 2^30 each way");
  check_pairs(op, "ids", ids, "gates", gates);
  const auto lead = x.sizes(), have = ids.sizes();
  EFFK_CHECK(have.size() == lead.size() && std::equal(have.begin(), have.end() - 1, lead.begin()), op, "ids has shape ",
             check::str(have), "; wanted x's leading sizes and the number of pairs, x has shape ", check::str(lead));
  check::device(op, "ids", ids, "x", x);
  check_ranks(op, ranks, a.size(0), ids);
  const int64_t most = (int64_t{1} << 50) / std::max<int64_t>({64, rows, cols, ids.size(ids.dim() - 1) * a.size(1)});
  const int64_t tokens = check::tokens(op, "x", x, most);
  ApplyCall call;
  call.adapters = a.size(0);
  call.pairs = ids.size(ids.dim() - 1);
  call.x = as_rows(x, tokens, cols);
  call.ids = as_contiguous(ids);
  call.gates = as_contiguous(gates);
  std::vector<int64_t> sizes(lead.begin(), lead.end());
  sizes.back() = rows;
  if (y) {
    check::dtype(op, "y", *y, {x.scalar_type()});
    const auto y_sizes = y->sizes();
    EFFK_CHECK(y_sizes.size() == sizes.size() && std::equal(sizes.begin(), sizes.end(), y_sizes.begin()), op,
               "y has shape ", check::str(y_sizes), "; wanted ", check::str(sizes));
    check::device(op, "y", *y, "x", x);
    call.y_in = as_rows(*y, tokens, rows);
  }
  call.y = empty_like_device(x, sizes);
  call.args = Apply{type,
                    tokens,
                    cols,
                    rows,
                    a.size(1),
                    call.x.const_data_ptr(),
                    call.x.stride(0),
                    a.const_data_ptr(),
                    b.const_data_ptr(),
                    y ? call.y_in.const_data_ptr() : nullptr,
                    y ? call.y_in.stride(0) : 0,
                    call.y.mutable_data_ptr(),
                    nullptr,
                    0,
                    nullptr,
                    nullptr,
                    nullptr};
  return call;
}

}  // namespace
}  // namespace effk::lora
