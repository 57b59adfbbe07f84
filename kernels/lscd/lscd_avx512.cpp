// lscd with AVX-512 (VBMI2 and BF16). An 8x8 sub-tile is expanded into registers as 4 rows x 8 columns of bfloat16, or
// 2 rows x 8 columns of float32, a register, and multiplied with the 8 inputs broadcast to every row. So each sum is
// spread over 4 or 8 lanes, which are added once, at the end of a row.
#include "../common/avx512.h"
#include "cpu_common.h"

namespace effk::lscd {
namespace {

// --- Expansion ------------------------------------------------------------------------------------------------------
// In assembly for two reasons. The compiler would fold the load into the instruction, which is several times slower
// from an unaligned address. And the instruction waits for the old contents of its destination even where a zeroing
// mask makes them irrelevant; clearing the register first, which costs nothing, breaks that chain (3x on Zen 5).
#define EFFK_MASKED(name, instruction, mask)                                                      \
  inline __m512i name(mask k, __m512i v) {                                                        \
    __m512i out;                                                                                  \
    asm("vpxord %0, %0, %0\n\t" instruction " %1, %0%{%2%}%{z%}" : "=&v"(out) : "v"(v), "Yk"(k)); \
    return out;                                                                                   \
  }
EFFK_MASKED(expand8, "vpexpandb", __mmask64)
EFFK_MASKED(expand16, "vpexpandw", __mmask32)
EFFK_MASKED(expand32, "vpexpandd", __mmask16)
EFFK_MASKED(compress8, "vpcompressb", __mmask64)
EFFK_MASKED(compress16, "vpcompressw", __mmask32)
EFFK_MASKED(compress32, "vpcompressd", __mmask16)
#undef EFFK_MASKED

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline int popcount(uint64_t m) { return static_cast<int>(_mm_popcnt_u64(m)); }

template <int I>
struct Index {
  static constexpr int value = I;
};

inline __m512 quarter_to_float(__m512i bytes, int i) {
  const __m128i q = i == 0   ? _mm512_castsi512_si128(bytes)
                    : i == 1 ? _mm512_extracti32x4_epi32(bytes, 1)
                    : i == 2 ? _mm512_extracti32x4_epi32(bytes, 2)
                             : _mm512_extracti32x4_epi32(bytes, 3);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
}

// --- Arithmetic -----------------------------------------------------------------------------------------------------
// A Math says what a register of weights holds. Its decode() expands the word of one sub-tile from v on, advances v,
// and calls f(Index<group>, register).
struct Float32Math {
  using X = float;
  using Register = __m512;
  static constexpr int kGroups = 4;        // of a sub-tile: 2 rows each
  static constexpr int kDirectTokens = 3;  // whose sums for a strip fit in registers
  static constexpr int kPanelStrips = 1;
  static constexpr int kBlockTiles = 1;

  static Register broadcast(const X* x) { return _mm512_broadcast_f32x8(_mm256_loadu_ps(x)); }
  static __m512 multiply_add(Register w, Register x, __m512 sum) { return _mm512_fmadd_ps(w, x, sum); }
  static void store(void* p, Register w) { _mm512_store_ps(p, w); }
  static Register load(const void* p) { return _mm512_load_ps(p); }

  template <class F>
  static void decode(uint64_t m, const float*& v, const F& f) {
    const float* v1 = v + popcount(m & 0xffff);
    const float* v2 = v + popcount(m & 0xffffffff);
    const float* v3 = v + popcount(m & 0xffffffffffff);
    f(Index<0>{}, _mm512_castsi512_ps(expand32(static_cast<__mmask16>(m), lscd::load(v))));
    f(Index<1>{}, _mm512_castsi512_ps(expand32(static_cast<__mmask16>(m >> 16), lscd::load(v1))));
    f(Index<2>{}, _mm512_castsi512_ps(expand32(static_cast<__mmask16>(m >> 32), lscd::load(v2))));
    f(Index<3>{}, _mm512_castsi512_ps(expand32(static_cast<__mmask16>(m >> 48), lscd::load(v3))));
    v += popcount(m);
  }
  template <class F>
  static void decode(uint64_t m, const Half*& v, const F& f) {
    const __m512i upper = expand16(static_cast<__mmask32>(m), lscd::load(v));
    const __m512i lower = expand16(static_cast<__mmask32>(m >> 32), lscd::load(v + popcount(m & 0xffffffff)));
    f(Index<0>{}, _mm512_cvtph_ps(_mm512_castsi512_si256(upper)));
    f(Index<1>{}, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(upper, 1)));
    f(Index<2>{}, _mm512_cvtph_ps(_mm512_castsi512_si256(lower)));
    f(Index<3>{}, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(lower, 1)));
    v += popcount(m);
  }
  template <class F>
  static void decode(uint64_t m, const BFloat16*& v, const F& f) {
    const auto widen = [](__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); };
    const __m512i upper = expand16(static_cast<__mmask32>(m), lscd::load(v));
    const __m512i lower = expand16(static_cast<__mmask32>(m >> 32), lscd::load(v + popcount(m & 0xffffffff)));
    f(Index<0>{}, widen(_mm512_castsi512_si256(upper)));
    f(Index<1>{}, widen(_mm512_extracti64x4_epi64(upper, 1)));
    f(Index<2>{}, widen(_mm512_castsi512_si256(lower)));
    f(Index<3>{}, widen(_mm512_extracti64x4_epi64(lower, 1)));
    v += popcount(m);
  }
  template <class F>
  static void decode(uint64_t m, const int8_t*& v, const F& f) {
    const __m512i all = expand8(m, lscd::load(v));
    f(Index<0>{}, quarter_to_float(all, 0));
    f(Index<1>{}, quarter_to_float(all, 1));
    f(Index<2>{}, quarter_to_float(all, 2));
    f(Index<3>{}, quarter_to_float(all, 3));
    v += popcount(m);
  }

  // The 16 sums of a strip from their 8 registers of 2 rows x 8 lanes.
  static __m512 reduce(const __m512* sums);
};

