// vq with AVX2. Codes are laid out anew for 32 keys at a time, those of a sub-vector next to each other: so vpshufb
// looks words of 4 bits up in registers.
#include <cstring>

#include "../common/cpu.h"
#include "../common/vector_avx2.h"
#include "cpu_common.h"

namespace effk::vq {
namespace {

constexpr int kDotQueries = 2, kValuePairs = 1, kEncodeVectors = 2, kEncodeWords = 6;

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
inline void load_pair(const BFloat16* p, V& a, V& b) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  a = _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  b = _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
template <class T>
inline void load_pair(const T* p, int64_t n, V& a, V& b) {
  T room[2 * kWidth] = {};
  std::memcpy(room, p, (n < 2 * kWidth ? n : 2 * kWidth) * sizeof(T));
  load_pair(room, a, b);
}

inline V larger(V x, V y) { return _mm256_max_ps(x, y); }
inline float largest(V v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline bool any_above(V x, V y) { return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)) != 0; }
inline V nearest_integer(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V power(V n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline V zero_below(V y, V x, float limit) { return _mm256_andnot_ps(_mm256_cmp_ps(x, splat(limit), _CMP_LT_OQ), y); }

using Numbers = __m256i;
inline Numbers load_numbers(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_numbers(int32_t* p, Numbers v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline Numbers splat_number(int32_t i) { return _mm256_set1_epi32(i); }
inline Numbers ranks_of(V v) {
  const Numbers bits = _mm256_castps_si256(v + zero());  // of -0 and 0 one
  const Numbers ranks = _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_blendv_epi8(ranks, splat_number(INT32_MIN), _mm256_castps_si256(nan));
}
inline uint32_t lanes_above(Numbers x, Numbers y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(x, y))));
}
inline int64_t count_above(Numbers x, Numbers y) { return __builtin_popcount(lanes_above(x, y)); }
inline int64_t append(V scores, float threshold, int32_t position, float* kept, int32_t* positions) {
  auto some = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(scores, splat(threshold), _CMP_GE_OQ)));
  if (some == 0) return 0;
  float own[kWidth];
  store(own, scores);
  int64_t n = 0;
  for (; some; some &= some - 1, ++n) {
    const int lane = __builtin_ctz(some);
    kept[n] = own[lane];
    positions[n] = position + lane;
  }
  return n;
}
// Moves the positions of ranks above one to the front, and tells how many they are.
inline int64_t keep_above(const int32_t* ranks, int32_t* positions, int64_t n, int32_t rank) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    positions[kept] = positions[i];
    kept += ranks[i] > rank;
  }
  return kept;
}
// Quads are four neighbours of a vector.
inline V load_quads(const float* p, const int32_t* at) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_load_ps(p + at[0])), _mm_load_ps(p + at[4]), 1);
}
inline void store_quads(float* p, V v) {
  _mm_store_ps(p, _mm256_castps256_ps128(v));
  _mm_store_ps(p + 16, _mm256_extractf128_ps(v, 1));
}
inline void nearer(V x, Numbers at, V& best, Numbers& code) {
  const __m256 less = _mm256_cmp_ps(x, best, _CMP_LT_OQ);
  best = _mm256_blendv_ps(best, x, less);
  code = _mm256_blendv_epi8(code, at, _mm256_castps_si256(less));
}
// To the nearest of 0 to 255, ties to even.
inline void store_bytes(uint8_t* p, V v) {
  const __m256i words = _mm256_packus_epi32(_mm256_cvtps_epi32(v), _mm256_setzero_si256());
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i all = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), all);
}

// --- Codes of 32 keys -----------------------------------------------------------------------------------------------

constexpr int64_t kRun = 32;

