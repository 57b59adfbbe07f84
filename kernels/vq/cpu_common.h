// What the CPU levels of vq share, in an anonymous namespace: each level has its own copy, compiled for it.
#pragma once

#include <cmath>

#include "../common/cpu.h"
#include "vq.h"

namespace effk::vq {
namespace {

// --- Codes ----------------------------------------------------------------------------------------------------------

// Calls f with the way codes are stored as a constant.
template <class F>
inline bool with_codes(Codes codes, const F& f) {
  switch (codes) {
    case Codes::packed4: return f(std::integral_constant<Codes, Codes::packed4>());
    case Codes::u8: return f(std::integral_constant<Codes, Codes::u8>());
    case Codes::i16: return f(std::integral_constant<Codes, Codes::i16>());
  }
  return false;
}

// The code of sub-vector j of a key. One that is negative comes out large.
template <Codes C>
inline uint32_t code_at(const void* key, int64_t j) {
  if constexpr (C == Codes::packed4) return static_cast<const uint8_t*>(key)[j / 2] >> j % 2 * 4 & 15;
  if constexpr (C == Codes::u8) return static_cast<const uint8_t*>(key)[j];
  if constexpr (C == Codes::i16) return static_cast<const uint16_t*>(key)[j];
}

inline int64_t code_bytes(Codes codes, int64_t subspaces) {
  return codes == Codes::packed4 ? subspaces / 2 : codes == Codes::u8 ? subspaces : 2 * subspaces;
}

// The codes of a pair's first key; those of the next follow after code_bytes().
inline const char* codes_of(const Score& p, int64_t pair) {
  const int64_t heads = p.heads / p.group, at = pair / heads * p.code_stride[0] + pair % heads * p.code_stride[1];
  return static_cast<const char*>(p.code) + at * (p.codes == Codes::i16 ? 2 : 1);
}

// The first of the queries (b * H + h) of a pair; its others follow.
inline int64_t first_query(const Score& p, int64_t pair) { return pair * p.group; }

inline int64_t length(const Score& p, int64_t batch) { return p.lens ? p.lens[batch] : p.keys; }

// --- Tables ---------------------------------------------------------------------------------------------------------

// What a level sums: entries as they come, entries of 8 bits, or those of four heads of a group side by side, which a
// code finds at once.
enum class Table { floats, bytes, quads };

constexpr int64_t kQuad = 4;

// Bytes a head of such quads; 0 where they aren't worth it: few heads, or few keys for the words.
inline int64_t quad_bytes(const Score& p) {
  const bool worth = p.codes != Codes::packed4 && p.group >= kQuad && p.keys >= 4 * p.subspaces * p.words;
  return worth ? (p.subspaces * p.words + 15) / 16 * 64 : 0;
}

// Those of a query and the next three of its group.
inline float* quads_of(const Score& p, int64_t query) {
  return reinterpret_cast<float*>(p.table + query * quad_bytes(p));
}

// One of words_stride bytes a sub-vector, and its step and base.
inline void quantize_table(const float* lut, int64_t subspaces, int64_t words, uint8_t* out, int64_t words_stride,
                           float* scale) {
  float range = 0, base = 0;
  bool finite = true;
  for (int64_t j = 0; j < subspaces; ++j) {
    float low = INFINITY, high = -INFINITY;
    for (int64_t c = 0; c < words; ++c) {
      const float x = lut[j * words + c];
      finite &= std::isfinite(x);
      low = x < low ? x : low;
      high = x > high ? x : high;
    }
    range = high - low > range ? high - low : range;
    base += low;
  }
  const float step = range / 255;
  if (!finite || !std::isfinite(step)) {
    scale[0] = scale[1] = NAN;
    for (int64_t i = 0; i < subspaces * words_stride; ++i) out[i] = 0;
    return;
  }
  scale[0] = step;
  scale[1] = base;
  for (int64_t j = 0; j < subspaces; ++j) {
    const float* row = lut + j * words;
    float low = row[0];
    for (int64_t c = 1; c < words; ++c) low = row[c] < low ? row[c] : low;
    for (int64_t c = 0; c < words_stride; ++c) {
      const float t = c < words && step > 0 ? std::rint((row[c] - low) / step) : 0.0f;
      out[j * words_stride + c] = static_cast<uint8_t>(t < 255.0f ? t : 255.0f);
    }
  }
}

// step * sum + base, rounded twice: double holds the product, so that no compiler makes one operation of both.
inline float score_of(uint32_t sum, const float* scale) {
  return static_cast<float>(static_cast<double>(scale[0]) * sum) + scale[1];
}

// --- The best -------------------------------------------------------------------------------------------------------

// A number that is larger for a better score: NaN, -inf, ..., -0 = 0, ..., inf.
inline uint32_t rank_of(float score) {
  if (score != score) return 0;
  const uint32_t bits = bits_of(score + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000;
}

// Marks the k largest of n ranks, the first of equals, found a byte at a time.
inline void mark_best(const uint32_t* ranks, int64_t n, int64_t k, bool* taken) {
  if (k >= n) {
    for (int64_t i = 0; i < n; ++i) taken[i] = true;
    return;
  }
  if (k <= 0) return;
  uint32_t least = 0;  // of the ranks to take, its upper bytes
  int64_t left = k;    // to take of the ranks that have these
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t number[256] = {};
    for (int64_t i = 0; i < n; ++i)
      if (shift == 24 || ranks[i] >> (shift + 8) == least >> (shift + 8)) ++number[ranks[i] >> shift & 255];
    uint32_t byte = 255;
    for (; left > number[byte]; --byte) left -= number[byte];
    least |= byte << shift;
  }
  for (int64_t i = 0; i < n; ++i)
    if (ranks[i] > least || (ranks[i] == least && left-- > 0)) taken[i] = true;
}

// The positions of those that are taken, then -1.
inline void write_list(const bool* taken, int64_t n, int64_t cap, int64_t* idx, int64_t* count) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i)
    if (taken[i]) idx[found++] = i;
  *count = found;
  for (; found < cap; ++found) idx[found] = -1;
}

