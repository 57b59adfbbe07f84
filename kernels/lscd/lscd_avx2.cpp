// lscd with AVX2, FMA and F16C. A row of a sub-tile, 8 weights, is the unit: a byte of the bitmap looks up the shuffle
// that puts its stored weights in place. All arithmetic is in float32.
#include <immintrin.h>

#include "cpu_common.h"

namespace effk::lscd {
namespace {

// For each byte of a bitmap, bytewise shuffles of 8 weights of 1 or 2 bytes: `expand` spreads packed weights (0x80
// makes a zero), `compress` packs them.
struct Shuffles {
  alignas(16) uint8_t expand1[256][8], compress1[256][8], expand2[256][16], compress2[256][16];
};

constexpr Shuffles make_shuffles() {
  Shuffles t{};
  for (int byte = 0; byte < 256; ++byte) {
    uint8_t stored = 0;
    for (int i = 0; i < 8; ++i) t.compress1[byte][i] = 0x80;
    for (uint8_t i = 0; i < 8; ++i) {
      const bool set = byte >> i & 1;
      t.expand1[byte][i] = set ? stored : 0x80;
      if (set) t.compress1[byte][stored++] = i;
    }
    for (int i = 0; i < 16; ++i) {
      const uint8_t e = t.expand1[byte][i / 2], c = t.compress1[byte][i / 2];
      t.expand2[byte][i] = e == 0x80 ? 0x80 : static_cast<uint8_t>(2 * e + i % 2);
      t.compress2[byte][i] = c == 0x80 ? 0x80 : static_cast<uint8_t>(2 * c + i % 2);
    }
  }
  return t;
}

constexpr Shuffles kShuffles = make_shuffles();

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline int popcount(uint64_t m) { return static_cast<int>(_mm_popcnt_u64(m)); }

// Eight weights in a register, by type.
template <class V>
struct Row;

template <>
struct Row<float> {
  using Register = __m256;
  static Register load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Register w) { _mm256_storeu_ps(p, w); }
  static Register expand(Register w, uint8_t m) {
    const __m256i order = _mm256_cvtepi8_epi32(load8(kShuffles.expand1[m]));  // negative where nothing is stored
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(order, 31)), _mm256_permutevar8x32_ps(w, order));
  }
  static Register compress(Register w, uint8_t m) {
    const __m256i order = _mm256_cvtepi8_epi32(load8(kShuffles.compress1[m]));
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(order, 31)), _mm256_permutevar8x32_ps(w, order));
  }
  static __m256 floats(Register w) { return w; }
  static uint8_t nonzeros(Register w) {  // NaN is one
    return static_cast<uint8_t>(_mm256_movemask_ps(_mm256_cmp_ps(w, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
  }
};

template <class V>
struct Row16 {
  using Register = __m128i;
  static Register load(const V* p) { return load16(p); }
  static void store(V* p, Register w) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), w); }
  static Register expand(Register w, uint8_t m) { return _mm_shuffle_epi8(w, load16(kShuffles.expand2[m])); }
  static Register compress(Register w, uint8_t m) { return _mm_shuffle_epi8(w, load16(kShuffles.compress2[m])); }
  static uint8_t nonzeros(Register w) {
    const __m128i zero = _mm_cmpeq_epi16(_mm_and_si128(w, _mm_set1_epi16(0x7fff)), _mm_setzero_si128());
    return static_cast<uint8_t>(~_mm_movemask_epi8(_mm_packs_epi16(zero, zero)));
  }
};
template <>
struct Row<Half> : Row16<Half> {
  static __m256 floats(Register w) { return _mm256_cvtph_ps(w); }
};
template <>
struct Row<BFloat16> : Row16<BFloat16> {
  static __m256 floats(Register w) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(w), 16)); }
};

