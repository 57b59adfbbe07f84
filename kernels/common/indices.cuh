// What CUDA kernels of several families share: indices of either type, a value's bits, and arithmetic of sizes.
#pragma once

#include "device.cuh"

namespace effk {

EFFK_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
EFFK_HD constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
EFFK_HD constexpr int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }

// A contiguous int32 or int64 tensor, or none.
struct Indices {
  const void* data;
  bool is_wide;
};

EFFK_DEVICE int64_t index_at(const Indices& v, int64_t i) {
  return v.is_wide ? static_cast<const int64_t*>(v.data)[i] : static_cast<const int32_t*>(v.data)[i];
}

template <class X>
EFFK_DEVICE uint32_t bits_of_value(X x) {
  if constexpr (sizeof(X) == 4)
    return bits_of(x);
  else
    return x.bits;
}

}  // namespace effk
