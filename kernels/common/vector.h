// Vectors of floats as kernels for any width of them use: V, of kWidth floats; zero(), splat(f), fma(x, y, z) = x * y +
// z, sum(v); load(p) and store(p, v) of kWidth elements of any type; load(p, n) and store(p, v, n) of n < kWidth, the
// others being 0 and left alone; load_upto() and store_upto() of any n; transpose(V (&)[kWidth]); transpose_quads(V*)
// of four vectors: number i of a vector's quad (four neighbours) L goes to quad L of vector i; kOperand<T>, operand(p),
// operand(p, n) and dot(x, y, z): as many elements of T as an instruction multiplies, and the sum of z and their
// products by lanes; store_sums(p, V (&)[4]): the sums of four vectors.
// Included by vector_<level>.h, which has all but what is here.
#pragma once

namespace effk {
namespace {

template <class T>
inline V load_upto(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load(p, n) : zero();
}
template <class T>
inline void store_upto(T* p, V v, int64_t n) {
  if (n >= kWidth)
    store(p, v);
  else if (n > 0)
    store(p, v, n);
}

}  // namespace
}  // namespace effk