template <>
struct Row<int8_t> {
  using Register = __m128i;  // its lower half
  static Register load(const int8_t* p) { return load8(p); }
  static void store(int8_t* p, Register w) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), w); }
  static Register expand(Register w, uint8_t m) { return _mm_shuffle_epi8(w, load8(kShuffles.expand1[m])); }
  static Register compress(Register w, uint8_t m) { return _mm_shuffle_epi8(w, load8(kShuffles.compress1[m])); }
  static __m256 floats(Register w) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(w)); }
  static uint8_t nonzeros(Register w) {
    return static_cast<uint8_t>(~_mm_movemask_epi8(_mm_cmpeq_epi8(w, _mm_setzero_si128())));
  }
};

// Expands the rows of a sub-tile from v on, which it advances: f(row, register).
template <class V, class F>
inline void expand_rows(uint64_t m, const V*& v, const F& f) {
#pragma GCC unroll 8
  for (int r = 0; r < kSub; ++r) {
    const uint8_t byte = static_cast<uint8_t>(m >> 8 * r);
    f(r, Row<V>::expand(Row<V>::load(v), byte));
    v += popcount(byte);
  }
}

// --- Linear ---------------------------------------------------------------------------------------------------------
constexpr int64_t kChunk = 64;  // tokens for which weights are expanded once

