// w4a8 with AVX2. Half a block's 16 rows are the lanes of a register. Without VNNI, vpmaddubsw multiplies unsigned with
// signed bytes and adds pairs in 16 bits, which saturate: so all weights go in by halves of a byte, whose sums over 8
// steps stay below 8 * 2 * 15 * 128 < 2^15.
#include <immintrin.h>

#include "cpu_common.h"

namespace effk::w4a8 {
namespace {

constexpr int kSegment = 8;     // steps whose sums fit in 16 bits
constexpr int kTileTokens = 4;  // whose 16-bit sums fit in registers

// Blocks of one width: `steps` of 64 bytes, each used twice, by its low and by its high halves.
struct Four {
  static constexpr int64_t kStep = kChunk, kHighAt = 4;  // columns of a step, and the first of its high halves
  static constexpr int16_t kHighFactor = 1;
  const uint8_t* q;
  const float* scale;
  const uint8_t* zeros;
  Four(const Packed& w, int64_t block)
      : q(w.q4 + q4_at(w.shape, block * kBlock, 0)),
        scale(w.scale4 + group_at(w.shape, block * kBlock, 0)),
        zeros(w.zero4 + group_at(w.shape, block * kBlock, 0)) {}
  const uint8_t* bytes(int64_t step, uint8_t*) const { return q + step * 64; }
  __m256i zero(int64_t group, int half) const {
    return _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + group * kBlock + half * kBlock / 2)));
  }
};

struct Eight {
  static constexpr int64_t kStep = kWord, kHighAt = 0;
  static constexpr int16_t kHighFactor = 16;
  const uint8_t* q;
  const float* scale;
  Eight(const Packed& w, int64_t block)
      : q(w.q8 + q8_at(w.shape, block * kBlock, 0)), scale(w.scale8 + group_at(w.shape, block * kBlock, 0)) {}
  const uint8_t* bytes(int64_t step, uint8_t*) const { return q + step * 64; }
  static __m256i zero(int64_t, int) { return _mm256_set1_epi32(kZero8); }
};

// A block of fewer than 16 rows, or whose rows have bytes after the last word.
struct EightRest : Eight {
  int64_t rows, words, rest;
  EightRest(const Packed& w, int64_t block)
      : Eight(w, block), rows(block_rows(w.shape.n8, block)), words(w.shape.cols / kWord), rest(w.shape.cols % kWord) {}
  const uint8_t* bytes(int64_t step, uint8_t* room) const {
    const uint8_t* at = q + step * rows * kWord;
    const int64_t width = step < words ? kWord : rest;
    std::memset(room, 0, kBlock * kWord);
    for (int64_t i = 0; i < rows; ++i) std::memcpy(room + i * kWord, at + i * width, width);
    return room;
  }
};

// Calls end(group, sums [MT][2]): the sums of x * (q - zero) of MT tokens from t on.
template <int MT, class W, class F>
inline void for_groups(const Linear& a, const W& w, int64_t t, const F& end) {
  const Shape& s = a.w.shape;
  const int8_t* x = a.q + t * a.q_stride;
  const int64_t steps = s.group / W::kStep, last = (s.cols + W::kStep - 1) / W::kStep;
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int64_t g = 0; g < s.groups(); ++g) {
    const int64_t stop = (g + 1) * steps < last ? (g + 1) * steps : last;
    __m256i sums[MT][2] = {};
    for (int64_t begin = g * steps; begin < stop; begin += kSegment) {
      const int64_t to = begin + kSegment < stop ? begin + kSegment : stop;
      for (int high = 0; high < 2; ++high) {
        __m256i pairs[MT][2] = {};
        for (int64_t step = begin; step < to; ++step) {
          alignas(32) uint8_t room[kBlock * kWord];
          const auto* bytes = reinterpret_cast<const __m256i*>(w.bytes(step, room));
          __m256i weights[2];
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            weights[h] = _mm256_loadu_si256(bytes + h);
            weights[h] = _mm256_and_si256(high ? _mm256_srli_epi16(weights[h], 4) : weights[h], nibble);
          }
#pragma GCC unroll 4
          for (int i = 0; i < MT; ++i) {
            int32_t four;
            std::memcpy(&four, x + i * a.q_stride + step * W::kStep + high * W::kHighAt, 4);
            const __m256i xs = _mm256_set1_epi32(four);
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h)
              pairs[i][h] = _mm256_add_epi16(pairs[i][h], _mm256_maddubs_epi16(weights[h], xs));
          }
        }
        const __m256i factor = _mm256_set1_epi16(high ? W::kHighFactor : 1);
#pragma GCC unroll 4
        for (int i = 0; i < MT; ++i)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) sums[i][h] = _mm256_add_epi32(sums[i][h], _mm256_madd_epi16(pairs[i][h], factor));
      }
    }
    for (int h = 0; h < 2; ++h) {
      const __m256i zero = w.zero(g, h);
      for (int i = 0; i < MT; ++i) {
        const __m256i sum = _mm256_set1_epi32(a.sums[(t + i) * s.groups() + g]);
        sums[i][h] = _mm256_sub_epi32(sums[i][h], _mm256_mullo_epi32(zero, sum));
      }
    }
    end(g, sums);
  }
}