// planes[p * kRun + i] = byte p of key i. Eight bytes of a key are read even if it has fewer.
inline void to_planes(const uint8_t* keys, int64_t bytes, uint8_t* planes) {
  for (int64_t byte = 0; byte < bytes; byte += 8) {
    const int64_t at = byte + 8 <= bytes || bytes < 8 ? byte : bytes - 8;
    for (int64_t i = 0; i < kRun; i += 16) {
      __m128i a[16], b[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
        a[j] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(keys + (i + j) * bytes + at));
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) b[j] = _mm_unpacklo_epi8(a[j], a[j + 8]);  // of keys j and j + 8
      // a[4 * h + j]: half h of the bytes, of keys j, j + 4, ...
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        a[j] = _mm_unpacklo_epi8(b[j], b[j + 4]);
        a[4 + j] = _mm_unpackhi_epi8(b[j], b[j + 4]);
      }
      // b[2 * q + j]: quarter q, of keys j, j + 2, ...
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
          b[4 * h + j] = _mm_unpacklo_epi8(a[4 * h + j], a[4 * h + 2 + j]);
          b[4 * h + 2 + j] = _mm_unpackhi_epi8(a[4 * h + j], a[4 * h + 2 + j]);
        }
#pragma GCC unroll 4
      for (int q = 0; q < 4; ++q) {
        const __m128i two[2] = {_mm_unpacklo_epi8(b[2 * q], b[2 * q + 1]), _mm_unpackhi_epi8(b[2 * q], b[2 * q + 1])};
        for (int j = 0; j < 2; ++j)
          if (at + 2 * q + j < bytes)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(planes + (at + 2 * q + j) * kRun + i), two[j]);
      }
    }
  }
}

// --- Scores ---------------------------------------------------------------------------------------------------------

// Of 8 bits, of packed codes 16 entries a sub-vector. Else as they come, and room for a read of four entries at the
// last.
inline int64_t table_bytes(const Score& p) {
  if (!p.int8_table) return quad_bytes(p);
  return p.codes == Codes::packed4 ? (p.subspaces * 16 + 63) / 64 * 64 : (p.subspaces * p.words + 3 + 63) / 64 * 64;
}

template <int KH>
struct Tables {
  const float* floats[KH];
  const uint8_t* entries[KH];
  V step[KH], base[KH];
};

// Of 8 keys each, four times: sums of an 8-bit table's entries as floats, for packed codes.
template <int KH>
inline void sum_packed(const Tables<KH>& t, const uint8_t* planes, int64_t bytes, V (&sums)[KH][4]) {
  __m256i all[KH],
      odd[KH];  // of 16 bits; in `all` a sum's low half is an even key's, its overflow disturbs an odd one's
#pragma GCC unroll 4
  for (int h = 0; h < KH; ++h) all[h] = odd[h] = _mm256_setzero_si256();
  const __m256i half = _mm256_set1_epi8(15);
  for (int64_t byte = 0; byte < bytes; ++byte) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes + byte * kRun));
    const __m256i both[2] = {_mm256_and_si256(codes, half), _mm256_and_si256(_mm256_srli_epi16(codes, 4), half)};
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const auto* from = reinterpret_cast<const __m128i*>(t.entries[h] + (2 * byte + j) * 16);
        const __m256i found = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(from)), both[j]);
        all[h] = _mm256_add_epi16(all[h], found);
        odd[h] = _mm256_add_epi16(odd[h], _mm256_srli_epi16(found, 8));
      }
  }
#pragma GCC unroll 4
  for (int h = 0; h < KH; ++h) {
    const __m256i even = _mm256_sub_epi16(all[h], _mm256_slli_epi16(odd[h], 8));
    const __m256i low = _mm256_unpacklo_epi16(even, odd[h]), high = _mm256_unpackhi_epi16(even, odd[h]);
    const auto floats = [](__m128i v) { return _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(v)); };
    sums[h][0] = floats(_mm256_castsi256_si128(low));
    sums[h][1] = floats(_mm256_castsi256_si128(high));
    sums[h][2] = floats(_mm256_extracti128_si256(low, 1));
    sums[h][3] = floats(_mm256_extracti128_si256(high, 1));
  }
}