inline float sum_lanes(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

template <class X>
void prepare(const Linear& a, int64_t t0, int64_t t1) {
  const int64_t padded = a.w.shape.padded_cols(), cols = a.w.shape.cols;
  for (int64_t t = t0; t < t1; ++t) {
    const X* x = static_cast<const X*>(a.x) + t * a.x_token_stride;
    float* to = static_cast<float*>(a.prepared) + t * padded;
    int64_t i = 0;
    if (a.x_col_stride == 1)
      for (; i + 8 <= cols; i += 8) _mm256_storeu_ps(to + i, Row<X>::floats(Row<X>::load(x + i)));
    for (; i < padded; ++i) to[i] = i < cols ? to_float(x[i * a.x_col_stride]) : 0;
  }
}

// One token: weights go from the packed form straight into 8 sums, first those of the upper rows, then of the lower.
template <class V, class X>
bool linear_direct(const Linear& a, int64_t s, Status* status) {
  const float* x = static_cast<const float*>(a.prepared);
  alignas(32) float sums[kStripRows];
  for (int h = 0; h < kStripSubs; ++h) {
    __m256 acc[kSub];
    for (auto& sum : acc) sum = _mm256_setzero_ps();
    const auto add_tile = [&](const Tile& tile, const V*& v) {
      for (int64_t c = 0; c < tile.sub_cols; ++c) {
        if (h == 0 && c % 2 == 0) fetch_ahead(v, tile.words + 2 * c);
        const uint64_t upper = tile.words[2 * c], lower = tile.words[2 * c + 1];
        const __m256 inputs = _mm256_loadu_ps(x + (tile.sub_col + c) * kSub);
        if (h == 1) v += popcount(upper);
        expand_rows(h == 0 ? upper : lower, v,
                    [&](int r, auto w) { acc[r] = _mm256_fmadd_ps(Row<V>::floats(w), inputs, acc[r]); });
        if (h == 0) v += popcount(lower);
      }
    };
    for (int64_t t = 0; t < a.w.shape.tiles(); ++t)
      if (!read_tile<V>(a.w, s, t, status, add_tile)) return false;
    for (int r = 0; r < kSub; ++r) sums[h * kSub + r] = sum_lanes(acc[r]);
  }
  finish<X>(a, s, 0, sums);
  return true;
}

// sums[N][4 rows] += expanded weights [sub_cols][4 rows][8] times x.
template <int N>
void multiply_panel(const float* panel, int64_t sub_cols, const float* x, int64_t stride, bool first, float* to) {
  constexpr int64_t kTokenFloats = kStripRows * 8;
  __m256 sums[N][4];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
      sums[n][r] = first ? _mm256_setzero_ps() : _mm256_load_ps(to + n * kTokenFloats + r * 8);
  for (int64_t c = 0; c < sub_cols; ++c) {
    __m256 xs[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) xs[n] = _mm256_loadu_ps(x + n * stride + c * kSub);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m256 w = _mm256_load_ps(panel + (c * 4 + r) * 8);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[n][r] = _mm256_fmadd_ps(w, xs[n], sums[n][r]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) _mm256_store_ps(to + n * kTokenFloats + r * 8, sums[n][r]);
}

// Several tokens: a tile is expanded into a panel in the cache and used for all tokens of a chunk.
struct Panel {
  alignas(32) float weights[kStripRows / 4][kTileSubCols][4][8];
  alignas(32) float sums[kChunk][kStripRows][8];
};

template <class V, class X>
bool linear_chunk(const Linear& a, int64_t chunk, int64_t s, Panel& work, Status* status) {
  const int64_t padded = a.w.shape.padded_cols(), tiles = a.w.shape.tiles();
  const int64_t tokens = a.tokens - chunk < kChunk ? a.tokens - chunk : kChunk;
  if (tiles == 0) std::memset(work.sums, 0, sizeof work.sums);
  for (int64_t t = 0; t < tiles; ++t) {
    const bool good = read_tile<V>(a.w, s, t, status, [&](const Tile& tile, const V*& v) {
      for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i)
        expand_rows(tile.words[i], v, [&](int r, auto w) {
          const int64_t row = i % kStripSubs * kSub + r;
          _mm256_store_ps(work.weights[row / 4][i / kStripSubs][row % 4], Row<V>::floats(w));
        });
    });
    if (!good) return false;

    const int64_t sub_cols = tile_at(a.w, s, t).sub_cols;
    for (int64_t n = 0; n < tokens; n += 3) {
      const float* x = static_cast<const float*>(a.prepared) + (chunk + n) * padded + t * kTileCols;
      for (int quarter = 0; quarter < 4; ++quarter) {
        const float* weights = work.weights[quarter][0][0];
        float* sums = work.sums[n][quarter * 4];
        switch (tokens - n) {
          case 1: multiply_panel<1>(weights, sub_cols, x, padded, t == 0, sums); break;
          case 2: multiply_panel<2>(weights, sub_cols, x, padded, t == 0, sums); break;
          default: multiply_panel<3>(weights, sub_cols, x, padded, t == 0, sums);
        }
      }
    }
  }
  for (int64_t n = 0; n < tokens; ++n) {
    float sums[kStripRows];
    for (int r = 0; r < kStripRows; ++r) sums[r] = sum_lanes(_mm256_load_ps(work.sums[n][r]));
    finish<X>(a, s, chunk + n, sums);
  }
  return true;
}

template <class V, class X>
void linear_strips(const Linear& a, int64_t s0, int64_t s1, Status* status) {
  if (a.tokens == 1) {
    for (int64_t s = s0; s < s1; ++s)
      if (!linear_direct<V, X>(a, s, status)) return;
    return;
  }
  const Buffer<Panel> work;
  bool good = true;
  for (int64_t chunk = 0; good && chunk < a.tokens; chunk += kChunk)
    for (int64_t s = s0; good && s < s1; ++s) good = linear_chunk<V, X>(a, chunk, s, *work.get(), status);
}

// --- Packing --------------------------------------------------------------------------------------------------------
// Eight weights of which only n are there.
template <class V>
typename Row<V>::Register load_some(const V* p, int64_t n) {
  V padded[kSub] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return Row<V>::load(padded);
}

template <class V>
void Level::count(const Shape& shape, const Dense& w, uint64_t* bitmap, int64_t* counts, int64_t s) {
  const int64_t sub_cols = shape.sub_cols(), tiles = shape.tiles();
  for (int64_t t = 0; t < tiles; ++t) counts[s * tiles + t] = 0;
  for (int64_t c = 0; c < sub_cols; ++c)
    for (int64_t h = 0; h < kStripSubs; ++h) {
      const int64_t row = s * kStripRows + h * kSub, cols = shape.cols - c * kSub;
      const int64_t rows = shape.rows - row < kSub ? shape.rows - row : kSub;
      const V* data = static_cast<const V*>(w.data) + row * w.row_stride + c * kSub;
      uint64_t word = 0;
      if (cols > 0)
        for (int64_t r = 0; r < rows; ++r, data += w.row_stride) {
          const auto weights = cols >= kSub ? Row<V>::load(data) : load_some(data, cols);
          word |= static_cast<uint64_t>(Row<V>::nonzeros(weights)) << 8 * r;
        }
      bitmap[(s * sub_cols + c) * kStripSubs + h] = word;
      counts[s * tiles + c / kTileSubCols] += popcount(word);
    }
}

template <class V>
void Level::fill(const Packed& p, const Dense& w, int64_t s) {
  for (int64_t t = 0; t < p.shape.tiles(); ++t) {
    const Tile tile = tile_at(p, s, t);
    V* v = static_cast<V*>(const_cast<void*>(p.values)) + tile.begin;
    V* const end = v + (tile.end - tile.begin);
    for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) {
      const int64_t row = s * kStripRows + i % kStripSubs * kSub, col = (tile.sub_col + i / kStripSubs) * kSub;
      const V* data = static_cast<const V*>(w.data) + row * w.row_stride + col;
      for (uint64_t m = tile.words[i]; m; m >>= 8, data += w.row_stride) {
        const uint8_t byte = static_cast<uint8_t>(m);
        if (col + kSub <= p.shape.cols && end - v >= kSub) {
          Row<V>::store(v, Row<V>::compress(Row<V>::load(data), byte));
          v += popcount(byte);
        } else {  // a vector would reach past the row, or into the next tile
          for (unsigned bits = byte; bits; bits &= bits - 1) *v++ = data[__builtin_ctz(bits)];
        }
      }
    }
    while (v < end) *v++ = V{};
  }
}

