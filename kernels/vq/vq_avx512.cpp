// vq with AVX-512. Words of 4 bits are looked up in registers: vpermb takes 64 entries of a byte, of four sub-vectors
// at a time, and vpdpbusd adds what they gave for a key.
#include <cstring>

#include "../common/cpu.h"
#include "../common/vector_avx512.h"
#include "cpu_common.h"

namespace effk::vq {
namespace {

constexpr int kDotQueries = 4, kValuePairs = 2, kEncodeVectors = 4, kEncodeWords = 6;

// --- Words of vector.h ----------------------------------------------------------------------------------------------

template <class T>
constexpr bool kAlternating = false;
template <>
constexpr bool kAlternating<BFloat16> = true;

template <class T>
inline void load_pair(const T* p, V& a, V& b) {
  a = load(p);
  b = load(p + kWidth);
}
template <class T>
inline void load_pair(const T* p, int64_t n, V& a, V& b) {
  a = load_upto(p, n);
  b = load_upto(p + kWidth, n - kWidth);
}
inline void split(__m512i v, V& even, V& odd) {
  even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load_pair(const BFloat16* p, V& a, V& b) { split(_mm512_loadu_si512(p), a, b); }
inline void load_pair(const BFloat16* p, int64_t n, V& a, V& b) {
  split(_mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, p), a, b);
}

inline V larger(V x, V y) { return _mm512_max_ps(x, y); }
inline float largest(V v) { return _mm512_reduce_max_ps(v); }
inline bool any_above(V x, V y) { return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ) != 0; }
inline V nearest_integer(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V power(V n) { return _mm512_scalef_ps(splat(1), n); }
inline V zero_below(V y, V x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(limit), _CMP_NLT_UQ), y);
}

using Numbers = __m512i;
inline Numbers load_numbers(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_numbers(int32_t* p, Numbers v) { _mm512_storeu_si512(p, v); }
inline Numbers splat_number(int32_t i) { return _mm512_set1_epi32(i); }
inline Numbers ranks_of(V v) {
  const Numbers bits = _mm512_castps_si512(v + zero());  // of -0 and 0 one
  const Numbers ranks = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
  return _mm512_mask_mov_epi32(ranks, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), splat_number(INT32_MIN));
}
inline int64_t count_above(Numbers x, Numbers y) { return __builtin_popcount(_mm512_cmpgt_epi32_mask(x, y)); }
inline Numbers counting() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
inline int64_t append(V scores, float threshold, int32_t position, float* kept, int32_t* positions) {
  const __mmask16 some = _mm512_cmp_ps_mask(scores, splat(threshold), _CMP_GE_OQ);
  store(kept, _mm512_maskz_compress_ps(some, scores));
  store_numbers(positions, _mm512_maskz_compress_epi32(some, _mm512_add_epi32(counting(), splat_number(position))));
  return __builtin_popcount(some);
}
// Moves the positions of ranks above one to the front, and tells how many they are.
inline int64_t keep_above(const int32_t* ranks, int32_t* positions, int64_t n, int32_t rank) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += kWidth) {
    const auto own = static_cast<__mmask16>(n - i >= kWidth ? 0xffff : (1u << (n - i)) - 1);
    const __mmask16 some = _mm512_mask_cmpgt_epi32_mask(own, load_numbers(ranks + i), splat_number(rank));
    store_numbers(positions + kept, _mm512_maskz_compress_epi32(some, load_numbers(positions + i)));
    kept += __builtin_popcount(some);
  }
  return kept;
}

