// vq's arguments as kernels see them, on every device, and its CPU levels: what csrc/ calls. No torch here.
#pragma once

#include <cstdint>

#include "../common/type.h"

namespace effk::vq {

// How a key's codes are stored.
enum class Codes : int {
  packed4,  // two of at most 16 words in a byte, the first one in the low half
  u8,       // at most 256 words
  i16,      // at most 32768
};

// Nearest words: the code of each sub-vector of a key, ties to the lower code. [B, HK, S] keys of D numbers.
struct Encode {
  Type type;
  int64_t batch, heads, keys, dim;  // B, HK, S, D
  int64_t subspaces, words;         // m, words of a sub-vector
  const void* k;                    // [B, HK, S, D], strides of the first three below, in elements
  int64_t k_stride[3];
  const float* codebook;  // [HK, m, words, D / m]
  const float* chol;      // [HK, D, D] or null: a key is multiplied by it first (k L)
  Codes codes;
  void* out;  // [B, HK, S, m], or m / 2 bytes
};

// Dot products of a query with each word. [B, H] queries.
struct Lut {
  Type type;
  int64_t batch, heads, group, dim;  // B, H, H / HK, D
  int64_t subspaces, words;
  const void* q;  // [B, H, D], strides of the first two below
  int64_t q_stride[2];
  const float* codebook;  // [HK, m, words, D / m]
  const float* inv;       // [HK, D, D] or null: a query is multiplied by it first (q L^-T)
  float* out;             // [B, H, m, words]
};

// Scores: sums of table entries that the codes name.
struct Score {
  int64_t batch, heads, group, keys;  // B, H, H / HK, S
  int64_t subspaces, words;
  const float* lut;  // [B, H, m, words]
  Codes codes;
  const void* code;       // [B, HK, S, m] or m / 2 bytes
  const int64_t* lens;    // [B] or null: S. Checked.
  bool int8_table;        // sums of the 8-bit table that quantize_table() makes
  float* out;             // [B, H, S]; past lens: -inf
};

// The keys to attend to: the first `sink`, the last `window` before lens[b], and the k best between them, of each head
// or of all heads of a group together; ascending, none twice.
struct TopK {
  Score score;  // without out
  int64_t k, sink, window;
  bool union_group;
  int64_t cap;     // entries of a list
  int64_t* idx;    // [B, HK or H, cap]; past count: -1
  int64_t* count;  // [B, HK or H]
};

// softmax(scale q k^T) v over the chosen keys.
struct Attend {
  Type type;
  int64_t batch, heads, group, keys, dim, value_dim;  // B, H, H / HK, S, D, Dv
  const void* q;                                      // [B, H, D], strides of the first two
  int64_t q_stride[2];
  const void* k;  // [B, HK, S, D], strides of the first three
  int64_t k_stride[3];
  const void* v;  // [B, HK, S, Dv]
  int64_t v_stride[3];
  const int64_t* idx;    // [B, lists, cap] or null: all keys. Checked on CPUs.
  int64_t lists, cap;    // lists: HK (one for a group) or H
  const int64_t* count;  // [B, lists] with idx, [B] without, or null: cap, or S
  float scale;
  void* out;   // [B, H, Dv]
  float* lse;  // [B, H], natural logarithm
};
