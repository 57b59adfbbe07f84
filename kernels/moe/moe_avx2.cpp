// moe with AVX2.
#include <cstring>

#include "../common/cpu.h"
#include "../common/vector_avx2.h"

namespace effk::moe {
namespace {

constexpr int kDotRows = 4, kDotTokens = 2, kDenseRows = 12, kMostVectors = 3;

template <class T>
using Element = float;
template <class T>
constexpr int kSteps = 1;

inline V lanes(const float* p) { return load(p); }
inline V broadcast(const float* p) { return splat(*p); }
template <class T>
inline V columns(const T* p, int64_t n) {
  return load_upto(p, n);
}

template <class T>
inline V element(const float* p, int64_t) {
  T rounded[kWidth];
  store(rounded, load(p));
  return load(rounded);
}

}  // namespace
}  // namespace effk::moe

#include "vector.h"

namespace effk::moe {

constinit const Cpu cpu_avx2 = {kWidth, panel_bytes, tiles, pack, linear, up, down, wgrad, route, combine};

}  // namespace effk::moe