inline void nearer(V x, Numbers at, V& best, Numbers& code) {
  const __mmask16 less = _mm512_cmp_ps_mask(x, best, _CMP_LT_OQ);
  best = _mm512_mask_mov_ps(best, less, x);
  code = _mm512_mask_mov_epi32(code, less, at);
}
// Quads are four neighbours of a vector.
inline V load_quads(const float* p, const int32_t* at) {
  V v = _mm512_castps128_ps512(_mm_load_ps(p + at[0]));
  v = _mm512_insertf32x4(v, _mm_load_ps(p + at[4]), 1);
  v = _mm512_insertf32x4(v, _mm_load_ps(p + at[8]), 2);
  return _mm512_insertf32x4(v, _mm_load_ps(p + at[12]), 3);
}
inline void store_quads(float* p, V v) {
  _mm_store_ps(p, _mm512_castps512_ps128(v));
  _mm_store_ps(p + 16, _mm512_extractf32x4_ps(v, 1));
  _mm_store_ps(p + 32, _mm512_extractf32x4_ps(v, 2));
  _mm_store_ps(p + 48, _mm512_extractf32x4_ps(v, 3));
}
// To the nearest of 0 to 255, ties to even.
inline void store_bytes(uint8_t* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(v)));
}

// --- Codes of 16 keys -----------------------------------------------------------------------------------------------

// Four bytes of each of 16 keys are a column. Where a key's bytes aren't fours, the last column overlaps the one
// before.
inline int64_t columns_of(int64_t bytes) { return (bytes + 3) / 4; }
inline int64_t column_start(int64_t bytes, int64_t column) {
  return bytes < 4 ? 0 : 4 * column + 4 <= bytes ? 4 * column : bytes - 4;
}

// Those from the given one on, of keys of KB bytes, or any number if KB is 0.
template <int KB>
constexpr int kColumns = KB >= 4 ? (KB >= 16 ? 4 : KB / 4) : 1;
template <int KB>
inline void load_columns(const uint8_t* keys, int64_t bytes, int64_t column, __m512i (&out)[kColumns<KB>]) {
  if constexpr (KB == 1) {
    out[0] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys)));
  } else if constexpr (KB == 2) {
    out[0] = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys)));
  } else if constexpr (KB == 4) {
    out[0] = _mm512_loadu_si512(keys);
  } else if constexpr (KB == 8) {
    const __m512i a = _mm512_loadu_si512(keys), b = _mm512_loadu_si512(keys + 64);
    const __m512i even = _mm512_add_epi32(counting(), counting()), odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    out[0] = _mm512_permutex2var_epi32(a, even, b);
    out[1] = _mm512_permutex2var_epi32(a, odd, b);
  } else if constexpr (KB >= 16) {
    const uint8_t* const from = keys + 4 * column;
    const auto part = [&](int key) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + key * KB)); };
    __m512i rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_castsi128_si512(part(i));
      rows[i] = _mm512_inserti32x4(rows[i], part(i + 4), 1);
      rows[i] = _mm512_inserti32x4(rows[i], part(i + 8), 2);
      rows[i] = _mm512_inserti32x4(rows[i], part(i + 12), 3);
    }
    const __m512i ab = _mm512_unpacklo_epi32(rows[0], rows[1]), AB = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i cd = _mm512_unpacklo_epi32(rows[2], rows[3]), CD = _mm512_unpackhi_epi32(rows[2], rows[3]);
    out[0] = _mm512_unpacklo_epi64(ab, cd);
    out[1] = _mm512_unpackhi_epi64(ab, cd);
    out[2] = _mm512_unpacklo_epi64(AB, CD);
    out[3] = _mm512_unpackhi_epi64(AB, CD);
  } else {
    const __m512i places = _mm512_mullo_epi32(counting(), _mm512_set1_epi32(static_cast<int>(bytes)));
    out[0] = _mm512_i32gather_epi32(places, reinterpret_cast<const int*>(keys + column_start(bytes, column)), 1);
  }
}

// --- Tables ---------------------------------------------------------------------------------------------------------

// Of 8 bits. Of packed codes: of each column 64 entries for the low halves of its bytes, 64 for the high ones. Of codes
// of 8 bits 256 entries each. Else as they come, and room for a read of four entries at the last.
inline int64_t table_bytes(const Score& p) {
  if (!p.int8_table) return quad_bytes(p);
  switch (p.codes) {
    case Codes::packed4: return columns_of(p.subspaces / 2) * 128;
    case Codes::u8: return p.subspaces * 256;
    case Codes::i16: return (p.subspaces * p.words + 3 + 63) / 64 * 64;
  }
  return 0;
}

