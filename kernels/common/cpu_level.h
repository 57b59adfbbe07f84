// Which instruction set the CPU kernels use. Torch-free.
#pragma once

namespace effk {

enum class CpuLevel : int { scalar = 0, avx2 = 1, avx512 = 2 };

// The best level that this machine and its operating system support.
//   avx2:   AVX2, FMA, F16C, BMI1, BMI2, POPCNT
//   avx512: avx2 and AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI, VPOPCNTDQ, BITALG, and GFNI (Ice Lake, Zen 4 and later)
CpuLevel supported_cpu_level();

// Whether it has level avx512 and AVX512_BF16 (Zen 4, Sapphire Rapids and later), which the kernels of some families
// need at that level: EFFK_BF16_FAMILIES in CMakeLists.txt.
bool has_bf16();

// The level in force: EFFK_CPU_LEVEL or set_cpu_level(), else the best.
CpuLevel cpu_level();

// The same for one family, by its name: avx2 instead of avx512 where the family needs BF16 and it is missing.
CpuLevel supported_cpu_level(const char* family);
CpuLevel cpu_level(const char* family);

// Of a family's kernels, by level, those to use.
template <class Cpu>
const Cpu& cpu_kernels(const char* family, const Cpu* const (&levels)[3]) {
  return *levels[static_cast<int>(cpu_level(family))];
}

const char* cpu_level_name(CpuLevel);

}  // namespace effk

extern "C" {
// For bindings. Names as in cpu_level_name(); set returns 0 on success, 1 for an unknown name, 2 for a level
// that this machine lacks. The empty name goes back to the best level. An empty family asks about the machine.
__attribute__((visibility("default"))) const char* effk_cpu_level(const char* family);
__attribute__((visibility("default"))) const char* effk_supported_cpu_level(const char* family);
__attribute__((visibility("default"))) int effk_has_bf16();
__attribute__((visibility("default"))) int effk_set_cpu_level(const char* name);
}
