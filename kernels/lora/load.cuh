// What lora's CUDA kernels share: indices of either type, and loads of a few neighbouring values.
#pragma once

#include "../common/indices.cuh"
#include "lora.h"

namespace effk::lora {

// Which adapter; -1 for none, and for those that don't exist.
EFFK_DEVICE int adapter_at(const Indices& ids, int64_t i, int64_t adapters) {
  const int64_t id = index_at(ids, i);
  return id >= 0 && id < adapters ? static_cast<int>(id) : -1;
}

// How much of `rank` an adapter uses.
EFFK_DEVICE int rank_of(const Indices& ranks, int adapter, int rank) {
  if (!ranks.data) return rank;
  const int64_t r = index_at(ranks, adapter);
  return static_cast<int>(r < 0 ? 0 : r < rank ? r : rank);
}

// kCount neighbouring values as 32-bit words.
template <class X, int kCount>
struct Values {
  static constexpr int kWords = kCount * static_cast<int>(sizeof(X)) / 4;
  uint32_t word[kWords];
};

template <class X, int kCount>
EFFK_DEVICE void to_floats(const Values<X, kCount>& v, float (&out)[kCount]) {
#pragma unroll
  for (int i = 0; i < v.kWords; ++i)
    if constexpr (sizeof(X) == 4)
      out[i] = float_of(v.word[i]);
    else
      gpu::unpack_pair<X>(v.word[i], out[2 * i], out[2 * i + 1]);
}

template <class X, int kCount>
EFFK_DEVICE X value(const Values<X, kCount>& v, int i) {
  if constexpr (sizeof(X) == 4)
    return float_of(v.word[i]);
  else
    return X{static_cast<uint16_t>(v.word[i / 2] >> i % 2 * 16)};
}

// One by one: those from the `valid`-th on aren't read and are 0.
template <class X, int kCount>
EFFK_DEVICE Values<X, kCount> load_each(const X* from, int valid) {
  Values<X, kCount> v{};
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < valid) v.word[i * sizeof(X) / 4] |= bits_of_value(from[i]) << i * sizeof(X) % 4 * 8;
  return v;
}

// The same of values that nothing writes during the kernel. kWide: they are aligned as one, and either all there or
// none of them.
template <bool kWide, class X, int kCount>
EFFK_DEVICE Values<X, kCount> load_values(const X* from, int valid) {
  if constexpr (!kWide) return load_each<X, kCount>(from, valid);
  using V = Values<X, kCount>;
  static_assert(V::kWords == 4 || V::kWords == 2);
  V v{};
  if (valid <= 0) return v;
  if constexpr (V::kWords == 4) {
    const uint4 u = gpu::load_reused(from);
    v.word[0] = u.x, v.word[1] = u.y, v.word[2] = u.z, v.word[3] = u.w;
  } else {
    const uint2 u = *reinterpret_cast<const uint2*>(from);
    v.word[0] = u.x, v.word[1] = u.y;
  }
  return v;
}

// Those from the `valid`-th on become 0.
template <class X, int kCount>
EFFK_DEVICE void cut(Values<X, kCount>& v, int valid) {
  constexpr int kPerWord = 4 / sizeof(X);
#pragma unroll
  for (int i = 0; i < v.kWords; ++i) {
    const int left = valid - i * kPerWord;
    v.word[i] = left >= kPerWord ? v.word[i] : left > 0 ? v.word[i] & 0xffff : 0;
  }
}

// Whether rows of `stride` values of `size` bytes all begin at multiples of `bytes`.
EFFK_HD bool is_aligned(const void* p, int64_t stride, int64_t size, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride * size % bytes == 0;
}

}  // namespace effk::lora
