// w4a8 with AVX-512 VNNI. The 16 rows of a block are the lanes of a register: vpdpbusd multiplies four unsigned bytes
// of each row with four signed activations, broadcast to all rows, and adds them up in 32 bits.
#include "../common/avx512.h"
#include "cpu_common.h"

namespace effk::w4a8 {
namespace {

inline __m512i load(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// acc += weights * x. In assembly, and kept in order: of the intrinsic's results the compiler makes new registers, and
// copies and spills them.
inline void multiply_add(__m512i& acc, __m512i weights, __m512i x) {
  asm volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(weights), "v"(x));
}
// The same of pairs of 16 bits.
inline void multiply_add_pairs(__m512i& acc, __m512i a, __m512i b) {
  asm volatile("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// Blocks of one width, as a kernel walks over them.
struct Four {
  static constexpr int64_t kStep = kChunk;  // columns of a step, and phases that a step's bytes hold
  static constexpr int kPhases = 2;
  static constexpr bool kIs8 = false;
  const uint8_t* q;
  const float* scale;
  const uint8_t* zero;
  Four() = default;
  Four(const Packed& w, int64_t block)
      : q(w.q4 + q4_at(w.shape, block * kBlock, 0)),
        scale(w.scale4 + group_at(w.shape, block * kBlock, 0)),
        zero(w.zero4 + group_at(w.shape, block * kBlock, 0)) {}
  template <int kPhase>
  __m512i weights(int64_t step) const {
    const __m512i bytes = load(q + step * 64);
    if constexpr (kPhase == 0) return _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    // A shift of each byte by 4, as a product of bits: one instruction of those that the sums wait for, not two.
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(0x1020408000000000), 0);
  }
  // As 16 bits, the upper ones 0.
  __m512i minus_zero(int64_t group) const {
    const __m128i z = _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + group * kBlock));
    return _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_cvtepu8_epi32(z));
  }
};

struct Eight {
  static constexpr int64_t kStep = kWord;
  static constexpr int kPhases = 1;
  static constexpr bool kIs8 = true;
  const uint8_t* q;
  const float* scale;
  Eight() = default;
  Eight(const Packed& w, int64_t block)
      : q(w.q8 + q8_at(w.shape, block * kBlock, 0)), scale(w.scale8 + group_at(w.shape, block * kBlock, 0)) {}
  template <int>
  __m512i weights(int64_t step) const {
    return load(q + step * 64);
  }
  static __m512i minus_zero(int64_t) { return _mm512_set1_epi32(-kZero8 & 0xffff); }
};

// A block of fewer than 16 rows, or whose rows have bytes after the last word.
struct EightRest : Eight {
  int64_t rows, words, rest;
  __mmask16 mask;
  EightRest() = default;
  EightRest(const Packed& w, int64_t block)
      : Eight(w, block),
        rows(block_rows(w.shape.n8, block)),
        words(w.shape.cols / kWord),
        rest(w.shape.cols % kWord),
        mask(static_cast<__mmask16>((1u << rows) - 1)) {}
  template <int>
  __m512i weights(int64_t step) const {
    const uint8_t* at = q + step * rows * kWord;
    if (step < words) return _mm512_maskz_loadu_epi32(mask, at);
    alignas(64) uint8_t last[kBlock][kWord] = {};
    for (int64_t i = 0; i < rows; ++i) std::memcpy(last[i], at + i * rest, rest);
    return load(last);
  }
};