// --- Scores ---------------------------------------------------------------------------------------------------------

template <Table kTable>
struct SumOf {
  using type = V;
};
template <>
struct SumOf<Table::bytes> {
  using type = Numbers;
};

// Sums of the table entries of 16 keys, for KH heads; of quads as transpose_quads() turns them. `wrong` gathers lanes
// whose codes are out of range.
template <Codes C, int KB, int KH, Table kTable>
struct Sums {
  using Sum = typename SumOf<kTable>::type;
  int64_t bytes, subspaces, words;
  const float* floats[KH];  // of quads the first alone
  const uint8_t* entries[KH];

  inline void add(const uint8_t* keys, Sum (&sums)[KH], __mmask16& wrong) const {
    constexpr int kSome = kColumns<KB>;
    const int64_t all = KB ? columns_of(KB) : columns_of(bytes);
#pragma GCC unroll 2
    for (int64_t column = 0; column < all; column += kSome) {
      __m512i codes[kSome];
      load_columns<KB>(keys, bytes, column, codes);
#pragma GCC unroll 4
      for (int i = 0; i < kSome; ++i) {
        if constexpr (C == Codes::packed4 && kTable == Table::bytes)
          add_packed(codes[i], column + i, sums);
        else
          add_column(codes[i], column + i, sums, wrong);
      }
    }
  }

  inline void add_packed(__m512i codes, int64_t column, Sum (&sums)[KH]) const {
    const __m512i half = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), ones = _mm512_set1_epi8(1);
    const __m512i low = _mm512_ternarylogic_epi32(codes, half, place, 0xea);  // codes & half | place
    const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(codes, 4), half, place, 0xea);
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h) {
      const uint8_t* const from = entries[h] + column * 128;
      sums[h] = _mm512_dpbusd_epi32(sums[h], _mm512_permutexvar_epi8(low, _mm512_loadu_si512(from)), ones);
      sums[h] = _mm512_dpbusd_epi32(sums[h], _mm512_permutexvar_epi8(high, _mm512_loadu_si512(from + 64)), ones);
    }
  }

  inline void add_column(__m512i codes, int64_t column, Sum (&sums)[KH], __mmask16& wrong) const {
    constexpr int kBits = C == Codes::packed4 ? 4 : C == Codes::u8 ? 8 : 16;
    const int64_t start = KB ? 4 * column : column_start(bytes, column), width = KB ? KB : bytes;
#pragma GCC unroll 8
    for (int shift = 0; shift < 32; shift += kBits) {
      const int64_t at = 8 * start + shift, j = at / kBits;
      if (8 * 4 * column > at || at >= 8 * width) continue;  // of the column before; of the next key
      __m512i code = _mm512_srli_epi32(codes, shift);
      if constexpr (C == Codes::packed4) {
        code = _mm512_and_si512(code, _mm512_set1_epi32(15));
#pragma GCC unroll 4
        for (int h = 0; h < KH; ++h) {
          const auto own = static_cast<__mmask16>((1u << words) - 1);
          sums[h] += _mm512_permutexvar_ps(code, _mm512_maskz_loadu_ps(own, floats[h] + j * words));
        }
      } else {
        const __m512i last = _mm512_set1_epi32(static_cast<int>(words - 1));
        if (kBits + shift < 32) code = _mm512_and_si512(code, _mm512_set1_epi32((1 << kBits) - 1));
        wrong |= _mm512_cmpgt_epi32_mask(code, last);
        code = _mm512_min_epi32(code, last);
        if constexpr (kTable == Table::quads) {
          int32_t at[16];
          store_numbers(at, _mm512_slli_epi32(code, 2));
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sums[i] += load_quads(floats[0] + 4 * j * words, at + i);
          continue;
        }
#pragma GCC unroll 4
        for (int h = 0; h < KH; ++h)
          if constexpr (kTable == Table::bytes)
            sums[h] = _mm512_add_epi32(
                sums[h],
                _mm512_and_si512(_mm512_i32gather_epi32(code, reinterpret_cast<const int*>(entries[h] + j * words), 1),
                                 _mm512_set1_epi32(255)));
          else
            sums[h] += _mm512_i32gather_ps(code, floats[h] + j * words, 4);
      }
    }
  }
};