inline __m256i eight_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

// The codes of sub-vector j of 8 keys from i on. planes are there unless codes are of 16 bits.
template <Codes C>
inline __m256i eight_codes(const uint8_t* keys, int64_t bytes, const uint8_t* planes, int64_t j, int64_t i) {
  if constexpr (C == Codes::packed4) {
    const __m256i both = eight_bytes(planes + j / 2 * kRun + i);
    return _mm256_and_si256(j % 2 ? _mm256_srli_epi32(both, 4) : both, _mm256_set1_epi32(15));
  } else if constexpr (C == Codes::u8) {
    return eight_bytes(planes + j * kRun + i);
  } else {
    if (bytes == 2) return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys + 2 * i)));
    int32_t codes[8];
    for (int64_t k = 0; k < 8; ++k) codes[k] = static_cast<int32_t>(code_at<C>(keys + (i + k) * bytes, j));
    return load_numbers(codes);
  }
}

// Likewise for all codes and tables; `wrong` gathers lanes whose codes are out of range.
template <Codes C, int KH, Table kTable>
inline void sum_codes(const Tables<KH>& t, const uint8_t* keys, int64_t bytes, const uint8_t* planes, int64_t subspaces,
                      int64_t words, V (&sums)[KH][4], __m256i& wrong) {
  const __m256i last = splat_number(static_cast<int32_t>(words - 1));
  for (int i = 0; i < 4; ++i) {
    __m256i whole[KH];
    V parts[KH];
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h) whole[h] = _mm256_setzero_si256(), parts[h] = zero();
    for (int64_t j = 0; j < subspaces; ++j) {
      __m256i code = eight_codes<C>(keys, bytes, planes, j, 8 * i);
      wrong = _mm256_or_si256(wrong, _mm256_cmpgt_epi32(code, last));
      code = _mm256_min_epi32(code, last);
      if constexpr (kTable == Table::quads) {
        int32_t at[8];
        store_numbers(at, _mm256_slli_epi32(code, 2));
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) parts[r] += load_quads(t.floats[0] + 4 * j * words, at + r);
        continue;
      }
#pragma GCC unroll 4
      for (int h = 0; h < KH; ++h)
        if constexpr (kTable == Table::bytes) {
          const auto* from = reinterpret_cast<const int*>(t.entries[h] + j * words);
          whole[h] = _mm256_add_epi32(whole[h],
                                      _mm256_and_si256(_mm256_i32gather_epi32(from, code, 1), _mm256_set1_epi32(255)));
        } else if (C == Codes::packed4 && words == 16) {
          const float* const from = t.floats[h] + j * 16;
          const V low = _mm256_permutevar8x32_ps(load(from), code),
                  high = _mm256_permutevar8x32_ps(load(from + 8), code);
          parts[h] += _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        } else {
          parts[h] += _mm256_i32gather_ps(t.floats[h] + j * words, code, 4);
        }
    }
    if constexpr (kTable == Table::quads) transpose_quads(parts);
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h) sums[h][i] = kTable == Table::bytes ? _mm256_cvtepi32_ps(whole[h]) : parts[h];
  }
}

