#include "cpu_level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace effk {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512"};
constexpr int kLevels = 3;

CpuLevel detect() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return CpuLevel::scalar;
  const bool osxsave = c >> 27 & 1, fma = c >> 12 & 1, popcnt = c >> 23 & 1, f16c = c >> 29 & 1;
  if (!osxsave || !fma || !popcnt || !f16c) return CpuLevel::scalar;
  unsigned xcr0, xcr0_high;
  asm volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  if ((xcr0 & 0x6) != 0x6) return CpuLevel::scalar;  // XMM and YMM saved by the operating system
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return CpuLevel::scalar;
  const bool bmi1 = b >> 3 & 1, avx2 = b >> 5 & 1, bmi2 = b >> 8 & 1;
  if (!bmi1 || !avx2 || !bmi2) return CpuLevel::scalar;
  const unsigned ebx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  // VBMI, VBMI2, GFNI, VNNI, BITALG, VPOPCNTDQ
  const unsigned ecx512 = 1u << 1 | 1u << 6 | 1u << 8 | 1u << 11 | 1u << 12 | 1u << 14;
  if ((xcr0 & 0xe6) != 0xe6 || (b & ebx512) != ebx512 || (c & ecx512) != ecx512) return CpuLevel::avx2;
  return CpuLevel::avx512;
#else
  return CpuLevel::scalar;
#endif
}

bool detect_bf16() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return supported_cpu_level() == CpuLevel::avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
#else
  return false;
#endif
}

// What a family can use of a level that the machine has.
CpuLevel limited(CpuLevel level, const char* family) {
  if (level == CpuLevel::avx512 && !has_bf16())
    for (const char* name : {EFFK_BF16_FAMILIES})
      if (std::strcmp(name, family) == 0) return CpuLevel::avx2;
  return level;
}

int index_of(const char* name) {
  for (int i = 0; i < kLevels; ++i)
    if (std::strcmp(name, kNames[i]) == 0) return i;
  return -1;
}

std::atomic<int>& forced() {
  // A level that isn't there is refused by effk_set_cpu_level(); from the environment it is refused by the
  // Python package at import, and falls back to the best level in a process without Python.
  static std::atomic<int> level = [] {
    const char* name = std::getenv("EFFK_CPU_LEVEL");
    const int i = name ? index_of(name) : -1;
    return i <= static_cast<int>(supported_cpu_level()) ? i : -1;
  }();
  return level;
}

}  // namespace

CpuLevel supported_cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

CpuLevel cpu_level() {
  const int level = forced().load(std::memory_order_relaxed);
  return level < 0 ? supported_cpu_level() : static_cast<CpuLevel>(level);
}

bool has_bf16() {
  static const bool has = detect_bf16();
  return has;
}

CpuLevel supported_cpu_level(const char* family) { return limited(supported_cpu_level(), family); }

CpuLevel cpu_level(const char* family) { return limited(cpu_level(), family); }

const char* cpu_level_name(CpuLevel level) { return kNames[static_cast<int>(level)]; }

}  // namespace effk

extern "C" const char* effk_cpu_level(const char* family) { return effk::cpu_level_name(effk::cpu_level(family)); }

extern "C" const char* effk_supported_cpu_level(const char* family) {
  return effk::cpu_level_name(effk::supported_cpu_level(family));
}

extern "C" int effk_has_bf16() { return effk::has_bf16(); }

extern "C" int effk_set_cpu_level(const char* name) {
  const int i = *name ? effk::index_of(name) : -1;
  if (*name && i < 0) return 1;
  if (i > static_cast<int>(effk::supported_cpu_level())) return 2;
  effk::forced().store(i, std::memory_order_relaxed);
  return 0;
}