inline bool halves_below(const uint8_t* p, int64_t n, int64_t words) {
  __mmask64 wrong = 0;
  const __m512i half = _mm512_set1_epi8(15), last = _mm512_set1_epi8(static_cast<char>(words - 1));
  for (int64_t i = 0; i < n; i += 64) {
    const __m512i v = _mm512_maskz_loadu_epi8(n - i >= 64 ? ~uint64_t{0} : (uint64_t{1} << (n - i)) - 1, p + i);
    wrong |= _mm512_cmpgt_epu8_mask(_mm512_and_si512(v, half), last);
    wrong |= _mm512_cmpgt_epu8_mask(_mm512_and_si512(_mm512_srli_epi16(v, 4), half), last);
  }
  return wrong == 0;
}

// The 8-bit table of a head of a pair, and what its sums become scores by; nothing does if they are to be raw.
inline const uint8_t* table_of(const Score& p, int64_t pair, int64_t head, bool raw, V& step, V& base) {
  const int64_t query = first_query(p, pair) + head;
  const float* const scale = p.scale + 2 * query;
  const bool whole = raw && scale[0] == scale[0];
  step = splat(whole ? 1 : scale[0]);
  base = splat(whole ? 0 : scale[1]);
  return p.table + query * table_bytes(p);
}
inline V scaled(__m512i sums, V step, V base) {
  V product = _mm512_cvtepi32_ps(sums) * step;
  asm("" : "+v"(product));  // rounded: no sum of both in one
  return product + base;
}

template <Codes C, int KB, int KH, Table kTable>
[[gnu::noinline]] bool scores(const Score& p, int64_t pair, int64_t head, int64_t key0, int64_t key1, float* out,
                              int64_t stride, bool raw) {
  Sums<C, KB, KH, kTable> sums{code_bytes(C, p.subspaces), p.subspaces, p.words, {}, {}};
  V step[KH], base[KH];
#pragma GCC unroll 4
  for (int h = 0; h < KH; ++h) {
    const int64_t query = first_query(p, pair) + head + h;
    sums.floats[h] = p.lut + query * p.subspaces * p.words;
    if constexpr (kTable == Table::quads) sums.floats[h] = quads_of(p, query);
    if constexpr (kTable == Table::bytes) sums.entries[h] = table_of(p, pair, head + h, raw, step[h], base[h]);
  }
  const int64_t bytes = KB ? KB : sums.bytes;
  const auto* keys = reinterpret_cast<const uint8_t*>(codes_of(p, pair)) + key0 * bytes;
  if (C == Codes::packed4 && p.words < 16 && !halves_below(keys, (key1 - key0) * bytes, p.words)) return false;
  __mmask16 wrong = 0;
  const auto block = [&](const uint8_t* from, const auto& keep) {
    typename SumOf<kTable>::type s[KH];
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h) s[h] = typename SumOf<kTable>::type{};
    sums.add(from, s, wrong);
    if constexpr (kTable == Table::quads) transpose_quads(s);
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h)
      if constexpr (kTable == Table::bytes)
        keep(h, scaled(s[h], step[h], base[h]));
      else
        keep(h, s[h]);
  };
  int64_t s = key0;
  const int64_t beyond = KB == 0 && bytes < 4 ? 16 + 4 : 16;  // keys that a block may read of
  for (; s + beyond <= key1; s += 16, keys += 16 * bytes)
    block(keys, [&](int h, V v) { store(out + h * stride + (s - key0), v); });
  for (; s < key1; s += 16, keys += 16 * bytes) {
    const int64_t left = key1 - s < 16 ? key1 - s : 16;
    const Buffer<uint8_t> room(16 * bytes + 4);
    std::memset(room.get(), 0, 16 * bytes + 4);
    std::memcpy(room.get(), keys, left * bytes);
    block(room.get(), [&](int h, V v) { store_upto(out + h * stride + (s - key0), v, left); });
  }
  return wrong == 0;
}