template <Codes C, int KH, Table kTable>
[[gnu::noinline]] bool scores(const Score& p, int64_t pair, int64_t head, int64_t key0, int64_t key1, float* out,
                              int64_t stride, bool raw) {
  Tables<KH> t;
  for (int h = 0; h < KH; ++h) {
    const int64_t query = first_query(p, pair) + head + h;
    t.floats[h] = p.lut + query * p.subspaces * p.words;
    if (kTable == Table::quads) t.floats[h] = quads_of(p, query);
    if (kTable != Table::bytes) continue;
    t.entries[h] = p.table + query * table_bytes(p);
    const bool whole = raw && p.scale[2 * query] == p.scale[2 * query];
    t.step[h] = splat(whole ? 1 : p.scale[2 * query]);
    t.base[h] = splat(whole ? 0 : p.scale[2 * query + 1]);
  }
  const int64_t bytes = code_bytes(C, p.subspaces);
  const auto* keys = reinterpret_cast<const uint8_t*>(codes_of(p, pair)) + key0 * bytes;
  const Buffer<uint8_t> planes(bytes * kRun), room(bytes * kRun + 8);
  __m256i wrong = _mm256_setzero_si256();
  const int64_t beyond = bytes < 8 ? kRun + 8 : kRun;  // keys that a block may read of
  for (int64_t s = key0; s < key1; s += kRun, keys += kRun * bytes) {
    const int64_t n = key1 - s < kRun ? key1 - s : kRun;
    const uint8_t* from = keys;
    if (s + beyond > key1) {
      std::memset(room.get(), 0, bytes * kRun + 8);
      std::memcpy(room.get(), keys, n * bytes);
      from = room.get();
    }
    V sums[KH][4];
    if constexpr (C != Codes::i16) to_planes(from, bytes, planes.get());
    if constexpr (C == Codes::packed4 && kTable == Table::bytes) {
      if (p.words < 16) {
        const __m256i half = _mm256_set1_epi8(15), last = _mm256_set1_epi8(static_cast<char>(p.words - 1));
        for (int64_t i = 0; i < bytes * kRun; i += 32) {
          const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(planes.get() + i));
          wrong = _mm256_or_si256(wrong, _mm256_cmpgt_epi8(_mm256_and_si256(v, half), last));
          wrong = _mm256_or_si256(wrong, _mm256_cmpgt_epi8(_mm256_and_si256(_mm256_srli_epi16(v, 4), half), last));
        }
      }
      sum_packed<KH>(t, planes.get(), bytes, sums);
    } else {
      sum_codes<C, KH, kTable>(t, from, bytes, planes.get(), p.subspaces, p.words, sums, wrong);
    }
#pragma GCC unroll 4
    for (int h = 0; h < KH; ++h)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        V v = sums[h][i];
        if constexpr (kTable == Table::bytes) {
          V product = v * t.step[h];
          asm("" : "+x"(product));  // rounded: no sum of both in one
          v = product + t.base[h];
        }
        float* const to = out + h * stride + (s - key0) + 8 * i;
        if (n == kRun)
          store(to, v);
        else
          store_upto(to, v, n - 8 * i);
      }
  }
  return _mm256_testz_si256(wrong, wrong);
}

inline bool scores_of(const Score& p, int64_t pair, int64_t head, int64_t heads, int64_t key0, int64_t key1, float* out,
                      int64_t stride, bool raw) {
  return with_codes(p.codes, [&](auto codes) {
    bool right = false;
    with_count<4>(heads, [&](auto kh) {
      const auto run = [&](auto table) {
        right = scores<codes(), kh(), table()>(p, pair, head, key0, key1, out, stride, raw);
      };
      if constexpr (codes() != Codes::packed4 && kh() == 4)
        if (p.table && !p.int8_table) return run(std::integral_constant<Table, Table::quads>());
      if (p.int8_table)
        run(std::integral_constant<Table, Table::bytes>());
      else
        run(std::integral_constant<Table, Table::floats>());
    });
    return right;
  });
}

}  // namespace
}  // namespace effk::vq

#include "vector.h"

namespace effk::vq {
namespace {

void table(const Score& p, int64_t query0, int64_t query1) {
  if (!p.int8_table) return write_quads(p, query0, query1);
  for (int64_t i = query0; i < query1; ++i)
    quantize(p.lut + i * p.subspaces * p.words, p.subspaces, p.words, p.table + i * table_bytes(p),
             p.codes == Codes::packed4 ? 16 : p.words, p.scale + 2 * i);
}

}  // namespace

constinit const Cpu cpu_avx2 = {encode_floats, encode_prepare, encode, transform, lut,         table_bytes,
                                table,         score,          topk,   attend,    attend_join, wrope};

}  // namespace effk::vq