struct BFloat16Math {
  using X = BFloat16;
  using Register = __m512i;
  static constexpr int kGroups = 2;  // of a sub-tile: 4 rows each
  static constexpr int kDirectTokens = 5;
  static constexpr int kPanelStrips = 2;
  static constexpr int kBlockTiles = 2;

  static Register broadcast(const X* x) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  static __m512 multiply_add(Register w, Register x, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static void store(void* p, Register w) { _mm512_store_si512(p, w); }
  static Register load(const void* p) { return _mm512_load_si512(p); }

  template <class F>
  static void decode(uint64_t m, const BFloat16*& v, const F& f) {
    f(Index<0>{}, expand16(static_cast<__mmask32>(m), lscd::load(v)));
    f(Index<1>{}, expand16(static_cast<__mmask32>(m >> 32), lscd::load(v + popcount(m & 0xffffffff))));
    v += popcount(m);
  }
  template <class F>
  static void decode(uint64_t m, const int8_t*& v, const F& f) {  // exact: 8 bits hold -128 to 127
    const __m512i all = expand8(m, lscd::load(v));
    const auto pair = [&](int i) {
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(quarter_to_float(all, i + 1), quarter_to_float(all, i)));
    };
    f(Index<0>{}, pair(0));
    f(Index<1>{}, pair(2));
    v += popcount(m);
  }

  static __m512 reduce(const __m512* s) {  // 4 registers of 4 rows x 4 lanes
    const __m512 s01 = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
    const __m512 s23 = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
    const __m512 rows = _mm512_add_ps(_mm512_shuffle_ps(s01, s23, 0x44), _mm512_shuffle_ps(s01, s23, 0xee));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_permutexvar_ps(order, rows);
  }
};

inline __m512 Float32Math::reduce(const __m512* s) {
  __m512 folded[4];
  for (int i = 0; i < 4; ++i)
    folded[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0xdd));
  return BFloat16Math::reduce(folded);
}

// --- Linear ---------------------------------------------------------------------------------------------------------
// x is prepared in chunks of tokens; inside a chunk, blocks of columns follow each other, [tokens, columns] each, so
// that what one block of weights needs is contiguous.
constexpr int64_t kChunk = 256;      // tokens for which weights are expanded once
constexpr int64_t kGroupStrips = 4;  // strips that share a block of x while it is in the cache

template <class M>
struct Layout {
  const Linear& a;
  int64_t padded, chunk_start, chunk_tokens;

  Layout(const Linear& args, int64_t first_token)
      : a(args), padded(args.w.shape.padded_cols()), chunk_start(first_token / kChunk * kChunk) {
    const int64_t rest = a.tokens - chunk_start;
    chunk_tokens = rest < kChunk ? rest : kChunk;
  }
  int64_t block_cols(int64_t tile) const {  // of the block that holds this tile
    const int64_t first = tile / M::kBlockTiles * M::kBlockTiles * kTileCols;
    return padded - first < M::kBlockTiles * kTileCols ? padded - first : M::kBlockTiles * kTileCols;
  }
  // Where token's inputs for a tile are.
  typename M::X* at(int64_t token, int64_t tile) const {
    const int64_t first = tile / M::kBlockTiles * M::kBlockTiles * kTileCols;
    return static_cast<typename M::X*>(a.prepared) + chunk_start * padded + first * chunk_tokens +
           (token - chunk_start) * block_cols(tile) + (tile * kTileCols - first);
  }
};

