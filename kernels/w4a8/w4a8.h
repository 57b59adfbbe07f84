// w4a8's arguments as kernels see them, on every device, and its CPU levels: what csrc/ calls. No torch here.
#pragma once

#include <cstdint>

#include "../common/type.h"
#include "format.h"

namespace effk::w4a8 {

struct Packed {
  Shape shape;
  const uint8_t* q4;     // [blocks4, chunks, 16, 4]
  const float* scale4;   // [blocks4, groups, 16]
  const uint8_t* zero4;  // [blocks4, groups, 16]
  const uint8_t* q8;     // [n8, cols]
  const float* scale8;   // [blocks8, groups, 16]
  const int32_t* perm;   // [rows]: the output feature of each row, a permutation (CPU code may rely on it)
};

// Activations to integers: q = round(x / scale), scale = max |x| / 127 of each token's group.
struct Quantize {
  Type type;
  const void* x;
  int64_t x_token_stride, x_col_stride;  // in elements
  int64_t cols, group;
  int8_t* q;  // [tokens, q_stride]; columns from cols to q_stride become 0
  int64_t q_stride;
  float* scale;   // [tokens, groups]
  int32_t* sums;  // [tokens, groups] of q, or null
};

// y[t, perm[row]] = bias + sum over groups of x_scale[t, g] * w_scale[row, g] * (sum over k of q[t, k] * (w - zero)).
struct Linear {
  Packed w;
  int64_t tokens;
  const int8_t* q;
  int64_t q_stride;      // of a token, at least cols
  const float* x_scale;  // [tokens, groups]
  const int32_t* sums;   // [tokens, groups] of q
  void* y;               // [tokens, rows] of y_type
  Type y_type;
  const float* bias;      // [rows], or null
  int32_t* accumulators;  // [tokens, groups, rows]: the inner sums, for w4a8_accumulate, which wants nothing else
};

struct Pack {
  Packed w;  // its perm is read, the rest written
  Type type;
  const void* dense;  // [rows, cols] in the order of output features
  int64_t row_stride, col_stride;
};

// sum over samples of |d + d^2/2|, d = sum over k of grad * (w4 - w).
struct Salience {
  int64_t samples, rows, cols;
  Type grad_type, w_type, w4_type;
  const void *grad, *w, *w4;  // contiguous
  float* out;                 // [rows]
};

// One table a CPU level; csrc/ shares the ranges out among threads.
struct Cpu {
  void (*quantize)(const Quantize&, int64_t t0, int64_t t1);
  // Blocks of 16 rows: those of 4 bits first, then those of 8. On a CPU q_stride is a multiple of 8 and q is 0 from
  // cols on.
  void (*linear)(const Linear&, int64_t b0, int64_t b1);
  void (*accumulate)(const Linear&, int64_t b0, int64_t b1);
  void (*pack)(const Pack&, int64_t b0, int64_t b1);
  void (*unpack)(const Packed&, float* dense, int64_t b0, int64_t b1);
  void (*salience)(const Salience&, int64_t r0, int64_t r1);
};

extern const Cpu cpu_scalar, cpu_avx2, cpu_avx512;

}  // namespace effk::w4a8
