// Which instruction set the CPU kernels use. Torch-free.
#pragma once

namespace effk {

enum class CpuLevel : int { scalar = 0, avx2 = 1, avx512 = 2 };

// The best level that this machine and its operating system support.
//   avx2:   AVX2, FMA, F16C, BMI1, BMI2, POPCNT
//   avx512: avx2 and AVX-512 F, BW, DQ, VL, VBMI, VBMI2, VNNI, BF16, VPOPCNTDQ, BITALG (Zen 4, Sapphire Rapids and
//   later)
CpuLevel supported_cpu_level();

// The level in force: EFFK_CPU_LEVEL or set_cpu_level(), else the best.
CpuLevel cpu_level();

const char* cpu_level_name(CpuLevel);

}  // namespace effk

extern "C" {
// For bindings. Names as in cpu_level_name(); set returns 0 on success, 1 for an unknown name, 2 for a level
// that this machine lacks. The empty name goes back to the best level.
__attribute__((visibility("default"))) const char* effk_cpu_level();
__attribute__((visibility("default"))) const char* effk_supported_cpu_level();
__attribute__((visibility("default"))) int effk_set_cpu_level(const char* name);
}
