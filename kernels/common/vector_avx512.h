// The words of vector.h with AVX-512; products of bfloat16 numbers are made two at a time by vdpbf16ps where a file's
// flags allow that.
#pragma once

#include "avx512.h"

namespace effk {
namespace {

using V = __m512;
constexpr int kWidth = 16;

inline V zero() { return _mm512_setzero_ps(); }
inline V splat(float f) { return _mm512_set1_ps(f); }
inline V fma(V x, V y, V z) { return _mm512_fmadd_ps(x, y, z); }
inline float sum(V v) { return _mm512_reduce_add_ps(v); }

template <class T>
inline V load(const T* p) {
  return load_floats(p, 0xffff);
}
template <class T>
inline V load(const T* p, int64_t n) {
  return load_floats(p, static_cast<__mmask16>((1u << n) - 1));
}
template <class T>
inline void store(T* p, V v) {
  store_floats(p, v);
}
template <class T>
inline void store(T* p, V v, int64_t n) {
  store_floats(p, static_cast<__mmask16>((1u << n) - 1), v);
}

template <class T>
constexpr int kOperand = kWidth;
#ifdef __AVX512BF16__
template <>
constexpr int kOperand<BFloat16> = 32;
#endif
template <class T>
inline V operand(const T* p) {
  return load(p);
}
template <class T>
inline V operand(const T* p, int64_t n) {
  return load(p, n);
}
inline V dot(V x, V y, V z) { return fma(x, y, z); }
#ifdef __AVX512BF16__
inline __m512bh operand(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh operand(const BFloat16* p, int64_t n) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
inline V dot(__m512bh x, __m512bh y, V z) { return _mm512_dpbf16_ps(z, x, y); }
#endif

inline void store_sums(float* p, const V (&v)[4]) {
  const V ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const V cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const V all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline void transpose_quads(V* v) {
  const V ab = _mm512_unpacklo_ps(v[0], v[1]), AB = _mm512_unpackhi_ps(v[0], v[1]);
  const V cd = _mm512_unpacklo_ps(v[2], v[3]), CD = _mm512_unpackhi_ps(v[2], v[3]);
  v[0] = _mm512_shuffle_ps(ab, cd, 0x44);
  v[1] = _mm512_shuffle_ps(ab, cd, 0xee);
  v[2] = _mm512_shuffle_ps(AB, CD, 0x44);
  v[3] = _mm512_shuffle_ps(AB, CD, 0xee);
}

inline void transpose(V (&rows)[kWidth]) {
  V halves[16];
  // Then rows[4 * i + c] is of rows 4i to 4i + 3 the columns c, c + 4, c + 8 and c + 12, four numbers each.
  for (int i = 0; i < 4; ++i) transpose_quads(rows + 4 * i);
  for (int i = 0; i < 2; ++i)
    for (int c = 0; c < 4; ++c) {
      halves[8 * i + c] = _mm512_shuffle_f32x4(rows[8 * i + c], rows[8 * i + 4 + c], 0x88);      // c, c + 8
      halves[8 * i + 4 + c] = _mm512_shuffle_f32x4(rows[8 * i + c], rows[8 * i + 4 + c], 0xdd);  // c + 4, c + 12
    }
  for (int c = 0; c < 8; ++c) {
    rows[c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0x88);
    rows[8 + c] = _mm512_shuffle_f32x4(halves[c], halves[8 + c], 0xdd);
  }
}

}  // namespace
}  // namespace effk

#include "vector.h"