inline void convert(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void convert(const BFloat16* from, BFloat16* to, int64_t n) { std::memcpy(to, from, n * sizeof(BFloat16)); }
inline void convert(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}

template <class M, class X>
void prepare(const Linear& a, int64_t t0, int64_t t1) {
  using E = typename M::X;
  for (int64_t t = t0; t < t1; ++t) {
    const Layout<M> layout(a, t);
    const X* x = static_cast<const X*>(a.x) + t * a.x_token_stride;
    for (int64_t tile = 0; tile < a.w.shape.tiles(); ++tile) {
      E* to = layout.at(t, tile);
      const int64_t col = tile * kTileCols;
      const int64_t room = layout.padded - col < kTileCols ? layout.padded - col : kTileCols;
      const int64_t rest = a.w.shape.cols - col, cols = rest < room ? rest : room;
      if (a.x_col_stride == 1)
        convert(x + col, to, cols);
      else
        for (int64_t i = 0; i < cols; ++i) convert(x + (col + i) * a.x_col_stride, to + i, 1);
      for (int64_t i = cols; i < room; ++i) to[i] = E{};
    }
  }
}

// Ends the 16 sums of a token: scale, bias and activation in float32, then one rounding.
template <class X>
void write(const Linear& a, int64_t s, int64_t token, __m512 v) {
  const int64_t row = s * kStripRows, rest = a.w.shape.rows - row;
  const __mmask16 k = rest < kStripRows ? (1u << rest) - 1 : 0xffff;
  if (a.scale) v = _mm512_mul_ps(v, load_floats(a.scale + row, k));
  if (a.bias) v = _mm512_add_ps(v, load_floats(static_cast<const X*>(a.bias) + row, k));
  if (a.activation == Activation::relu) {
    v = _mm512_max_ps(_mm512_setzero_ps(), v);  // NaN stays: the second operand is returned then
  } else if (a.activation != Activation::none) {
    alignas(64) float out[kStripRows];
    _mm512_store_ps(out, v);
    for (float& f : out) f = activate(f, a.activation);
    v = _mm512_load_ps(out);
  }
  store_floats(static_cast<X*>(a.y) + token * a.w.shape.rows + row, k, v);
}

// Few tokens: sums stay in registers from the first column to the last, and no weight is ever stored expanded.
template <class M, class V, class X, int N>
bool linear_direct(const Linear& a, int64_t s, Status* status) {
  constexpr int kGroups = kStripSubs * M::kGroups;
  constexpr int kSets = N == 1 ? 2 : 1;  // one token alone would wait for its own sums
  const Layout<M> layout(a, 0);
  __m512 sums[kSets][N][kGroups];
  for (auto& set : sums)
    for (auto& token : set)
      for (auto& sum : token) sum = _mm512_setzero_ps();

  const auto add_tile = [&](const Tile& tile, const V*& v) {
    const int64_t t = tile.sub_col / kTileSubCols;
    const typename M::X* x = layout.at(0, t);
    const int64_t stride = layout.block_cols(t);
    const uint64_t* words = tile.words;
    for (int64_t c = 0; c < tile.sub_cols; c += 2) {
      fetch_ahead(v, words + 2 * c);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        auto& set = sums[i % kSets];
        typename M::Register xs[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) xs[n] = M::broadcast(x + n * stride + (c + i) * kSub);
#pragma GCC unroll 2
        for (int h = 0; h < kStripSubs; ++h)
          M::decode(words[2 * (c + i) + h], v, [&](auto g, typename M::Register w) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
              auto& sum = set[n][h * M::kGroups + g.value];
              sum = M::multiply_add(w, xs[n], sum);
            }
          });
      }
    }
  };
  for (int64_t t = 0; t < a.w.shape.tiles(); ++t)
    if (!read_tile<V>(a.w, s, t, status, add_tile)) return false;
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    if constexpr (kSets == 2)
      for (int g = 0; g < kGroups; ++g) sums[0][n][g] = _mm512_add_ps(sums[0][n][g], sums[1][n][g]);
    write<X>(a, s, n, M::reduce(sums[0][n]));
  }
  return true;
}

// Packed weights that are needed soon, to be fetched from memory while others are multiplied.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  int64_t step = 64;  // bytes between two steps of work
};

// Many tokens: a block of weights is expanded into a panel in the cache and used for all tokens of a chunk. Weights of
// 8 registers times 3 tokens make the best use of the load ports: broadcasts of x are dear (10% over 4 times 6).
constexpr int kPanelGroups = 8;
constexpr int kPanelTokens = 3;

template <class M>
struct Panel {
  static constexpr int kStripGroups = kStripSubs * M::kGroups;
  static constexpr int64_t kPanels = kGroupStrips / M::kPanelStrips;  // that share a block of x
  static_assert(M::kPanelStrips * kStripGroups == kPanelGroups);

  alignas(64) char weights[M::kBlockTiles * kTileSubCols * kPanelGroups * 64];  // [sub columns][strips][groups]
  alignas(64) float sums[kPanels][kChunk][M::kPanelStrips][kStripGroups][16];
};