// Likewise for an 8-bit table of codes of 8 bits: four vpermb look up 64 keys' words, whose sums are of 16 bits.
template <int KB, int KH>
[[gnu::noinline]] bool scores_of_bytes(const Score& p, int64_t pair, int64_t head, int64_t key0, int64_t key1,
                                       float* out, int64_t stride, bool raw) {
  const uint8_t* entries[KH];
  V step[KH], base[KH];
#pragma GCC unroll 4
  for (int h = 0; h < KH; ++h) entries[h] = table_of(p, pair, head + h, raw, step[h], base[h]);
  const int64_t bytes = KB ? KB : p.subspaces;
  const auto* keys = reinterpret_cast<const uint8_t*>(codes_of(p, pair)) + key0 * bytes;
  const __m512i last = _mm512_set1_epi8(static_cast<char>(p.words - 1));
  __mmask64 wrong = 0;
  constexpr int kSome = kColumns<KB>;
  const int64_t beyond = KB == 0 && bytes < 4 ? 64 + 4 : 64;  // keys that a block may read of
  const Buffer<uint8_t> room(64 * bytes + 4);
  for (int64_t s = key0; s < key1; s += 64, keys += 64 * bytes) {
    const int64_t n = key1 - s < 64 ? key1 - s : 64;
    const uint8_t* from = keys;
    if (s + beyond > key1) {
      std::memset(room.get(), 0, 64 * bytes + 4);
      std::memcpy(room.get(), keys, n * bytes);
      from = room.get();
    }
    // Lane L holds keys 4 L to 4 L + 3 of each quarter of the 64. In `all` a sum's low byte disturbs an odd key's.
    __m512i all[KH], odd[KH];
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h) all[h] = odd[h] = _mm512_setzero_si512();
    for (int64_t column = 0; column < columns_of(bytes); column += kSome) {
      __m512i codes[4][kSome];
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) load_columns<KB>(from + q * 16 * bytes, bytes, column, codes[q]);
#pragma GCC unroll 4
      for (int i = 0; i < kSome; ++i) {
        __m512i t[4];
        const __m512i order =
            _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) t[q] = _mm512_shuffle_epi8(codes[q][i], order);
        const __m512i ab = _mm512_unpacklo_epi32(t[0], t[1]), AB = _mm512_unpackhi_epi32(t[0], t[1]);
        const __m512i cd = _mm512_unpacklo_epi32(t[2], t[3]), CD = _mm512_unpackhi_epi32(t[2], t[3]);
        const __m512i planes[4] = {_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd),
                                   _mm512_unpacklo_epi64(AB, CD), _mm512_unpackhi_epi64(AB, CD)};
        const int64_t start = column_start(bytes, column + i);
#pragma GCC unroll 4
        for (int b = 0; b < 4; ++b) {
          const int64_t j = start + b;
          if (j < 4 * (column + i) || j >= bytes) continue;  // of the column before; of the next key
          const __m512i code = planes[b];
          wrong |= _mm512_cmpgt_epu8_mask(code, last);
          const __mmask64 bit7 = _mm512_movepi8_mask(code), bit6 = _mm512_movepi8_mask(_mm512_slli_epi16(code, 1));
#pragma GCC unroll 4
          for (int h = 0; h < KH; ++h) {
            const uint8_t* const e = entries[h] + j * 256;
            __m512i found = _mm512_permutexvar_epi8(code, _mm512_loadu_si512(e));
            found = _mm512_mask_permutexvar_epi8(found, bit6 & ~bit7, code, _mm512_loadu_si512(e + 64));
            found = _mm512_mask_permutexvar_epi8(found, bit7 & ~bit6, code, _mm512_loadu_si512(e + 128));
            found = _mm512_mask_permutexvar_epi8(found, bit7 & bit6, code, _mm512_loadu_si512(e + 192));
            all[h] = _mm512_add_epi16(all[h], found);
            odd[h] = _mm512_add_epi16(odd[h], _mm512_srli_epi16(found, 8));
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h) {
      const __m512i even = _mm512_sub_epi16(all[h], _mm512_slli_epi16(odd[h], 8)), none = _mm512_setzero_si512();
      const __m512i low = _mm512_unpacklo_epi16(even, odd[h]), high = _mm512_unpackhi_epi16(even, odd[h]);
      const __m512i quarters[4] = {_mm512_unpacklo_epi16(low, none), _mm512_unpackhi_epi16(low, none),
                                   _mm512_unpacklo_epi16(high, none), _mm512_unpackhi_epi16(high, none)};
      float* const to = out + h * stride + (s - key0);
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const V v = scaled(quarters[q], step[h], base[h]);
        if (n == 64)
          store(to + 16 * q, v);
        else
          store_upto(to + 16 * q, v, n - 16 * q);
      }
    }
  }
  return wrong == 0;
}