// --- Attention ------------------------------------------------------------------------------------------------------

// The queries of a unit: `heads` of batch `b`, from `first` on, all of key head `kv`.
struct Unit {
  int64_t b, first, heads, kv;
  Unit(const Attend& p, int64_t unit)
      : b(unit / p.lists), first(unit % p.lists * (p.heads / p.lists)), heads(p.heads / p.lists), kv(first / p.group) {}
};

template <class T>
inline const T* query_at(const Attend& p, int64_t b, int64_t h) {
  return static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[1];
}
template <class T>
inline const T* key_at(const Attend& p, const Unit& u, int64_t s) {
  return static_cast<const T*>(p.k) + u.b * p.k_stride[0] + u.kv * p.k_stride[1] + s * p.k_stride[2];
}
template <class T>
inline const T* value_at(const Attend& p, const Unit& u, int64_t s) {
  return static_cast<const T*>(p.v) + u.b * p.v_stride[0] + u.kv * p.v_stride[1] + s * p.v_stride[2];
}
// The key that an entry of a unit's list is.
inline int64_t entry_at(const Attend& p, int64_t unit, int64_t i) { return p.idx ? p.idx[unit * p.cap + i] : i; }

template <class T>
inline void join_parts(const Attend& p, const Unit& u, const float* partials, int64_t parts) {
  const int64_t values = p.value_dim, step = u.heads * (values + 2);
  const Buffer<float> sums(values);
  for (int64_t i = 0; i < u.heads; ++i) {
    const float* const own = partials + i * (values + 2);
    float most = -INFINITY, total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const float other = own[part * step + values + 1];
      most = other > most ? other : most;
    }
    for (int64_t d = 0; d < values; ++d) sums.get()[d] = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const float* const from = own + part * step;
      // Parts without a key have sums of 0, or NaN.
      const float factor = from[values + 1] == -INFINITY ? 1.0f : std::exp(from[values + 1] - most);
      total += factor * from[values];
      for (int64_t d = 0; d < values; ++d) sums.get()[d] += factor * from[d];
    }
    const int64_t query = u.b * p.heads + u.first + i;
    T* const out = static_cast<T*>(p.out) + query * values;
    for (int64_t d = 0; d < values; ++d) from_float(total == 0 ? 0.0f : sums.get()[d] / total, out + d);
    p.lse[query] = total == 0 ? -INFINITY : most + std::log(total);
  }
}

inline void attend_join(const Attend& p, int64_t unit, const float* partials, int64_t parts) {
  with_float(p.type, [&]<class T>(T*) { join_parts<T>(p, Unit(p, unit), partials, parts); });
}

// --- Rotation -------------------------------------------------------------------------------------------------------

inline void wrope(const Wrope& p, int64_t row0, int64_t row1) {
  with_float(p.type, [&]<class T>(T*) {
    const int64_t half = p.dim / 2;
    for (int64_t i = row0; i < row1; ++i) {
      const T* const q = static_cast<const T*>(p.q) + i * p.stride;
      T* const out = static_cast<T*>(p.out) + i * p.dim;
      for (int64_t d = 0; d < half; ++d) {
        const float a = to_float(q[d]), b = to_float(q[half + d]);
        from_float(a * p.cos[d] - b * p.sin[d], out + d);
        from_float(b * p.cos[d] + a * p.sin[d], out + half + d);
      }
    }
  });
}

}  // namespace
}  // namespace effk::vq
