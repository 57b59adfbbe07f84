// lora's arguments as kernels see them, on every device, and its CPU levels: what csrc/ calls. No torch here.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace effk::lora {

constexpr int64_t kMaxPairs = 1024;  // of an adapter's number and its gate, in one list

// A weight with the low-rank updates that adapters have for it. All of the merge's type.
struct Layer {
  void* w;           // [rows, cols], rows w_stride elements apart
  const void* base;  // the same with base_stride, or null: w itself
  const void* a;     // [adapters, rank, cols]
  const void* b;     // [adapters, rows, rank]
  int64_t rows, cols, rank;
  int64_t w_stride, base_stride;
};

// One that takes part: its number, how much of the rank it uses (a layer whose rank is smaller uses all of that), and
// its factor, which isn't 0.
struct Active {
  int64_t adapter, rank;
  float factor;
};

// w = base + sum over `active` of factor * b[adapter] a[adapter], in float32, rounded once. Which two of the three are
// multiplied first is a level's choice: it shows where that overflows or vanishes.
struct Merge {
  Type type;
  const Active* active;  // by ascending number, none twice
  int64_t num_active;
  bool stream = false;  // past the caches, for weights that don't fit there
};

// y[t] += sum over a token's adapters of factor * b (a x[t]), for tokens sorted by adapter.
struct Apply {
  Type type;
  int64_t tokens, cols, rows, rank;
  const void* x;  // [tokens, cols], tokens x_stride elements apart
  int64_t x_stride;
  const void* a;     // [adapters, rank, cols]
  const void* b;     // [adapters, rows, rank]
  const void* y_in;  // [tokens, rows], tokens y_stride elements apart, or null: zeros
  int64_t y_stride;
  void* y;  // [tokens, rows]

  // The groups: tokens that use the same adapter.
  struct Group {
    int64_t adapter, rank;
    int64_t begin, end;  // of its entries in the next two
  };
  const Group* groups;
  int64_t num_groups;
  const int64_t* token;
  const float* factor;
  float* inner;  // [entries, rank]: a x[t]
};

// One table a CPU level; csrc/ shares the ranges out among threads.
struct Cpu {
  void (*merge)(const Merge&, const Layer&, int64_t row0, int64_t row1);
  // Writes `inner` of rows of a: numbers [r0, r1) of a group's rank.
  void (*shrink)(const Apply&, const Apply::Group&, int64_t r0, int64_t r1);
  // Writes outputs [row0, row1) of all tokens.
  void (*expand)(const Apply&, int64_t row0, int64_t row1);
};

extern const Cpu cpu_scalar, cpu_avx2, cpu_avx512;

}  // namespace effk::lora
