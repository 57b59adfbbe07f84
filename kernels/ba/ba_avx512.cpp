// ba with AVX-512.
#include <immintrin.h>
#include <math.h>

#include <cstdint>

namespace effk::ba {
namespace {

using V = __m512d;
constexpr int kWidth = 8;

inline V root(V v) { return _mm512_sqrt_pd(v); }

inline void transpose(const V (&rows)[8], V* columns) {
  V pairs[8], halves[8];
  for (int i = 0; i < 4; ++i) {
    pairs[i] = _mm512_unpacklo_pd(rows[2 * i], rows[2 * i + 1]);      // columns 0, 2, 4, 6
    pairs[4 + i] = _mm512_unpackhi_pd(rows[2 * i], rows[2 * i + 1]);  // 1, 3, 5, 7
  }
  for (int odd = 0; odd < 2; ++odd) {
    const V* const p = pairs + 4 * odd;
    for (int i = 0; i < 2; ++i) {
      halves[i] = _mm512_shuffle_f64x2(p[2 * i], p[2 * i + 1], 0x88);      // 0 and 4, of rows 4i to 4i + 3
      halves[2 + i] = _mm512_shuffle_f64x2(p[2 * i], p[2 * i + 1], 0xdd);  // 2 and 6
    }
    columns[odd] = _mm512_shuffle_f64x2(halves[0], halves[1], 0x88);
    columns[4 + odd] = _mm512_shuffle_f64x2(halves[0], halves[1], 0xdd);
    columns[2 + odd] = _mm512_shuffle_f64x2(halves[2], halves[3], 0x88);
    columns[6 + odd] = _mm512_shuffle_f64x2(halves[2], halves[3], 0xdd);
  }
}

}  // namespace
}  // namespace effk::ba

#include "vector.h"

namespace effk::ba {

constinit const Cpu cpu_avx512 = kPasses;

}  // namespace effk::ba
