// What the CPU levels of lora share, in an anonymous namespace: each level has its own copy.
#pragma once

#include <cstring>

#include "../common/cpu.h"
#include "lora.h"

namespace effk::lora {
namespace {

inline int64_t used_rank(const Active& one, const Layer& layer) {
  return one.rank < layer.rank ? one.rank : layer.rank;
}

// The merge of no adapters, to the bit.
template <class T>
inline void copy_rows(const Layer& layer, int64_t row0, int64_t row1) {
  if (!layer.base || layer.cols == 0) return;
  T* w = static_cast<T*>(layer.w) + row0 * layer.w_stride;
  const T* base = static_cast<const T*>(layer.base) + row0 * layer.base_stride;
  const int64_t rows = row1 - row0;
  if (layer.w_stride == layer.cols && layer.base_stride == layer.cols) {
    std::memcpy(w, base, rows * layer.cols * sizeof(T));
    return;
  }
  for (int64_t n = 0; n < rows; ++n)
    std::memcpy(w + n * layer.w_stride, base + n * layer.base_stride, layer.cols * sizeof(T));
}

}  // namespace
}  // namespace effk::lora
