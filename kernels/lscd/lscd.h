// lscd on CPUs: what csrc/ calls. No torch here.
#pragma once

#include <cstdint>

#include "../common/type.h"
#include "format.h"

namespace effk::lscd {

enum class Activation : int { none, relu, gelu, gelu_tanh, silu };

struct Packed {
  Shape shape;
  Type type;
  const void* values;
  int64_t num_values;  // with the padding at the end
  const uint64_t* bitmap;
  const int64_t* offsets;
};

// A tile whose bitmap and offsets disagree stops the work; the first one found is kept here.
struct Status {
  int64_t bad_tile = -1;
};

struct Dense {  // row-major weights
  void* data;
  int64_t row_stride, col_stride;  // in elements; on a CPU columns follow each other
};

struct Linear {
  Packed w;
  Type x_type;
  int64_t tokens;
  const void* x;
  int64_t x_token_stride, x_col_stride;
  void* y;             // [tokens, rows], contiguous, of x_type
  const void* bias;    // [rows] of x_type, or null
  const float* scale;  // [rows], or null
  Activation activation;
  void* prepared;  // room for prepared_bytes(), 64-byte aligned: x as the kernels want it
};

// One table a CPU level; csrc/ shares the ranges out among threads.
struct Cpu {
  // Packing, first pass: bitmap words and number of values of each tile of strips [s0, s1).
  void (*count)(const Shape&, Type, const Dense& w, uint64_t* bitmap, int64_t* counts, int64_t s0, int64_t s1);
  // Second pass: values, at offsets made from the counts; zeroes the gaps.
  void (*fill)(const Packed&, const Dense& w, int64_t s0, int64_t s1);
  // y[rows, cols] of out's type = values (* scale); out is the type of values, or float32 for int8 with scale.
  void (*unpack)(const Packed&, const float* scale, void* out, Type out_type, int64_t s0, int64_t s1, Status*);
  int64_t (*prepared_bytes)(const Linear&);
  void (*prepare)(const Linear&, int64_t t0, int64_t t1);  // tokens [t0, t1)
  void (*linear)(const Linear&, int64_t s0, int64_t s1, Status*);
};

extern const Cpu cpu_scalar, cpu_avx2, cpu_avx512;

}  // namespace effk::lscd
