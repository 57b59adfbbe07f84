// lora with AVX-512. Products of bfloat16 numbers are made two at a time by vdpbf16ps.
#include "../common/vector_avx512.h"

namespace effk::lora {
namespace {

constexpr int kVectors = 4;

inline __m512i two(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
inline __m512i round_two(V low, V high, const Half*) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return two(_mm512_cvtps_ph(low, kNearest), _mm512_cvtps_ph(high, kNearest));
}
// The instruction rounds as wanted but for subnormal numbers, which it takes for zero.
inline __m512i round_two(V low, V high, const BFloat16*) {
  constexpr int kSubnormal = 0x20;
  if (_mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal)) [[unlikely]]
    return two(to_bfloat16(low), to_bfloat16(high));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

inline bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
inline void store_row(float* p, const V (&v)[kVectors], bool stream) {
  stream = stream && can_stream(p);
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; ++j) stream ? _mm512_stream_ps(p + j * kWidth, v[j]) : store(p + j * kWidth, v[j]);
}
template <class T>
inline void store_row(T* p, const V (&v)[kVectors], bool stream) {
  stream = stream && can_stream(p);
#pragma GCC unroll 16
  for (int j = 0; j < kVectors; j += 2, p += 2 * kWidth) {
    const __m512i both = round_two(v[j], v[j + 1], p);
    stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(p), both) : _mm512_storeu_si512(p, both);
  }
}

}  // namespace
}  // namespace effk::lora

#include "vector.h"

namespace effk::lora {
namespace {

using Pair = uint32_t;       // two neighbouring numbers of a sum, as vdpbf16ps takes them
constexpr int kDotRows = 3;  // of a tile, which has two sets of sums: of an adapter and of all

// The number of pairs of a rank: an odd one is filled with a zero.
inline int64_t pairs_of(int64_t rank) { return (rank + 1) / 2; }

// Two rows of kTile columns as pairs.
inline void interleave(const BFloat16* even, const BFloat16* odd, int64_t cols, Pair* to) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t k = 0; k < kTile; k += 32) {
    const int64_t n = cols - k;
    const __mmask32 mask = n >= 32 ? ~0u : n > 0 ? (1u << n) - 1 : 0;
    const __m512i x = _mm512_maskz_loadu_epi16(mask, even + k);
    const __m512i y = odd ? _mm512_maskz_loadu_epi16(mask, odd + k) : _mm512_setzero_si512();
    _mm512_storeu_si512(to + k, _mm512_permutex2var_epi16(x, low, y));
    _mm512_storeu_si512(to + k + 16, _mm512_permutex2var_epi16(x, high, y));
  }
}

// As merge_tile(); panel [pairs, kTile] of a and b [MR, pairs], all adapters' one after the other.
template <int MR>
inline void dot_tile(const Merge& m, const Layer& layer, const Tile<MR, BFloat16>& tile, const Pair* panel,
                     const Pair* b, int64_t pairs) {
  V sums[MR][kVectors];
  tile.load(sums);
  for (int64_t one = 0; one < m.num_active; ++one) {
    V products[MR][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) products[i][j] = zero();
    const Pair* const end = panel + pairs_of(used_rank(m.active[one], layer)) * kTile;
    for (; panel < end; panel += kTile, ++b) {
      __m512bh a[kVectors];
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) a[j] = (__m512bh)_mm512_loadu_si512(panel + j * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(b[i * pairs]));
#pragma GCC unroll 16
        for (int j = 0; j < kVectors; ++j) products[i][j] = dot(pair, a[j], products[i][j]);
      }
    }
    const V factor = splat(m.active[one].factor);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVectors; ++j) sums[i][j] = fma(factor, products[i][j], sums[i][j]);
  }
  tile.store(sums, m.stream);
}

void merge_dots(const Merge& m, const Layer& layer, int64_t row0, int64_t row1) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < m.num_active; ++i) pairs += pairs_of(used_rank(m.active[i], layer));
  const int64_t rows = row1 - row0, tiles = panel_tiles(pairs * sizeof(Pair), layer.cols), width = tiles * kTile;
  const Buffer<Pair> b(rows * pairs), panel(width * pairs);
  for (int64_t i = 0, at = 0; i < m.num_active; ++i) {
    const Active& one = m.active[i];
    const int64_t used = used_rank(one, layer);
    const BFloat16* from = static_cast<const BFloat16*>(layer.b) + (one.adapter * layer.rows + row0) * layer.rank;
    for (int64_t n = 0; n < rows; ++n, from += layer.rank) {
      Pair* to = b.get() + n * pairs + at;
      if (used % 2) to[used / 2] = 0;
      std::memcpy(to, from, used * sizeof(BFloat16));
    }
    at += pairs_of(used);
  }
  for (int64_t k0 = 0; k0 < layer.cols; k0 += width) {
    const int64_t k1 = k0 + width < layer.cols ? k0 + width : layer.cols;
    Pair* to = panel.get();
    for (int64_t k = k0; k < k1; k += kTile)
      for (int64_t i = 0; i < m.num_active; ++i) {
        const Active& one = m.active[i];
        const BFloat16* a = static_cast<const BFloat16*>(layer.a) + one.adapter * layer.rank * layer.cols + k;
        const int64_t used = used_rank(one, layer);
        for (int64_t r = 0; r < used; r += 2, a += 2 * layer.cols, to += kTile)
          interleave(a, r + 1 < used ? a + layer.cols : nullptr, layer.cols - k, to);
      }
    for (int64_t n = 0; n < rows; n += kDotRows)
      with_count<kDotRows>(rows - n, [&](auto count) {
        for (int64_t k = k0; k < k1; k += kTile)
          dot_tile(m, layer, Tile<count(), BFloat16>(layer, row0 + n, k), panel.get() + (k - k0) * pairs,
                   b.get() + n * pairs, pairs);
      });
  }
}

void merge(const Merge& m, const Layer& layer, int64_t row0, int64_t row1) {
  if (m.type == Type::bf16 && m.num_active > 0)
    merge_dots(m, layer, row0, row1);
  else
    merge_floats(m, layer, row0, row1);
  if (m.stream) _mm_sfence();
}

}  // namespace

constinit const Cpu cpu_avx512 = {merge, shrink_floats, expand};

}  // namespace effk::lora