// sums[N][groups] += expanded weights [sub_cols][groups] times x.
template <class M, int N>
void multiply_panel(const char* panel, int64_t sub_cols, const typename M::X* x, int64_t stride, bool first, float* to,
                    Ahead& ahead) {
  __m512 sums[N][kPanelGroups];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int g = 0; g < kPanelGroups; ++g)
      sums[n][g] = first ? _mm512_setzero_ps() : _mm512_load_ps(to + (n * kPanelGroups + g) * 16);
  // Into the first cache: what the next call starts with, its sums and its tokens.
  const char *next_sums = reinterpret_cast<const char*>(to + N * kPanelGroups * 16),
             *const sums_end = next_sums + N * kPanelGroups * 64,
             *next_x = reinterpret_cast<const char*>(x + N * stride), *const x_end = next_x + N * stride * sizeof(*x);
  for (int64_t c = 0; c < sub_cols; ++c) {
    if (ahead.at < ahead.end)
      for (int64_t i = 0; i < ahead.step; i += 64, ahead.at += 64) _mm_prefetch(ahead.at, _MM_HINT_T1);
    if (next_sums < sums_end) _mm_prefetch(next_sums, _MM_HINT_T0), next_sums += 64;
    if (next_x < x_end) _mm_prefetch(next_x, _MM_HINT_T0), next_x += 64;
    typename M::Register xs[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) xs[n] = M::broadcast(x + n * stride + c * kSub);
#pragma GCC unroll 8
    for (int g = 0; g < kPanelGroups; ++g) {
      const typename M::Register w = M::load(panel + (c * kPanelGroups + g) * 64);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[n][g] = M::multiply_add(w, xs[n], sums[n][g]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int g = 0; g < kPanelGroups; ++g) _mm512_store_ps(to + (n * kPanelGroups + g) * 16, sums[n][g]);
}

template <class M, class... Args>
void multiply_panel_of(int64_t tokens, Args&&... args) {
  switch (tokens) {
    case 1: return multiply_panel<M, 1>(args...);
    case 2: return multiply_panel<M, 2>(args...);
    case 3: return multiply_panel<M, 3>(args...);
  }
}

// Expands the tiles [t0, t1) of a strip, fetching the words of a later block; false when a tile is corrupt.
template <class M, class V>
bool expand_block(const Packed& p, int64_t s, int64_t t0, int64_t t1, char* panel, const uint64_t* next_words,
                  Status* status) {
  const auto expand_tile = [&](const Tile& tile, const V*& v) {
    for (int64_t c = 0; c < tile.sub_cols; ++c, panel += kPanelGroups * 64, next_words += kStripSubs) {
      __builtin_prefetch(next_words);
#pragma GCC unroll 2
      for (int h = 0; h < kStripSubs; ++h)
        M::decode(tile.words[c * kStripSubs + h], v,
                  [&](auto g, typename M::Register w) { M::store(panel + (h * M::kGroups + g.value) * 64, w); });
    }
  };
  for (int64_t t = t0; t < t1; ++t)
    if (!read_tile<V>(p, s, t, status, expand_tile)) return false;
  return true;
}

// The values of tiles [t0, t1) of a strip, to be fetched within `steps`. Nothing is checked: fetching ahead from a
// wrong address does no harm.
template <class V>
Ahead values_of(const Packed& p, int64_t s, int64_t t0, int64_t t1, int64_t steps) {
  const int64_t tiles = p.shape.tiles(), begin = p.offsets[s * tiles + t0], end = p.offsets[s * tiles + t1];
  const auto address = reinterpret_cast<uintptr_t>(p.values) + static_cast<uintptr_t>(begin) * sizeof(V);
  const int64_t most = (t1 - t0) * kTileWeights * static_cast<int64_t>(sizeof(V)) / 64;
  int64_t lines = static_cast<int64_t>((static_cast<uint64_t>(end) - begin) * sizeof(V) / 64);
  lines = lines < 0 ? 0 : lines < most ? lines : most;
  return {reinterpret_cast<const char*>(address), reinterpret_cast<const char*>(address + lines * 64),
          (lines + steps - 1) / steps * 64};
}

// Strips [s0, s1), at most kGroupStrips, for one chunk of tokens.
template <class M, class V, class X>
bool linear_chunk(const Linear& a, int64_t chunk, int64_t s0, int64_t s1, Panel<M>& work, Status* status) {
  using P = Panel<M>;
  const int64_t tiles = a.w.shape.tiles(), sub_cols = a.w.shape.sub_cols();
  const auto block_end = [&](int64_t t) { return t + M::kBlockTiles < tiles ? t + M::kBlockTiles : tiles; };
  const Layout<M> layout(a, chunk);
  const int64_t tokens = layout.chunk_tokens, parts = (tokens + kPanelTokens - 1) / kPanelTokens;
  const int64_t few = tokens / parts, more_parts = tokens % parts;              // as even as can be
  const int64_t strip_parts = (parts + M::kPanelStrips - 1) / M::kPanelStrips;  // for fetching a strip's values ahead
  for (int64_t t = 0; t < tiles; t = block_end(t)) {
    const int64_t t1 = block_end(t), end = t1 * kTileSubCols < sub_cols ? t1 * kTileSubCols : sub_cols;
    for (int64_t s = s0; s < s1; s += M::kPanelStrips) {
      // The block after this one: of the next strips, else of the next tiles, else of the next group of strips.
      const bool down = s + M::kPanelStrips < s1, right = !down && t1 < tiles;
      const int64_t next_s = down ? s + M::kPanelStrips : right ? s0 : s1, next_t = down ? t : right ? t1 : 0;
      Ahead ahead[M::kPanelStrips];
      for (int64_t i = 0; i < M::kPanelStrips; ++i) {
        // Where the last panel has fewer strips, what it holds of an earlier one is multiplied and dropped.
        if (s + i >= s1) continue;
        const bool more = next_s + i < a.w.shape.strips();
        const uint64_t* next_words = tile_at(a.w, more ? next_s + i : s + i, more ? next_t : t).words;
        if (!expand_block<M, V>(a.w, s + i, t, t1, work.weights + i * P::kStripGroups * 64, next_words, status))
          return false;
        if (more)
          ahead[i] = values_of<V>(a.w, next_s + i, next_t, block_end(next_t), strip_parts * (end - t * kTileSubCols));
      }
      auto& sums = work.sums[(s - s0) / M::kPanelStrips];
      for (int64_t i = 0, n0 = 0; i < parts; ++i) {
        const int64_t n = few + (i < more_parts);
        multiply_panel_of<M>(n, work.weights, end - t * kTileSubCols, layout.at(chunk + n0, t), layout.block_cols(t),
                             t == 0, &sums[n0][0][0][0], ahead[i >= strip_parts]);
        n0 += n;
      }
    }
  }
  for (int64_t s = s0; s < s1; ++s)
    for (int64_t n = 0; n < tokens; ++n) {
      const auto& from = work.sums[(s - s0) / M::kPanelStrips][n][(s - s0) % M::kPanelStrips];
      __m512 sums[P::kStripGroups];
      for (int g = 0; g < P::kStripGroups; ++g) sums[g] = tiles ? _mm512_load_ps(from[g]) : _mm512_setzero_ps();
      write<X>(a, s, chunk + n, M::reduce(sums));
    }
  return true;
}

// --- Linear, computed as sparse -------------------------------------------------------------------------------------
// Where few weights are left, multiplying each by its input for 32 tokens beats expanding them. Sums and inputs are
// then tokens across, and live in memory: [rows or columns][32].
constexpr int64_t kLaneTokens = 32;
constexpr int64_t kSparseStrips = 32;  // that share a tile of x while it is in the cache

// The cheaper way by cycles a sub-tile, as measured on Zen 5 (2048x4096, 80% to 98% pruned, 16 to 256 tokens).
inline bool computes_as_sparse(const Linear& a) {
  const double words = static_cast<double>(a.w.shape.words());
  const double per_word = static_cast<double>(a.w.num_values - kValuePad) / words;  // stored weights
  const double tokens = static_cast<double>(a.tokens),
               chunks = static_cast<double>((a.tokens + kLaneTokens - 1) / kLaneTokens);
  const double dense = 5 + tokens * (a.x_type == Type::bf16 ? 1.15 : 2.9);
  const double transpose = 128.0 / static_cast<double>(a.w.shape.strips());  // x, once for all strips
  const double sparse = chunks * (23 + 5.1 * per_word + transpose);
  return a.tokens >= kLaneTokens / 2 && words > 0 && sparse < 0.9 * dense;
}

// x as [chunks][padded columns][32], then a byte a token: whether it has an infinity or NaN.
struct Lanes {
  const Linear& a;
  int64_t padded, chunks;
  explicit Lanes(const Linear& args)
      : a(args), padded(args.w.shape.padded_cols()), chunks((args.tokens + kLaneTokens - 1) / kLaneTokens) {}
  int64_t bytes() const { return chunks * kLaneTokens * (padded * 4 + 1); }
  float* at(int64_t token, int64_t col) const {
    return static_cast<float*>(a.prepared) + (token / kLaneTokens * padded + col) * kLaneTokens + token % kLaneTokens;
  }
  uint8_t& special(int64_t token) const {
    return reinterpret_cast<uint8_t*>(static_cast<float*>(a.prepared) + chunks * kLaneTokens * padded)[token];
  }
};

template <class X>
void prepare_lanes(const Linear& a, int64_t t0, int64_t t1) {
  const Lanes lanes(a);
  const int64_t end = t1 == a.tokens ? lanes.chunks * kLaneTokens : t1;  // whoever has the last token pads
  for (int64_t chunk = t0 / kLaneTokens * kLaneTokens; chunk < end; chunk += kLaneTokens) {
    const int64_t n0 = t0 > chunk ? t0 - chunk : 0, n1 = end - chunk < kLaneTokens ? end - chunk : kLaneTokens;
    const int64_t there = a.tokens - chunk < n1 ? a.tokens - chunk : n1;
    const X* x = static_cast<const X*>(a.x) + chunk * a.x_token_stride;
    float zeros[kLaneTokens] = {};  // stay so, unless an input isn't finite
    for (int64_t c = 0; c < lanes.padded; ++c) {
      float* to = lanes.at(chunk, c);
      const int64_t filled = c < a.w.shape.cols ? there : n0;
      for (int64_t n = n0; n < filled; ++n) {
        to[n] = to_float(x[n * a.x_token_stride + c * a.x_col_stride]);
        zeros[n] += to[n] * 0;
      }
      for (int64_t n = filled; n < n1; ++n) to[n] = 0;
    }
    for (int64_t n = n0; n < n1; ++n) lanes.special(chunk + n) = zeros[n] != 0;
  }
}

// Sums of one tile, of values as float32, into sums[16 rows][32].
inline int64_t multiply_sparse(const Tile& tile, const float* v, const float* x, float* sums) {
  const float* const first = v;
  for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) {
    const float* inputs = x + i / kStripSubs * kSub * kLaneTokens;
    float* rows = sums + i % kStripSubs * kSub * kLaneTokens;
    for (uint64_t m = tile.words[i]; m; m &= m - 1) {
      const int64_t bit = __builtin_ctzll(m);
      const float* in = inputs + bit % kSub * kLaneTokens;
      float* out = rows + bit / kSub * kLaneTokens;
      const __m512 w = _mm512_set1_ps(*v++);
      _mm512_store_ps(out, _mm512_fmadd_ps(w, _mm512_load_ps(in), _mm512_load_ps(out)));
      _mm512_store_ps(out + 16, _mm512_fmadd_ps(w, _mm512_load_ps(in + 16), _mm512_load_ps(out + 16)));
    }
  }
  return v - first;
}