// acc[token][block] += the sums of q * x of one group.
template <class W, int NB, int MT>
inline __attribute__((always_inline)) void add_group(const W* w, const int8_t* x, int64_t stride, int64_t step0,
                                                     int64_t step1, __m512i (&acc)[MT][NB]) {
  constexpr int64_t kAhead = 4096 / NB;
  // Where there are few sums, each phase has its own, or they would wait for themselves.
  constexpr int kSets = W::kPhases == 2 && MT * NB <= 8 ? 2 : 1;
  constexpr int OT = kSets == 2 ? MT : 1, OB = kSets == 2 ? NB : 1;
  __m512i other[OT][OB] = {};
  for (int64_t step = step0; step < step1; ++step) {
    const auto phase = [&](auto p) __attribute__((always_inline)) {
      int64_t same = step;
      // The second phase loads the bytes again: the compiler would hold on to them, and run out of registers.
      if constexpr (p.value > 0) asm volatile("" : "+r"(same));
      const int8_t* at = x + step * W::kStep + p.value * kWord;
      if constexpr (MT <= NB) {  // activations stay in registers, weights pass by
        __m512i xs[MT];
#pragma GCC unroll 8
        for (int t = 0; t < MT; ++t) xs[t] = broadcast(at + t * stride);
#pragma GCC unroll 8
        for (int b = 0; b < NB; ++b) {
          const __m512i weights = w[b].template weights<p.value>(same);
#pragma GCC unroll 8
          for (int t = 0; t < MT; ++t)
            multiply_add(p.value % kSets ? other[t % OT][b % OB] : acc[t][b], weights, xs[t]);
        }
      } else {  // the other way round
        __m512i weights[NB];
#pragma GCC unroll 8
        for (int b = 0; b < NB; ++b) weights[b] = w[b].template weights<p.value>(same);
#pragma GCC unroll 16
        for (int t = 0; t < MT; ++t, at += stride) {
          // One pointer after the other: all at once, the compiler would keep some in vectors, and moving them from
          // there takes the place of products.
          asm volatile("" : "+r"(at));
          const __m512i xs = broadcast(at);
#pragma GCC unroll 8
          for (int b = 0; b < NB; ++b)
            multiply_add(p.value % kSets ? other[t % OT][b % OB] : acc[t][b], weights[b], xs);
        }
      }
    };
    for (int b = 0; b < NB; ++b) _mm_prefetch(w[b].q + step * 64 + kAhead, _MM_HINT_T0);
    phase(std::integral_constant<int, 0>());
    if constexpr (W::kPhases == 2) phase(std::integral_constant<int, 1>());
  }
  if constexpr (kSets == 2)
#pragma GCC unroll 16
    for (int t = 0; t < MT; ++t)
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) acc[t][b] = _mm512_add_epi32(acc[t][b], other[t][b]);
}

// For groups [g0, g1), MT tokens from t on and NB blocks: calls end(group, acc).
template <class W, int NB, int MT, class F>
inline __attribute__((always_inline)) void for_groups(const Linear& a, const W* w, int64_t t, int64_t g0, int64_t g1,
                                                      const F& end) {
  const Shape& s = a.w.shape;
  const int8_t* x = a.q + t * a.q_stride;
  const int64_t groups = s.groups();  // not in the loop: it is a division
  const int64_t steps = s.group / W::kStep, last = (s.cols + W::kStep - 1) / W::kStep;
  for (int64_t g = g0; g < g1; ++g) {
    // Sums begin at -zero * (sum of x): exact products of pairs of 16 bits, where the second of -zero is 0. In the
    // beginning, since the registers for it are still free.
    __m512i acc[MT][NB], minus_zero[NB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) minus_zero[b] = w[b].minus_zero(g);
#pragma GCC unroll 16
    for (int i = 0; i < MT; ++i) {
      const __m512i sum = _mm512_set1_epi32(a.sums[(t + i) * groups + g]);
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) {
        acc[i][b] = _mm512_setzero_si512();
        multiply_add_pairs(acc[i][b], minus_zero[b], sum);
      }
    }
    add_group<W, NB, MT>(w, x, a.q_stride, g * steps, (g + 1) * steps < last ? (g + 1) * steps : last, acc);
    end(g, acc);
  }
}

// sums[MT][NB] of 16 floats += groups [g0, g1), in ascending order: the same operations whatever MT and NB are.
template <class W, int NB, int MT>
void multiply(const Linear& a, const W* w, int64_t t, int64_t g0, int64_t g1, float* sums) {
  const int64_t groups = a.w.shape.groups();
  for_groups<W, NB, MT>(a, w, t, g0, g1, [&](int64_t g, const __m512i(&acc)[MT][NB]) __attribute__((always_inline)) {
    float* base = sums;
    asm("" : "+r"(base));  // keeps the compiler from holding all sums in registers that it doesn't have
    __m512 scale[NB];
#pragma GCC unroll 8
    for (int b = 0; b < NB; ++b) scale[b] = _mm512_loadu_ps(w[b].scale + g * kBlock);
#pragma GCC unroll 16
    for (int i = 0; i < MT; ++i) {
      const __m512 x_scale = _mm512_set1_ps(a.x_scale[(t + i) * groups + g]);
#pragma GCC unroll 8
      for (int b = 0; b < NB; ++b) {
        float* to = base + (i * NB + b) * kBlock;
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i][b]), x_scale);
        _mm512_store_ps(to, _mm512_fmadd_ps(scaled, scale[b], _mm512_load_ps(to)));
      }
    }
  });
}