inline bool scores_of(const Score& p, int64_t pair, int64_t head, int64_t heads, int64_t key0, int64_t key1, float* out,
                      int64_t stride, bool raw) {
  bool right = false;
  with_codes(p.codes, [&](auto codes) {
    const int64_t bytes = code_bytes(codes(), p.subspaces);
    const auto run = [&](auto kb) {
      with_count<4>(heads, [&](auto kh) {
        const auto by = [&](auto table) {
          right = scores<codes(), kb(), kh(), table()>(p, pair, head, key0, key1, out, stride, raw);
        };
        if constexpr (codes() != Codes::packed4 && kh() == 4)
          if (p.table && !p.int8_table) return by(std::integral_constant<Table, Table::quads>());
        if (!p.int8_table)
          by(std::integral_constant<Table, Table::floats>());
        else if constexpr (codes() == Codes::u8)
          right = scores_of_bytes<kb(), kh()>(p, pair, head, key0, key1, out, stride, raw);
        else
          by(std::integral_constant<Table, Table::bytes>());
      });
    };
    if constexpr (codes() != Codes::packed4) {
      if (p.subspaces == 1) {
        run(std::integral_constant<int, codes() == Codes::u8 ? 1 : 2>());
        return true;
      }
    }
    switch (bytes) {
      case 4: run(std::integral_constant<int, 4>()); break;
      case 8: run(std::integral_constant<int, 8>()); break;
      case 16: run(std::integral_constant<int, 16>()); break;
      case 32: run(std::integral_constant<int, 32>()); break;
      default: run(std::integral_constant<int, 0>());
    }
    return true;
  });
  return right;
}

}  // namespace
}  // namespace effk::vq

#include "vector.h"

namespace effk::vq {
namespace {

void table(const Score& p, int64_t query0, int64_t query1) {
  if (!p.int8_table) return write_quads(p, query0, query1);
  const int64_t bytes = p.subspaces / 2;
  const Buffer<uint8_t> plain(p.subspaces * 16);
  for (int64_t i = query0; i < query1; ++i) {
    const float* const lut = p.lut + i * p.subspaces * p.words;
    uint8_t* const out = p.table + i * table_bytes(p);
    if (p.codes != Codes::packed4) {
      quantize(lut, p.subspaces, p.words, out, p.codes == Codes::u8 ? 256 : p.words, p.scale + 2 * i);
      continue;
    }
    quantize(lut, p.subspaces, p.words, plain.get(), 16, p.scale + 2 * i);
    std::memset(out, 0, table_bytes(p));
    for (int64_t at = 0; at < bytes; ++at) {
      const int64_t column = at / 4, place = at - column_start(bytes, column);
      std::memcpy(out + column * 128 + place * 16, plain.get() + 2 * at * 16, 16);
      std::memcpy(out + column * 128 + 64 + place * 16, plain.get() + (2 * at + 1) * 16, 16);
    }
  }
}

}  // namespace

constinit const Cpu cpu_avx512 = {encode_floats, encode_prepare, encode, transform, lut,         table_bytes,
                                  table,         score,          topk,   attend,    attend_join, wrope};

}  // namespace effk::vq