inline __m512 widen(const float* v) { return _mm512_loadu_ps(v); }
inline __m512 widen(const Half* v) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(v))); }
inline __m512 widen(const BFloat16* v) { return load_floats(v, 0xffff); }
inline __m512 widen(const int8_t* v) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v))));
}

template <class M, class V, class X>
void linear_sparse(const Linear& a, int64_t s0, int64_t s1, Status* status) {
  constexpr int64_t kStripFloats = kStripRows * kLaneTokens;
  struct Work {
    alignas(64) float values[kTileWeights + 16], sums[kSparseStrips * kStripFloats];
  };
  const Lanes lanes(a);
  const Buffer<Work> work;
  for (int64_t chunk = 0; chunk < a.tokens; chunk += kLaneTokens)
    for (int64_t g0 = s0; g0 < s1; g0 += kSparseStrips) {
      const int64_t g1 = g0 + kSparseStrips < s1 ? g0 + kSparseStrips : s1;
      std::memset(work->sums, 0, sizeof work->sums);
      for (int64_t t = 0; t < a.w.shape.tiles(); ++t)
        for (int64_t s = g0; s < g1; ++s) {
          const bool good = read_tile<V>(a.w, s, t, status, [&](const Tile& tile, const V*& v) {
            const int64_t held = tile.end - tile.begin, stored = held < kTileWeights ? held : kTileWeights;
            for (int64_t i = 0; i < stored; i += 16) _mm512_store_ps(work->values + i, widen(v + i));
            v += multiply_sparse(tile, work->values, lanes.at(chunk, t * kTileCols),
                                 work->sums + (s - g0) * kStripFloats);
          });
          if (!good) return;
        }
      const int64_t rest = a.tokens - chunk, tokens = rest < kLaneTokens ? rest : kLaneTokens;
      const __m512i every = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                               _mm512_set1_epi32(kLaneTokens));
      for (int64_t s = g0; s < g1; ++s)
        for (int64_t n = 0; n < tokens; ++n)
          write<X>(a, s, chunk + n, _mm512_i32gather_ps(every, work->sums + (s - g0) * kStripFloats + n, 4));
    }

  // Skipped zeros would have made NaN of an infinity or NaN in x. Such tokens are done again, each alone.
  for (int64_t t = 0; t < a.tokens; ++t) {
    if (!lanes.special(t)) continue;
    Linear one = a;
    one.tokens = 1;
    one.x = static_cast<const X*>(a.x) + t * a.x_token_stride;
    one.y = static_cast<X*>(a.y) + t * a.w.shape.rows;
    const Buffer<typename M::X> room(lanes.padded);
    one.prepared = room.get();
    prepare<M, X>(one, 0, 1);
    for (int64_t s = s0; s < s1; ++s)
      if (!linear_direct<M, V, X, 1>(one, s, status)) return;
  }
}