// Where the sums of a block go: perm of pack() ascends, so most blocks fill 16 neighbouring columns, or most of 32.
class Places {
 public:
  Places() = default;
  Places(const Packed& w, const Block& block) : perm_(w.perm + block.first_row), rows_(static_cast<int>(block.rows)) {
    mask_ = static_cast<__mmask16>((1u << rows_) - 1);
    at_ = _mm512_maskz_loadu_epi32(mask_, perm_);
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    near_ = mask_;
    if (_mm512_mask_cmpneq_epi32_mask(mask_, at_, _mm512_add_epi32(_mm512_set1_epi32(perm_[0]), steps)) == 0) return;
    near_ = 1;
    for (int i = 1; i < rows_; ++i) {
      const int64_t from_first = int64_t{perm_[i]} - perm_[0];
      if (perm_[i] < perm_[i - 1] || from_first >= 32) {
        near_ = 0;
        return;
      }
      near_ |= __mmask32{1} << from_first;
    }
  }

  // y of one token.
  template <class Y>
  void store(Y* y, const float* bias, __m512 sums) const {
    if (bias) sums = _mm512_add_ps(sums, _mm512_mask_i32gather_ps(sums, mask_, at_, bias, 4));
    if (near_ == 0xffff) {
      store_floats(y + perm_[0], sums);
    } else if (near_ == 0) {
      alignas(64) float v[kBlock];
      _mm512_store_ps(v, sums);
      for (int i = 0; i < rows_; ++i) from_float(v[i], &y[perm_[i]]);
    } else {
      const auto low = static_cast<__mmask16>(near_), high = static_cast<__mmask16>(near_ >> 16);
      const auto rest = static_cast<__mmask16>(mask_ << __builtin_popcount(low));
      store_floats(y + perm_[0], low, _mm512_maskz_expand_ps(low, sums));
      if (high)
        store_floats(y + perm_[0] + 16, high, _mm512_maskz_expand_ps(high, _mm512_maskz_compress_ps(rest, sums)));
    }
  }

 private:
  const int32_t* perm_;
  int rows_;
  __m512i at_;
  __mmask16 mask_;
  __mmask32 near_;  // the columns, from the first on, that the block fills; 0 where they are too far apart
};

// Blocks and tokens whose sums fit in registers. Few tokens want many blocks, or sums would wait for themselves; many
// want few, whose nibbles are then taken apart once for more products.
template <int NB>
constexpr int kTileTokens = NB == 2 ? 12 : 6;
constexpr int64_t kMostTokens = 144;        // whose activations stay in the second cache, with
constexpr int64_t kPanelBytes = 256 << 10;  // as many bytes of weights

template <class W, int NB, class... Args>
void multiply_tokens(int64_t tokens, const Args&... args) {
  with_count<kTileTokens<NB>>(tokens, [&](auto n) { multiply<W, NB, n()>(args...); });
}

// NB blocks, from `block` of their width on, for all tokens.
template <class W, int NB, class Y>
void linear_panel(const Linear& a, int64_t block) {
  const Shape& s = a.w.shape;
  alignas(64) float sums[kMostTokens * NB * kBlock];
  W w[NB];
  Places places[NB];
  for (int b = 0; b < NB; ++b) {
    w[b] = W(a.w, block + b);
    places[b] = Places(a.w, block_at(s, W::kIs8 ? s.blocks4() + block + b : block + b));
  }
  constexpr int64_t kTokens = kTileTokens<NB>;
  const int64_t groups = s.groups(), per_group = NB * 64 * (s.group / W::kStep);
  const int64_t range = per_group * groups <= kPanelBytes ? groups : kPanelBytes / per_group;
  for (int64_t t0 = 0; t0 < a.tokens; t0 += kMostTokens) {
    const int64_t tokens = a.tokens - t0 < kMostTokens ? a.tokens - t0 : kMostTokens;
    const int64_t parts = (tokens + kTokens - 1) / kTokens;  // as even as can be
    std::memset(sums, 0, tokens * NB * kBlock * sizeof(float));
    for (int64_t g = 0; g < groups; g += range) {
      const int64_t end = g + range < groups ? g + range : groups;
      for (int64_t i = 0, t = 0; i < parts; ++i) {
        const int64_t n = tokens / parts + (i < tokens % parts);
        multiply_tokens<W, NB>(n, a, w, t0 + t, g, end, sums + t * NB * kBlock);
        t += n;
      }
    }
    for (int64_t t = 0; t < tokens; ++t)  // blocks inside: their columns are neighbours
      for (int b = 0; b < NB; ++b)
        places[b].store(static_cast<Y*>(a.y) + (t0 + t) * s.rows(), a.bias,
                        _mm512_load_ps(sums + (t * NB + b) * kBlock));
  }
}

// Blocks [begin, end) of one width.
template <class W, class Y>
void linear_blocks(const Linear& a, int64_t begin, int64_t end) {
  if constexpr (!std::is_same_v<W, EightRest>) {
    if (a.tokens > kTileTokens<4>)
      for (; begin + 2 <= end; begin += 2) linear_panel<W, 2, Y>(a, begin);
    for (; begin + 4 <= end; begin += 4) linear_panel<W, 4, Y>(a, begin);
  }
  for (; begin < end; ++begin) linear_panel<W, 1, Y>(a, begin);
}

