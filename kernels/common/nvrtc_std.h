// What kernels use of the standard headers, under the names of all of them, for NVRTC, which has none. It compiles one
// kernel at a time, for a GPU that the library has no code for: docs/nvrtc.md
#ifndef EFFK_NVRTC_STD
#define EFFK_NVRTC_STD

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long;  // as in the library, whose kernels have it in their names
using uint64_t = unsigned long;
using uintptr_t = unsigned long;

#define INT32_MAX 0x7fffffff
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

namespace std {

using ::memcpy;

template <class A, class B>
constexpr bool is_same_v = false;
template <class A>
constexpr bool is_same_v<A, A> = true;

template <class T>
struct Identity {
  using type = T;
};
template <class T>
using type_identity_t = typename Identity<T>::type;

template <class T>
struct WithoutPointer : Identity<T> {};
template <class T>
struct WithoutPointer<T*> : Identity<T> {};
template <class T>
using remove_pointer_t = typename WithoutPointer<T>::type;

template <class T>
struct WithoutReference : Identity<T> {};
template <class T>
struct WithoutReference<T&> : Identity<T> {};
template <class T>
using remove_reference_t = typename WithoutReference<T>::type;

template <class T>
struct numeric_limits;
template <>
struct numeric_limits<float> {
  static constexpr float infinity() { return __builtin_bit_cast(float, 0x7f800000); }
  static constexpr float quiet_NaN() { return __builtin_bit_cast(float, 0x7fc00000); }
  static constexpr float min() { return 0x1p-126f; }
};

}  // namespace std

#endif