template <class M, class V, class X>
void linear_strips(const Linear& a, int64_t s0, int64_t s1, Status* status) {
  bool (*direct)(const Linear&, int64_t, Status*) = nullptr;
  switch (a.tokens) {
    case 1: direct = linear_direct<M, V, X, 1>; break;
    case 2: direct = linear_direct<M, V, X, 2>; break;
    case 3: direct = linear_direct<M, V, X, 3>; break;
    case 4:
      if constexpr (M::kDirectTokens >= 4) direct = linear_direct<M, V, X, 4>;
      break;
    case 5:
      if constexpr (M::kDirectTokens >= 5) direct = linear_direct<M, V, X, 5>;
      break;
  }
  if (computes_as_sparse(a)) {
    linear_sparse<M, V, X>(a, s0, s1, status);
  } else if (direct) {
    for (int64_t s = s0; s < s1 && direct(a, s, status); ++s) {
    }
  } else {
    const Buffer<Panel<M>> work;
    for (int64_t chunk = 0; chunk < a.tokens; chunk += kChunk)
      for (int64_t s = s0; s < s1; s += kGroupStrips)
        if (!linear_chunk<M, V, X>(a, chunk, s, s + kGroupStrips < s1 ? s + kGroupStrips : s1, *work.get(), status))
          return;
  }
}

// --- Packing --------------------------------------------------------------------------------------------------------
// Which of the n <= 64 weights at w aren't zero.
inline uint64_t nonzeros(const float* w, int64_t n) {
  uint64_t out = 0;
  for (int i = 0; i < 4 && i * 16 < n; ++i) {
    const __mmask16 valid = n - i * 16 >= 16 ? 0xffff : (1u << (n - i * 16)) - 1;
    const __m512i v = _mm512_maskz_loadu_epi32(valid, w + i * 16);
    out |= static_cast<uint64_t>(_mm512_test_epi32_mask(v, _mm512_set1_epi32(0x7fffffff))) << i * 16;
  }
  return out;
}
template <class V>
inline uint64_t nonzeros16(const V* w, int64_t n) {
  uint64_t out = 0;
  for (int i = 0; i < 2 && i * 32 < n; ++i) {
    const __mmask32 valid = n - i * 32 >= 32 ? ~0u : (1u << (n - i * 32)) - 1;
    const __m512i v = _mm512_maskz_loadu_epi16(valid, w + i * 32);
    out |= static_cast<uint64_t>(_mm512_test_epi16_mask(v, _mm512_set1_epi16(0x7fff))) << i * 32;
  }
  return out;
}
inline uint64_t nonzeros(const Half* w, int64_t n) { return nonzeros16(w, n); }
inline uint64_t nonzeros(const BFloat16* w, int64_t n) { return nonzeros16(w, n); }
inline uint64_t nonzeros(const int8_t* w, int64_t n) {
  const __m512i v = _mm512_maskz_loadu_epi8(n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1, w);
  return _mm512_test_epi8_mask(v, v);
}

