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
  void* out;                  // [B, HK, S, m], or m / 2 bytes
  float* prepared = nullptr;  // [HK, Cpu::encode_floats()]: of a CPU level
};

// Dot products of a query with each word. [B, H] queries.
struct Lut {
  Type type;
  int64_t batch, heads, group, dim;  // B, H, H / HK, D
  int64_t subspaces, words;
  const void* q;  // [B, H, D], strides of the first two below
  int64_t q_stride[2];
  const float* codebook;   // [HK, m, words, D / m]
  const float* inv;        // [HK, D, D] or null: a query is multiplied by it first (q L^-T)
  float* out;              // [B, H, m, words]
  float* query = nullptr;  // [B, H, D]: q inv, of a CPU level
};

// Scores: sums of table entries that the codes name. With an 8-bit table, in float32 operations as written, rounded one
// by one (no FMA), so that all back ends agree to the bit:
//   low[j] = min over c of lut[j, c]; step = (max over j of (max over c of lut[j, c]) - low[j]) / 255
//   t[j, c] = step > 0 ? min(255, round_half_even((lut[j, c] - low[j]) / step)) : 0
//   score = step * sum of t + (0 + low[0] + low[1] + ...)
// A table with NaN or infinity, or an infinite step, gives NaN. At most 256 subspaces, so that sums have 16 bits.
struct Score {
  int64_t batch, heads, group, keys;  // B, H, H / HK, S
  int64_t subspaces, words;
  const float* lut;  // [B, H, m, words]
  Codes codes;
  const void* code;  // [B, HK, S, m] or m / 2 bytes a key, strides of the first two below, in elements
  int64_t code_stride[2];
  const int64_t* lens;  // [B] or null: S. Checked.
  bool int8_table;
  float* out;  // [B, H, S]; past lens: -inf
  // Of a CPU level: [B, H, Cpu::table_bytes()], if that isn't 0; of an 8-bit table step and base of each, [B, H, 2].
  uint8_t* table = nullptr;
  float* scale = nullptr;
};

// The keys to attend to: the first `sink`, the last `window` before lens[b], and the k best between them, of each head
// or of all heads of a group together; ascending, none twice. Of equal scores the first are best (-0 equals 0), and NaN
// is worse than all numbers. With an 8-bit table keys are compared by the sum of t (0 where the scores are NaN).
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
  int64_t lists, cap;    // lists: HK (one for a group) or H; HK without idx. cap: S without idx
  const int64_t* count;  // [B, lists] with idx, [B] without, or null: cap, or S
  float scale;
  void* out;   // [B, H, Dv]
  float* lse;  // [B, H], natural logarithm
};

// Rows (a, b) of two halves as (a cos - b sin, b cos + a sin).
struct Wrope {
  Type type;
  int64_t rows, dim;
  const void* q;  // [rows, dim], rows stride elements apart
  int64_t stride;
  const float *cos, *sin;  // [dim / 2]
  void* out;               // [rows, dim]
};

// One table a CPU level; csrc/ shares the ranges out among threads. A `pair` is b * HK + hk: a batch and a key head,
// with the `group` query heads b * H + hk * group + (0 ...) that share its keys, so that each key is read once for all.
struct Cpu {
  // What a level lays out anew of a head's codebook and chol, in floats a head (0: nothing), and its making.
  int64_t (*encode_floats)(const Encode&);
  void (*encode_prepare)(const Encode&, int64_t head0, int64_t head1);
  void (*encode)(const Encode&, int64_t pair, int64_t key0, int64_t key1);

  void (*transform)(const Lut&, int64_t query0, int64_t query1);  // q inv of queries b * H + h, to `query`
  // Entries [row0, row1) of the subspaces * words of a key head, for all batches and heads of its group.
  void (*lut)(const Lut&, int64_t head, int64_t row0, int64_t row1);

  // Of a table that the level reads otherwise than as lut: bytes a head, a multiple of 64, which are 0 if there is
  // none, and its making for queries b * H + h.
  int64_t (*table_bytes)(const Score&);
  void (*table)(const Score&, int64_t query0, int64_t query1);
  // Codes come from strangers: both give false where one that they read is out of range, which they never follow out of
  // bounds; what they wrote is void then. Codes from lens on aren't looked at.
  bool (*score)(const Score&, int64_t pair, int64_t key0, int64_t key1);
  bool (*topk)(const TopK&, int64_t pair);

  // A `unit` is a list (b * lists + list) and the heads / lists queries that share it. Entries [begin, end) of it give
  // a partial result: for each query Dv sums of e^(s - most) v, the sum of e^(s - most), and most, the largest score s
  // (-inf of none). A score of -inf adds nothing; NaN and +inf make the sums NaN.
  void (*attend)(const Attend&, int64_t unit, int64_t begin, int64_t end, float* partial);
  // Joins `parts` partial results of a unit, which follow each other, into out and lse. In their order.
  void (*attend_join)(const Attend&, int64_t unit, const float* partials, int64_t parts);

  void (*wrope)(const Wrope&, int64_t row0, int64_t row1);
};

extern const Cpu cpu_scalar, cpu_avx2, cpu_avx512;

}  // namespace effk::vq
