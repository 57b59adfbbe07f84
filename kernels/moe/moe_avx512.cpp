// moe with AVX-512. Products of bfloat16 numbers are made two at a time by vdpbf16ps.
#include <cstring>

#include "../common/cpu.h"
#include "../common/vector_avx512.h"

namespace effk::moe {
namespace {

constexpr int kDotRows = 4, kDotTokens = 6, kDenseRows = 24, kMostVectors = 4;

using Pair = uint32_t;  // two neighbours of a sum, as vdpbf16ps takes them
template <class T>
struct ElementOf {
  using type = float;
};
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
template <class T>
using Element = typename ElementOf<T>::type;
template <class T>
constexpr int kSteps = 1;
template <>
constexpr int kSteps<BFloat16> = 2;

inline V lanes(const float* p) { return load(p); }
inline __m512bh lanes(const Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline V broadcast(const float* p) { return splat(*p); }
inline __m512bh broadcast(const Pair* p) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p)); }
template <class T>
inline V columns(const T* p, int64_t n) {
  return load_upto(p, n);
}
inline V columns(const BFloat16* p, int64_t n) {
  return n >= 32 ? _mm512_loadu_ps(p) : _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

inline void store_columns(BFloat16* to, V v, int64_t n) {
  if (n >= 32)
    _mm512_storeu_ps(to, v);
  else
    _mm512_mask_storeu_epi16(to, (1u << n) - 1, _mm512_castps_si512(v));
}
template <class T>
inline V element(const float* p, int64_t stride) {
  if constexpr (kSteps<T> == 2) {
    const __m512i low = _mm512_cvtepu16_epi32(to_bfloat16(load(p)));
    const __m512i high = _mm512_cvtepu16_epi32(to_bfloat16(stride ? load(p + stride) : zero()));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  } else {
    T rounded[kWidth];
    store(rounded, load(p));
    return load(rounded);
  }
}

}  // namespace
}  // namespace effk::moe

#include "vector.h"

namespace effk::moe {

constinit const Cpu cpu_avx512 = {kWidth, panel_bytes, tiles, pack, linear, up, down, wgrad, route, combine};

}  // namespace effk::moe