template <class V>
void Level::count(const Shape& shape, const Dense& w, uint64_t* bitmap, int64_t* counts, int64_t s) {
  const int64_t sub_cols = shape.sub_cols(), tiles = shape.tiles();
  const int64_t rest = shape.rows - s * kStripRows, rows = rest < kStripRows ? rest : kStripRows;
  const V* data = static_cast<const V*>(w.data) + s * kStripRows * w.row_stride;
  uint64_t* words = bitmap + s * sub_cols * kStripSubs;
  for (int64_t t = 0; t < tiles; ++t) counts[s * tiles + t] = 0;
  // Byte 8 c + r of the result is byte 8 r + c: turns the rows of 8 sub-tiles into their words.
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint8_t>(i % 8 * 8 + i / 8);
  const __m512i transpose = _mm512_load_si512(order);
  const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);

  for (int64_t c = 0; c < sub_cols; c += 8) {  // 64 columns at a time
    alignas(64) uint64_t masks[kStripRows] = {};
    const int64_t cols = shape.cols - c * kSub;
    if (cols > 0)
      for (int64_t r = 0; r < rows; ++r) masks[r] = nonzeros(data + r * w.row_stride + c * kSub, cols < 64 ? cols : 64);
    const __m512i upper = _mm512_permutexvar_epi8(transpose, _mm512_load_si512(masks));
    const __m512i lower = _mm512_permutexvar_epi8(transpose, _mm512_load_si512(masks + 8));
    const int64_t left = (sub_cols - c) * kStripSubs;  // words
    const __mmask8 first = left >= 8 ? 0xff : (1u << left) - 1;
    const __mmask8 second = left >= 16 ? 0xff : left > 8 ? (1u << (left - 8)) - 1 : 0;
    _mm512_mask_storeu_epi64(words + 2 * c, first, _mm512_permutex2var_epi64(upper, low, lower));
    _mm512_mask_storeu_epi64(words + 2 * c + 8, second, _mm512_permutex2var_epi64(upper, high, lower));
    counts[s * tiles + c / kTileSubCols] +=
        _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_popcnt_epi64(upper), _mm512_popcnt_epi64(lower)));
  }
}

// The stored weights of one sub-tile, read from 8 rows, to v; room is what is left of the tile.
template <class V>
void compress(uint64_t m, const V* const* rows, int64_t col, V* v, int64_t room) {
  constexpr int kLanes = 64 / sizeof(V), kRows = kLanes / kSub;  // in a register
  for (int r = 0; r < kSub; r += kRows) {
    __m512i w;
    if constexpr (sizeof(V) == 4) {
      w = _mm512_inserti64x4(
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + col))),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r + 1] + col)), 1);
    } else if constexpr (sizeof(V) == 2) {
      const auto at = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + i] + col)); };
      w = _mm512_inserti32x4(_mm512_castsi128_si512(at(0)), at(1), 1);
      w = _mm512_inserti32x4(_mm512_inserti32x4(w, at(2), 2), at(3), 3);
    } else {
      alignas(64) int64_t all[8];
      for (int i = 0; i < 8; ++i) std::memcpy(&all[i], rows[i] + col, 8);
      w = _mm512_load_si512(all);
    }
    const uint64_t k = kLanes == 64 ? m : m & ((uint64_t{1} << kLanes % 64) - 1);
    if constexpr (sizeof(V) == 4)
      w = compress32(static_cast<__mmask16>(k), w);
    else if constexpr (sizeof(V) == 2)
      w = compress16(static_cast<__mmask32>(k), w);
    else
      w = compress8(k, w);
    if (room >= kLanes)
      _mm512_storeu_si512(v, w);
    else  // not into the next tile
      _mm512_mask_storeu_epi8(v, (uint64_t{1} << room * sizeof(V)) - 1, w);
    v += popcount(k);
    room -= popcount(k);
    m >>= kLanes % 64;
  }
}

template <class V>
void Level::fill(const Packed& p, const Dense& w, int64_t s) {
  const V* data = static_cast<const V*>(w.data);
  const int64_t row = s * kStripRows;
  const V* rows[kStripRows];
  for (int64_t r = 0; r < kStripRows; ++r)  // rows that aren't there have no bits; any valid address will do
    rows[r] = data + (row + r < p.shape.rows ? row + r : row) * w.row_stride;
  for (int64_t t = 0; t < p.shape.tiles(); ++t) {
    const Tile tile = tile_at(p, s, t);
    V* v = static_cast<V*>(const_cast<void*>(p.values)) + tile.begin;
    V* const end = v + (tile.end - tile.begin);
    for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) {
      const int64_t col = (tile.sub_col + i / kStripSubs) * kSub, h = i % kStripSubs * kSub;
      const uint64_t m = tile.words[i];
      if (col + kSub <= p.shape.cols) {
        compress(m, rows + h, col, v, end - v);
        v += popcount(m);
      } else {  // the vector loads would pass the end of a row
        for (uint64_t rest = m; rest; rest &= rest - 1) {
          const int bit = __builtin_ctzll(rest);
          *v++ = rows[h + bit / kSub][col + bit % kSub];
        }
      }
    }
    while (v < end) *v++ = V{};
  }
}

