// lora with AVX2.
#include "../common/vector_avx2.h"

namespace effk::lora {
namespace {

constexpr int kVectors = 4;

inline bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % 32 == 0; }
template <class T>
inline void store_row(T* p, const V (&v)[kVectors], bool) {
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) store(p + j * kWidth, v[j]);
}
inline void store_row(float* p, const V (&v)[kVectors], bool stream) {
  stream = stream && can_stream(p);
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) stream ? _mm256_stream_ps(p + j * kWidth, v[j]) : store(p + j * kWidth, v[j]);
}

}  // namespace
}  // namespace effk::lora

#include "vector.h"

namespace effk::lora {
namespace {

void merge(const Merge& m, const Layer& layer, int64_t row0, int64_t row1) {
  merge_floats(m, layer, row0, row1);
  if (m.stream) _mm_sfence();
}

}  // namespace

constinit const Cpu cpu_avx2 = {merge, shrink_floats, expand};

}  // namespace effk::lora
