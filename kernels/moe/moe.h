// moe's arguments as kernels see them, on every device, and its CPU levels: what csrc/ calls. No torch here.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace effk::moe {

enum class Activation : int { swiglu, geglu, geglu_tanh, relu2 };
// Whether half of the first weight's rows are gates.
constexpr bool is_gated(Activation a) { return a != Activation::relu2; }

enum class Score : int { softmax, sigmoid };

// How a group's rows are multiplied. `grouped` reads weights and rows as they lie, which suits few rows; `dense` lays
// out both anew first, rows once for all weights and weights once for some hundred rows, which suits many.
enum class Gemm : int { grouped, dense };

// Pairs of a token and an expert, sorted by expert: those of one expert.
struct Group {
  int64_t expert;
  int64_t begin, end;
  Gemm gemm = Gemm::grouped;
  // Of a dense one: its rows of x, and of h, as a CPU level lays them out.
  char *x_panels = nullptr, *h_panels = nullptr;
};

// What all products read: sorted rows of x and the weights of their experts, of one type.
struct Operands {
  Type type;
  int64_t cols;  // of x and of w
  const void* x;
  int64_t x_stride;       // elements between two rows
  const int64_t* source;  // of each sorted row, the row of x; null: they are x's
  const void* w;          // [experts, rows, cols]
  int64_t w_expert, w_stride;
};

// y[i] = w x[i] + bias.
struct Linear {
  Operands in;
  int64_t rows;      // of w
  const void* bias;  // [experts, rows] or null
  Type out_type;
  void* y;  // [sorted rows, rows]
};

// h[i] = activation(w x[i]), gates being the first half of w's rows, rounded to the type.
struct Up {
  Operands in;
  Activation activation;
  int64_t inner;
  void* h;  // [sorted rows, inner]
};

// y[t] = the sum of weight[i] * w h[i] over the sorted rows i of token t, rounded once. With places, y[place[t]] +=
// that sum, a term after the other, in float32.
struct Down {
  Operands in;  // its x is h
  int64_t rows;
  const Group* groups;
  int64_t num_groups;
  const int64_t* token;  // of each sorted row
  const float* weight;   // likewise
  int64_t tokens;
  void* y;               // [tokens, rows]
  const int64_t* place;  // [tokens] or null
};

// dw[e] = the sum of grad[i] x[i]^T over the sorted rows i of expert e.
struct Wgrad {
  Operands in;  // without w
  int64_t rows;
  const void* grad;  // [sorted rows, rows], rows grad_stride elements apart
  int64_t grad_stride;
  void* dw;  // [experts, rows, cols]
};

// The k best experts of each token.
struct Route {
  Type type;
  int64_t tokens, experts, k;
  const void* logits;  // [tokens, experts], tokens stride elements apart
  int64_t stride;
  const float* bias;  // [experts] or null
  Score score;
  bool renormalize;
  float* weights;  // [tokens, k]
  int64_t* ids;    // likewise
};

// out[t] = the sum of weights[t, j] * y[inverse[t, j]], by ascending j.
struct Combine {
  Type type;
  int64_t tokens, k, cols;
  const void* y;
  int64_t y_stride;
  const int64_t* inverse;  // [tokens, k], -1: nothing
  const float* weights;    // [tokens, k]
  void* out;               // [tokens, cols]
};

// One table a CPU level; csrc/ shares the ranges out among threads. A group's rows are counted in units: of a grouped
// one they are sorted rows, of a dense one tiles of them.
struct Cpu {
  int64_t width;  // rows of a vector
  // Of dense groups, which a level without these doesn't have.
  int64_t (*panel_bytes)(Type, int64_t group_rows, int64_t cols);
  int64_t (*tiles)(int64_t group_rows);
  void (*pack)(const Operands&, const Group&, int64_t tile0, int64_t tile1);  // to x_panels

  void (*linear)(const Linear&, const Group&, int64_t unit0, int64_t unit1, int64_t row0, int64_t row1);
  // Of a dense group to h_panels instead.
  void (*up)(const Up&, const Group&, int64_t unit0, int64_t unit1, int64_t inner0, int64_t inner1);  // inner0 even
  void (*down)(const Down&, int64_t row0, int64_t row1);
  void (*wgrad)(const Wgrad&, const Group&, int64_t row0, int64_t row1);
  void (*route)(const Route&, int64_t token0, int64_t token1);
  void (*combine)(const Combine&, int64_t token0, int64_t token1);
};

extern const Cpu cpu_scalar, cpu_avx2, cpu_avx512;

}  // namespace effk::moe