// --- Unpacking ------------------------------------------------------------------------------------------------------
// One sub-tile, row by row: f(row, its 8 weights).
template <class F>
void expand_rows(uint64_t m, const float* v, const F& f) {
  Float32Math::decode(m, v, [&](auto g, __m512 w) {
    f(g.value * 2, _mm512_castps512_ps256(w));
    f(g.value * 2 + 1, _mm512_extractf32x8_ps(w, 1));
  });
}
template <class V, class F>
void expand_rows16(uint64_t m, const V* v, const F& f) {
  const __m512i half[] = {expand16(static_cast<__mmask32>(m), load(v)),
                          expand16(static_cast<__mmask32>(m >> 32), load(v + popcount(m & 0xffffffff)))};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    f(4 * i, _mm512_castsi512_si128(half[i]));
    f(4 * i + 1, _mm512_extracti32x4_epi32(half[i], 1));
    f(4 * i + 2, _mm512_extracti32x4_epi32(half[i], 2));
    f(4 * i + 3, _mm512_extracti32x4_epi32(half[i], 3));
  }
}
template <class F>
void expand_rows(uint64_t m, const Half* v, const F& f) {
  expand_rows16(m, v, f);
}
template <class F>
void expand_rows(uint64_t m, const BFloat16* v, const F& f) {
  expand_rows16(m, v, f);
}
template <class F>
void expand_rows(uint64_t m, const int8_t* v, const F& f) {
  alignas(64) int64_t rows[kSub];
  _mm512_store_si512(rows, expand8(m, load(v)));
#pragma GCC unroll 8
  for (int r = 0; r < kSub; ++r) f(r, rows[r]);
}

// A sub-tile times the scales of its rows.
template <class V, class Out>
void scale_sub_tile(uint64_t m, const V* v, const float* scale, int64_t rows, Out* out, int64_t stride, int64_t cols) {
  alignas(64) float block[kSub * kSub];
  Float32Math::decode(m, v, [&](auto g, __m512 w) { _mm512_store_ps(block + g.value * 16, w); });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) from_float(block[r * kSub + c] * scale[r], &out[r * stride + c]);
}

template <class V, class Out>
void Level::unpack(const Packed& p, const float* scale, Out* out, int64_t s, Status* status) {
  const int64_t stride = p.shape.cols;
  const auto write_tile = [&](const Tile& tile, const V*& v) {
    for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) {
      const int64_t row = s * kStripRows + i % kStripSubs * kSub, col = (tile.sub_col + i / kStripSubs) * kSub;
      const int64_t rows = p.shape.rows - row, cols = p.shape.cols - col;  // still to come
      const uint64_t m = tile.words[i];
      Out* to = out + row * stride + col;
      if constexpr (!std::is_same_v<Out, int8_t>)
        if (scale) scale_sub_tile(m, v, scale + row, rows < kSub ? rows : kSub, to, stride, cols < kSub ? cols : kSub);
      if constexpr (std::is_same_v<V, Out>)
        if (!scale) {
          if (rows >= kSub && cols >= kSub)
            expand_rows(m, v, [&](int r, auto w) { std::memcpy(to + r * stride, &w, sizeof(w)); });
          else
            expand_rows(m, v, [&](int r, auto w) {
              if (r < rows && cols > 0) std::memcpy(to + r * stride, &w, (cols < kSub ? cols : kSub) * sizeof(V));
            });
        }
      v += popcount(m);
    }
  };
  for (int64_t t = 0; t < p.shape.tiles(); ++t)
    if (!read_tile<V>(p, s, t, status, write_tile)) return;
}

void Level::linear(const Linear& a, int64_t s0, int64_t s1, Status* status) {
  const bool i8 = a.w.type == Type::i8;
  switch (a.x_type) {
    case Type::f32:
      return i8 ? linear_strips<Float32Math, int8_t, float>(a, s0, s1, status)
                : linear_strips<Float32Math, float, float>(a, s0, s1, status);
    case Type::f16:
      return i8 ? linear_strips<Float32Math, int8_t, Half>(a, s0, s1, status)
                : linear_strips<Float32Math, Half, Half>(a, s0, s1, status);
    default:
      return i8 ? linear_strips<BFloat16Math, int8_t, BFloat16>(a, s0, s1, status)
                : linear_strips<BFloat16Math, BFloat16, BFloat16>(a, s0, s1, status);
  }
}

}  // namespace

constinit const Cpu cpu_avx512 = {
    .count = Entries::count,
    .fill = Entries::fill,
    .unpack = Entries::unpack,
    .prepared_bytes = [](const Linear& a) -> int64_t {
      if (computes_as_sparse(a)) return Lanes(a).bytes();
      return a.tokens * a.w.shape.padded_cols() * (a.x_type == Type::bf16 ? 2 : 4);
    },
    .prepare =
        [](const Linear& a, int64_t t0, int64_t t1) {
          const bool sparse = computes_as_sparse(a);
          switch (a.x_type) {
            case Type::f32: return sparse ? prepare_lanes<float>(a, t0, t1) : prepare<Float32Math, float>(a, t0, t1);
            case Type::f16: return sparse ? prepare_lanes<Half>(a, t0, t1) : prepare<Float32Math, Half>(a, t0, t1);
            default: return sparse ? prepare_lanes<BFloat16>(a, t0, t1) : prepare<BFloat16Math, BFloat16>(a, t0, t1);
          }
        },
    .linear = Entries::linear,
};

}  // namespace effk::lscd