// MT tokens from t on: the same operations whatever MT is.
template <int MT, class Y, class W>
void linear_tokens(const Linear& a, const Block& block, const W& w, int64_t t) {
  const int64_t groups = a.w.shape.groups();
  __m256 y[MT][2] = {};
  for_groups<MT>(a, w, t, [&](int64_t g, const __m256i(&sums)[MT][2]) {
    for (int h = 0; h < 2; ++h) {
      const __m256 scale = _mm256_loadu_ps(w.scale + g * kBlock + h * kBlock / 2);
      for (int i = 0; i < MT; ++i) {
        const __m256 x_scale = _mm256_set1_ps(a.x_scale[(t + i) * groups + g]);
        y[i][h] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][h]), x_scale), scale, y[i][h]);
      }
    }
  });
  for (int i = 0; i < MT; ++i) {
    alignas(32) float sums[kBlock];
    for (int h = 0; h < 2; ++h) _mm256_store_ps(sums + h * kBlock / 2, y[i][h]);
    finish<Y>(a, block, t + i, sums);
  }
}

// Calls f(W, block) for each of the blocks [b0, b1).
template <class F>
void for_blocks(const Packed& w, int64_t b0, int64_t b1, const F& f) {
  for (int64_t b = b0; b < b1; ++b) {
    const Block block = block_at(w.shape, b);
    if (!block.is8)
      f(Four(w, block.index), block);
    else if (block.rows == kBlock && w.shape.cols % kWord == 0)
      f(Eight(w, block.index), block);
    else
      f(EightRest(w, block.index), block);
  }
}

void linear(const Linear& a, int64_t b0, int64_t b1) {
  with_float(a.y_type, [&]<class Y>(Y*) {
    for_blocks(a.w, b0, b1, [&](const auto& w, const Block& block) {
      int64_t t = 0;
      for (; t + kTileTokens <= a.tokens; t += kTileTokens) linear_tokens<kTileTokens, Y>(a, block, w, t);
      for (; t < a.tokens; ++t) linear_tokens<1, Y>(a, block, w, t);
    });
  });
}

void accumulate(const Linear& a, int64_t b0, int64_t b1) {
  const int64_t groups = a.w.shape.groups(), rows = a.w.shape.rows();
  for_blocks(a.w, b0, b1, [&](const auto& w, const Block& block) {
    for (int64_t t = 0; t < a.tokens; ++t)
      for_groups<1>(a, w, t, [&](int64_t g, const __m256i(&sums)[1][2]) {
        alignas(32) int32_t out[kBlock];
        for (int h = 0; h < 2; ++h) _mm256_store_si256(reinterpret_cast<__m256i*>(out + h * kBlock / 2), sums[0][h]);
        for (int64_t i = 0; i < block.rows; ++i)
          a.accumulators[(t * groups + g) * rows + a.w.perm[block.first_row + i]] = out[i];
      });
  });
}

}  // namespace

constinit const Cpu cpu_avx2 = {quantize, linear, accumulate, pack, unpack, salience};

}  // namespace effk::w4a8
