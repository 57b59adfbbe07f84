// lscd in plain C++, for any CPU: what the other levels must agree with.
#include "cpu_common.h"

namespace effk::lscd {
namespace {

template <class V>
bool is_zero(V v) {
  return to_float(v) == 0;
}

template <class V>
void Level::count(const Shape& shape, const Dense& w, uint64_t* bitmap, int64_t* counts, int64_t s) {
  const V* data = static_cast<const V*>(w.data);
  const int64_t sub_cols = shape.sub_cols();
  for (int64_t t = 0; t < shape.tiles(); ++t) counts[s * shape.tiles() + t] = 0;
  for (int64_t c = 0; c < sub_cols; ++c) {
    for (int64_t h = 0; h < kStripSubs; ++h) {
      uint64_t word = 0;
      for (int64_t i = 0; i < kSub * kSub; ++i) {
        const int64_t row = s * kStripRows + h * kSub + i / kSub, col = c * kSub + i % kSub;
        if (row >= shape.rows || col >= shape.cols) continue;
        if (!is_zero(data[row * w.row_stride + col])) word |= uint64_t{1} << i;
      }
      bitmap[(s * sub_cols + c) * kStripSubs + h] = word;
      counts[s * shape.tiles() + c / kTileSubCols] += __builtin_popcountll(word);
    }
  }
}

template <class V>
void Level::fill(const Packed& p, const Dense& w, int64_t s) {
  const V* data = static_cast<const V*>(w.data);
  for (int64_t t = 0; t < p.shape.tiles(); ++t) {
    const Tile tile = tile_at(p, s, t);
    V* v = static_cast<V*>(const_cast<void*>(p.values)) + tile.begin;
    V* const end = v + (tile.end - tile.begin);
    for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) {
      const int64_t row = s * kStripRows + i % kStripSubs * kSub, col = (tile.sub_col + i / kStripSubs) * kSub;
      for (uint64_t word = tile.words[i]; word; word &= word - 1) {
        const int64_t bit = __builtin_ctzll(word);
        *v++ = data[(row + bit / kSub) * w.row_stride + col + bit % kSub];
      }
    }
    while (v < end) *v++ = V{};
  }
}

// Calls f(sub column, half, its 64 weights) for each sub-tile of strip s; false when a tile is corrupt.
template <class V, class F>
bool for_sub_tiles(const Packed& p, int64_t s, Status* status, const F& f) {
  for (int64_t t = 0; t < p.shape.tiles(); ++t) {
    const bool good = read_tile<V>(p, s, t, status, [&](const Tile& tile, const V*& v) {
      for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) {
        V block[kSub * kSub] = {};
        for (uint64_t word = tile.words[i]; word; word &= word - 1) block[__builtin_ctzll(word)] = *v++;
        f(tile.sub_col + i / kStripSubs, i % kStripSubs, block);
      }
    });
    if (!good) return false;
  }
  return true;
}

template <class V, class Out>
void Level::unpack(const Packed& p, const float* scale, Out* out, int64_t s, Status* status) {
  for_sub_tiles<V>(p, s, status, [&](int64_t c, int64_t h, const V* block) {
    for (int64_t i = 0; i < kSub * kSub; ++i) {
      const int64_t row = s * kStripRows + h * kSub + i / kSub, col = c * kSub + i % kSub;
      if (row >= p.shape.rows || col >= p.shape.cols) continue;
      Out& to = out[row * p.shape.cols + col];
      if constexpr (std::is_same_v<V, Out>) to = block[i];
      if constexpr (!std::is_same_v<Out, int8_t>)
        if (scale) from_float(to_float(block[i]) * scale[row], &to);
    }
  });
}

template <class V, class X>
void linear_strip(const Linear& a, int64_t s, Status* status) {
  const int64_t padded = a.w.shape.padded_cols();
  constexpr int64_t kTokens = 16;  // decoded once for so many
  for (int64_t t0 = 0; t0 < a.tokens; t0 += kTokens) {
    const int64_t tokens = a.tokens - t0 < kTokens ? a.tokens - t0 : kTokens;
    float sums[kTokens][kStripRows] = {};
    const bool good = for_sub_tiles<V>(a.w, s, status, [&](int64_t c, int64_t h, const V* block) {
      for (int64_t t = 0; t < tokens; ++t) {
        const float* x = static_cast<const float*>(a.prepared) + (t0 + t) * padded + c * kSub;
        for (int64_t i = 0; i < kSub * kSub; ++i) sums[t][h * kSub + i / kSub] += to_float(block[i]) * x[i % kSub];
      }
    });
    if (!good) return;
    for (int64_t t = 0; t < tokens; ++t) finish<X>(a, s, t0 + t, sums[t]);
  }
}

void prepare(const Linear& a, int64_t t0, int64_t t1) {
  with_type(a.x_type, [&]<class X>(X*) {
    const int64_t padded = a.w.shape.padded_cols();
    for (int64_t t = t0; t < t1; ++t) {
      const X* from = static_cast<const X*>(a.x) + t * a.x_token_stride;
      float* to = static_cast<float*>(a.prepared) + t * padded;
      for (int64_t k = 0; k < padded; ++k) to[k] = k < a.w.shape.cols ? to_float(from[k * a.x_col_stride]) : 0;
    }
  });
}

void Level::linear(const Linear& a, int64_t s0, int64_t s1, Status* status) {
  with_type(a.x_type, [&]<class X>(X*) {
    if constexpr (!std::is_same_v<X, int8_t>)
      for (int64_t s = s0; s < s1 && status->bad_tile < 0; ++s)
        a.w.type == a.x_type ? linear_strip<X, X>(a, s, status) : linear_strip<int8_t, X>(a, s, status);
  });
}

}  // namespace

constinit const Cpu cpu_scalar = {
    .count = Entries::count,
    .fill = Entries::fill,
    .unpack = Entries::unpack,
    .prepared_bytes = [](const Linear& a) -> int64_t { return a.tokens * a.w.shape.padded_cols() * 4; },
    .prepare = prepare,
    .linear = Entries::linear,
};

}  // namespace effk::lscd