// --- Unpacking ------------------------------------------------------------------------------------------------------
template <class V, class Out>
void Level::unpack(const Packed& p, const float* scale, Out* out, int64_t s, Status* status) {
  const int64_t stride = p.shape.cols;
  const auto write_tile = [&](const Tile& tile, const V*& v) {
    for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) {
      const int64_t row = s * kStripRows + i % kStripSubs * kSub, col = (tile.sub_col + i / kStripSubs) * kSub;
      const int64_t rows = p.shape.rows - row, left = p.shape.cols - col, cols = left < kSub ? left : kSub;
      expand_rows(tile.words[i], v, [&](int r, auto w) {
        if (r >= rows || cols <= 0) return;
        Out* to = out + (row + r) * stride + col;
        if constexpr (!std::is_same_v<Out, int8_t>)
          if (scale) {
            float floats[kSub];
            _mm256_storeu_ps(floats, Row<V>::floats(w));
            for (int64_t c = 0; c < cols; ++c) from_float(floats[c] * scale[row + r], &to[c]);
          }
        if constexpr (std::is_same_v<V, Out>)
          if (!scale) {
            if (cols == kSub) return Row<V>::store(to, w);
            V some[kSub];
            Row<V>::store(some, w);
            std::memcpy(to, some, cols * sizeof(V));
          }
      });
    }
  };
  for (int64_t t = 0; t < p.shape.tiles(); ++t)
    if (!read_tile<V>(p, s, t, status, write_tile)) return;
}

void Level::linear(const Linear& a, int64_t s0, int64_t s1, Status* status) {
  with_type(a.x_type, [&]<class X>(X*) {
    if constexpr (!std::is_same_v<X, int8_t>)
      a.w.type == a.x_type ? linear_strips<X, X>(a, s0, s1, status) : linear_strips<int8_t, X>(a, s0, s1, status);
  });
}

}  // namespace

constinit const Cpu cpu_avx2 = {
    .count = Entries::count,
    .fill = Entries::fill,
    .unpack = Entries::unpack,
    .prepared_bytes = [](const Linear& a) -> int64_t { return a.tokens * a.w.shape.padded_cols() * 4; },
    .prepare = [](const Linear& a, int64_t t0,
                  int64_t t1) { with_type(a.x_type, [&]<class X>(X*) { prepare<X>(a, t0, t1); }); },
    .linear = Entries::linear,
};

}  // namespace effk::lscd
