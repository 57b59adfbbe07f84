// Argument checks with messages that name the op, the argument, what came and what is wanted.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../../kernels/common/type.h"

namespace effk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

#define EFFK_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, "effk::", op, ": ", __VA_ARGS__)

inline Type type_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Half: return Type::f16;
    case ScalarType::BFloat16: return Type::bf16;
    default: return Type::i8;
  }
}

// A contiguous tensor on x's device, of x's dtype if none is given. Straight to the allocator: the dispatcher's way
// takes several times as long, which shows at one token.
inline Tensor empty_like_device(const Tensor& x, const std::vector<int64_t>& sizes,
                                std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  int32_t type, device_type, device_index;
  if (dtype)
    type = static_cast<int32_t>(torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype)));
  else
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  type, device_type, device_index, &handle));
  return Tensor(handle);
}

// Asks first: the dispatcher, which would find that there is nothing to do, takes longer than many checks.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A tensor whose elements follow each other in the last dimension; a copy where they don't.
inline Tensor with_unit_last(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : as_contiguous(t);
}

// Likewise, as a matrix.
inline Tensor as_rows(const Tensor& t, int64_t rows, int64_t cols) {
  return with_unit_last(t.dim() == 2 ? t : torch::stable::reshape(t, {rows, cols}));
}

namespace check {

constexpr int64_t kAny = -1;

inline std::string str(ScalarType t) {
  const std::string name = torch::headeronly::toString(t);
  static const std::pair<const char*, const char*> names[] = {
      {"Float", "float32"}, {"Double", "float64"}, {"Half", "float16"}, {"BFloat16", "bfloat16"}, {"Char", "int8"},
      {"Byte", "uint8"},    {"Short", "int16"},    {"Int", "int32"},    {"Long", "int64"},        {"Bool", "bool"}};
  for (const auto& [from, to] : names)
    if (name == from) return to;
  return name;
}

template <class Sizes>
std::string str(const Sizes& sizes) {
  std::string s = "[";
  for (size_t i = 0; i < static_cast<size_t>(sizes.size()); ++i)
    s += (i ? ", " : "") + (sizes[i] == kAny ? std::string("*") : std::to_string(sizes[i]));
  return s + "]";
}

inline void dtype(const char* op, const char* arg, const Tensor& t, std::initializer_list<ScalarType> wanted) {
  std::string list;
  for (ScalarType w : wanted) {
    if (t.scalar_type() == w) return;
    list += (list.empty() ? "" : ", ") + str(w);
  }
  EFFK_CHECK(false, op, arg, " has dtype ", str(t.scalar_type()), "; wanted ", list);
}

inline bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Half || t == ScalarType::BFloat16;
}

// Of a tensor that must have a float type.
inline Type float_type(const char* op, const char* arg, const Tensor& t) {
  dtype(op, arg, t, {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  return type_of(t.scalar_type());
}

inline void index_type(const char* op, const char* arg, const Tensor& t) {
  dtype(op, arg, t, {ScalarType::Int, ScalarType::Long});
}

// kAny matches every size.
inline void shape(const char* op, const char* arg, const Tensor& t, std::initializer_list<int64_t> wanted) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == wanted.size();
  size_t i = 0;
  for (int64_t w : wanted) {
    if (!same) break;
    same = w == kAny || sizes[i] == w;
    ++i;
  }
  EFFK_CHECK(same, op, arg, " has shape ", str(sizes), "; wanted ", str(std::vector<int64_t>(wanted)));
}

inline void device(const char* op, const char* arg, const Tensor& t, const char* ref_arg, const Tensor& ref) {
  int32_t types[2], indices[2];  // Tensor::device() translates them, which takes longer than to ask
  for (int i = 0; i < 2; ++i) {
    const AtenTensorHandle handle = (i ? ref : t).get();
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &types[i]));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &indices[i]));
  }
  EFFK_CHECK(types[0] == types[1] && indices[0] == indices[1], op, arg, " and ", ref_arg, " are on different devices");
}

inline void contiguous(const char* op, const char* arg, const Tensor& t) {
  EFFK_CHECK(t.is_contiguous(), op, arg, " must be contiguous");
}

// Product of all sizes but the last. An expanded tensor costs nothing, whatever its size; so that kernels can count
// bytes, the product has an end.
inline int64_t tokens(const char* op, const char* arg, const Tensor& t, int64_t most) {
  const auto sizes = t.sizes();
  int64_t n = 1;
  for (size_t i = 0; i + 1 < static_cast<size_t>(sizes.size()); ++i) {
    EFFK_CHECK(sizes[i] == 0 || n <= most / sizes[i], op, arg, " has shape ", str(sizes), "; wanted at most ", most,
               " tokens");
    n *= sizes[i];
  }
  return n;
}

// One of the names of a table of {name, value}.
template <class T, size_t N>
T choice(const char* op, const char* arg, const std::string& name, const std::pair<const char*, T> (&table)[N]) {
  std::string list;
  for (const auto& [key, value] : table) {
    if (name == key) return value;
    list += (list.empty() ? "" : ", ") + std::string(key);
  }
  EFFK_CHECK(false, op, arg, " is '", name, "'; wanted one of ", list);
  return table[0].second;
}

}  // namespace check
}  // namespace effk
