// How fast this machine multiplies integers at most: what perf/ sets the kernels' times beside.
#include <immintrin.h>

#include <cstdint>

#include "cpu_level.h"

namespace effk {
namespace {

// On registers alone: 16 sums, more than an instruction's latency needs. Not inlined, since before the check of the
// level no instruction of this file's flags may run.
__attribute__((noinline)) int64_t multiply(int64_t rounds) {
  // Bits as mixed as those of real operands: the clock may depend on the power that they cost.
  const __m512i u = _mm512_set1_epi32(0x3a5c07f1), s = _mm512_set1_epi32(static_cast<int>(0x9d42e86bu));
  for (int64_t i = 0; i < rounds; ++i)
    asm volatile(
        ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
        "vpdpbusd %1, %0, %%zmm\\n\n"
        ".endr"
        :
        : "v"(u), "v"(s)
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
          "xmm13", "xmm14", "xmm15");
  return rounds * 16 * 64 * 2;
}

}  // namespace
}  // namespace effk

// Runs rounds of vpdpbusd on the calling thread. Returns how many multiplications and additions they were, 0 where the
// machine lacks the level.
extern "C" __attribute__((visibility("default"))) int64_t effk_int8_operations(int64_t rounds) {
  return effk::supported_cpu_level() == effk::CpuLevel::avx512 ? effk::multiply(rounds) : 0;
}