// Calls f(W of null, first, last) for the runs of blocks [b0, b1) that one kind of kernel can do, counted in their
// width.
template <class F>
void for_widths(const Shape& s, int64_t b0, int64_t b1, const F& f) {
  const int64_t n4 = s.blocks4();
  if (b0 < n4) f(static_cast<Four*>(nullptr), b0, b1 < n4 ? b1 : n4);
  const int64_t begin = b0 > n4 ? b0 - n4 : 0, end = b1 - n4;
  const int64_t whole = s.cols % kWord == 0 ? s.n8 / kBlock : 0;
  const int64_t middle = end < whole ? end : whole > begin ? whole : begin;
  if (begin < middle) f(static_cast<Eight*>(nullptr), begin, middle);
  if (middle < end) f(static_cast<EightRest*>(nullptr), middle, end);
}

void linear(const Linear& a, int64_t b0, int64_t b1) {
  with_float(a.y_type, [&]<class Y>(Y*) {
    for_widths(a.w.shape, b0, b1, [&]<class W>(W*, int64_t begin, int64_t end) { linear_blocks<W, Y>(a, begin, end); });
  });
}

void accumulate(const Linear& a, int64_t b0, int64_t b1) {
  const int64_t groups = a.w.shape.groups(), rows = a.w.shape.rows();
  for_widths(a.w.shape, b0, b1, [&]<class W>(W*, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block block = block_at(a.w.shape, W::kIs8 ? a.w.shape.blocks4() + i : i);
      const W w(a.w, i);
      for (int64_t t = 0; t < a.tokens; ++t)
        for_groups<W, 1, 1>(a, &w, t, 0, groups, [&](int64_t g, const __m512i(&acc)[1][1]) {
          alignas(64) int32_t sums[kBlock];
          _mm512_store_si512(sums, acc[0][0]);
          for (int64_t r = 0; r < block.rows; ++r)
            a.accumulators[(t * groups + g) * rows + a.w.perm[block.first_row + r]] = sums[r];
        });
    }
  });
}

// As the common one, bit for bit, where columns follow each other.
void quantize_fast(const Quantize& a, int64_t t0, int64_t t1) {
  if (a.x_col_stride != 1) return quantize(a, t0, t1);
  const int64_t groups = (a.cols + a.group - 1) / a.group;
  with_float(a.type, [&]<class X>(X*) {
    alignas(64) float v[kMaxGroup];
    for (int64_t t = t0; t < t1; ++t) {
      const X* x = static_cast<const X*>(a.x) + t * a.x_token_stride;
      int8_t* q = a.q + t * a.q_stride;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k0 = g * a.group, n = a.cols - k0 < a.group ? a.cols - k0 : a.group;
        const auto mask = [&](int64_t i) { return static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffff); };
        __m512i most = _mm512_setzero_si512();  // of magnitudes as bits: NaN is above infinity is above all else
        for (int64_t i = 0; i < n; i += 16) {
          const __m512 f = load_floats(x + k0 + i, mask(i));
          _mm512_store_ps(v + i, f);
          most = _mm512_max_epu32(most, _mm512_castps_si512(_mm512_abs_ps(f)));
        }
        const uint32_t bits = _mm512_reduce_max_epu32(most);
        const float scale = scale_of(float_of(bits), kMaxQuantized, bits < 0x7f800000);
        a.scale[t * groups + g] = scale;
        // Where scale is NaN, or 1 for a group of zeros, all becomes 0.
        const __m512 divisor = _mm512_set1_ps(scale);
        const __mmask16 valid = scale == scale ? 0xffff : 0;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < n; i += 16) {
          const __m512i rounded = _mm512_maskz_cvtps_epi32(valid, _mm512_div_ps(_mm512_load_ps(v + i), divisor));
          sum = _mm512_add_epi32(sum, rounded);
          if (n - i >= 16)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k0 + i), _mm512_cvtepi32_epi8(rounded));
          else
            _mm512_mask_cvtepi32_storeu_epi8(q + k0 + i, mask(i), rounded);
        }
        if (a.sums) a.sums[t * groups + g] = _mm512_reduce_add_epi32(sum);
      }
      std::memset(q + a.cols, 0, a.q_stride - a.cols);
    }
  });
}

}  // namespace

constinit const Cpu cpu_avx512 = {quantize_fast, linear, accumulate, pack, unpack, salience};

}  // namespace effk::w4a8
