// 16-bit floats as their bits, converted without special instructions. Rounding is to nearest, ties to even.
// In an anonymous namespace: files for different CPU levels must not share code.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace effk {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

EFFK_HD uint32_t bits_of(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

EFFK_HD float float_of(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

EFFK_HD float to_float(float f) { return f; }
EFFK_HD float to_float(int8_t i) { return i; }
EFFK_HD float to_float(BFloat16 b) { return float_of(static_cast<uint32_t>(b.bits) << 16); }
EFFK_HD float to_float(Half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16, exponent = h.bits >> 10 & 31, m = h.bits & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | m << 13);
  if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | m << 13);
  const float tiny = static_cast<float>(m) * 0x1p-24f;  // subnormal, exact
  return float_of(sign | bits_of(tiny));
}

EFFK_HD void from_float(float f, float* out) { *out = f; }
EFFK_HD void from_float(float f, BFloat16* out) {
  const uint32_t u = bits_of(f);
  if ((u & 0x7fffffff) > 0x7f800000)
    out->bits = static_cast<uint16_t>(u >> 16 | 0x40);  // NaN stays NaN
  else
    out->bits = static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
EFFK_HD void from_float(float f, Half* out) {
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
  uint32_t h;
  if (a > 0x7f800000) {
    h = 0x7e00 | (a >> 13 & 0x3ff);
  } else if (a >= 0x477ff000) {  // rounds to 65536 or more
    h = 0x7c00;
  } else if (a >= 0x38800000) {
    h = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;
  } else {
    // Subnormal: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
    h = bits_of(float_of(a) + 0.5f) - 0x3f000000;
  }
  out->bits = static_cast<uint16_t>(sign | h);
}

}  // namespace
}  // namespace effk
