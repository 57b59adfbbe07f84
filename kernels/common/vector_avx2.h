// The words of vector.h with AVX2.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "float_bits.h"

namespace effk {
namespace {

using V = __m256;
constexpr int kWidth = 8;

inline V zero() { return _mm256_setzero_ps(); }
inline V splat(float f) { return _mm256_set1_ps(f); }
inline V fma(V x, V y, V z) { return _mm256_fmadd_ps(x, y, z); }
inline float sum(V v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline V load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline void store(Half* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// To nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* p, V v) {
  const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

template <class T>
inline V load(const T* p, int64_t n) {
  T room[kWidth] = {};
  std::memcpy(room, p, n * sizeof(T));
  return load(room);
}
template <class T>
inline void store(T* p, V v, int64_t n) {
  T room[kWidth];
  store(room, v);
  std::memcpy(p, room, n * sizeof(T));
}

template <class T>
constexpr int kOperand = kWidth;
template <class T>
inline V operand(const T* p) {
  return load(p);
}
template <class T>
inline V operand(const T* p, int64_t n) {
  return load(p, n);
}
inline V dot(V x, V y, V z) { return fma(x, y, z); }

inline void store_sums(float* p, const V (&v)[4]) {
  const V ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
  const V cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
  const V all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

inline void transpose_quads(V* v) {
  const V ab = _mm256_unpacklo_ps(v[0], v[1]), AB = _mm256_unpackhi_ps(v[0], v[1]);
  const V cd = _mm256_unpacklo_ps(v[2], v[3]), CD = _mm256_unpackhi_ps(v[2], v[3]);
  v[0] = _mm256_shuffle_ps(ab, cd, 0x44);
  v[1] = _mm256_shuffle_ps(ab, cd, 0xee);
  v[2] = _mm256_shuffle_ps(AB, CD, 0x44);
  v[3] = _mm256_shuffle_ps(AB, CD, 0xee);
}

inline void transpose(V (&rows)[kWidth]) {
  for (int i = 0; i < 2; ++i) transpose_quads(rows + 4 * i);
  for (int i = 0; i < 4; ++i) {
    const V low = rows[i], high = rows[4 + i];
    rows[i] = _mm256_permute2f128_ps(low, high, 0x20);
    rows[4 + i] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

}  // namespace
}  // namespace effk

#include "vector.h"
