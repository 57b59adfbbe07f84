// What the CPU kernels of all families share. In an anonymous namespace: files for different CPU levels must not share
// code.
#pragma once

#include <new>
#include <type_traits>

#include "float_bits.h"
#include "type.h"

namespace effk {
namespace {

template <Type>
struct TypeOf;
template <>
struct TypeOf<Type::f32> {
  using type = float;
};
template <>
struct TypeOf<Type::f16> {
  using type = Half;
};
template <>
struct TypeOf<Type::bf16> {
  using type = BFloat16;
};
template <>
struct TypeOf<Type::i8> {
  using type = int8_t;
};

// Calls f with a null pointer of the C++ type of t.
template <class F>
inline void with_type(Type t, const F& f) {
  switch (t) {
    case Type::f32: return f(static_cast<float*>(nullptr));
    case Type::f16: return f(static_cast<Half*>(nullptr));
    case Type::bf16: return f(static_cast<BFloat16*>(nullptr));
    case Type::i8: return f(static_cast<int8_t*>(nullptr));
  }
}

// Calls f with a null pointer of the C++ type of a float type.
template <class F>
inline void with_float(Type t, const F& f) {
  with_type(t, [&]<class X>(X* x) {
    if constexpr (!std::is_same_v<X, int8_t>) f(x);
  });
}

// Calls f(integral constant n) for n from 1 to kMost.
template <int kMost, class F>
inline void with_count(int64_t n, const F& f) {
  if constexpr (kMost > 1)
    if (n < kMost) return with_count<kMost - 1>(n, f);
  f(std::integral_constant<int, kMost>());
}

// Memory for n Ts, aligned to a cache line. Throws std::bad_alloc.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n = 1) : data_(::operator new(n * sizeof(T), kAlign)) {}
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  T* get() const { return static_cast<T*>(data_); }
  T* operator->() const { return get(); }

 private:
  static constexpr std::align_val_t kAlign{64};
  void* data_;
};

}  // namespace
}  // namespace effk
