// ba with AVX2.
#include <immintrin.h>
#include <math.h>

#include <cstdint>

namespace effk::ba {
namespace {

using V = __m256d;
constexpr int kWidth = 4;

inline V root(V v) { return _mm256_sqrt_pd(v); }

inline void transpose(const V (&rows)[4], V* columns) {
  const V even01 = _mm256_unpacklo_pd(rows[0], rows[1]), odd01 = _mm256_unpackhi_pd(rows[0], rows[1]);
  const V even23 = _mm256_unpacklo_pd(rows[2], rows[3]), odd23 = _mm256_unpackhi_pd(rows[2], rows[3]);
  columns[0] = _mm256_permute2f128_pd(even01, even23, 0x20);
  columns[1] = _mm256_permute2f128_pd(odd01, odd23, 0x20);
  columns[2] = _mm256_permute2f128_pd(even01, even23, 0x31);
  columns[3] = _mm256_permute2f128_pd(odd01, odd23, 0x31);
}

}  // namespace
}  // namespace effk::ba

#include "vector.h"

namespace effk::ba {

constinit const Cpu cpu_avx2 = kPasses;

}  // namespace effk::ba
