// What the CPU levels of lscd share: checks of a tile, and the end of a sum. All in an anonymous namespace, so that
// each level has its own copy, compiled for it.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/cpu.h"
#include "lscd.h"

namespace effk::lscd {
namespace {

// Tile t of strip s, as read from untrusted memory.
struct Tile {
  int64_t index;    // into offsets
  int64_t sub_col;  // first column of sub-tiles
  int64_t sub_cols;
  const uint64_t* words;
  int64_t begin, end;  // of its values
};

inline Tile tile_at(const Packed& p, int64_t s, int64_t t) {
  const int64_t sub_cols = p.shape.sub_cols(), first = t * kTileSubCols, rest = sub_cols - first;
  const int64_t index = s * p.shape.tiles() + t;
  return {index,
          first,
          rest < kTileSubCols ? rest : kTileSubCols,
          p.bitmap + (s * sub_cols + first) * kStripSubs,
          p.offsets[index],
          p.offsets[index + 1]};
}

// Whether reading a tile's values, however many bits its words have, stays inside of `values`. read_tile() counts the
// values as they are read and compares in the end; only near the end of `values`, where a wrong count could lead out of
// it, is the count made first.
inline bool tile_in_bounds(const Packed& p, const Tile& tile) {
  const int64_t limit = p.num_values - kValuePad;
  if (tile.begin < 0 || tile.end < tile.begin || tile.end > limit) return false;
  if (tile.begin <= limit - kTileWeights) return true;
  int64_t ones = 0;
  for (int64_t i = 0; i < tile.sub_cols * kStripSubs; ++i) ones += __builtin_popcountll(tile.words[i]);
  return align_values(ones) == tile.end - tile.begin;
}

// Calls f(tile, v), which reads the values of tile t of strip s from v on and advances v. False when the tile is
// corrupt: then its sums are worthless, but nothing outside of `values` was read.
template <class V, class F>
inline bool read_tile(const Packed& p, int64_t s, int64_t t, Status* status, const F& f) {
  const Tile tile = tile_at(p, s, t);
  if (tile_in_bounds(p, tile)) {
    const V* const first = static_cast<const V*>(p.values) + tile.begin;
    const V* v = first;
    f(tile, v);
    if (align_values(v - first) == tile.end - tile.begin) return true;
  }
  status->bad_tile = tile.index;
  return false;
}

// Whether all stored weights of strip s are inside of the matrix.
inline bool strip_inside(const Packed& p, int64_t s) {
  const int64_t sub_cols = p.shape.sub_cols(), rows = p.shape.rows - s * kStripRows;
  const uint64_t* words = p.bitmap + s * sub_cols * kStripSubs;
  uint64_t outside = 0;
  if (rows < kStripRows) {
    const uint64_t upper = rows < kSub ? ~uint64_t{0} << rows * kSub : 0;
    const uint64_t lower = rows <= kSub ? ~uint64_t{0} : ~uint64_t{0} << (rows - kSub) * kSub;
    for (int64_t c = 0; c < sub_cols; ++c) outside |= (words[2 * c] & upper) | (words[2 * c + 1] & lower);
  }
  for (int64_t c = p.shape.cols / kSub; c < sub_cols; ++c) {
    const int64_t cols = p.shape.cols - c * kSub;  // inside of this sub-tile, 0 to 7
    const uint64_t row = 0xff & 0xffu << (cols < 0 ? 0 : cols);
    outside |= (words[2 * c] | words[2 * c + 1]) & row * 0x0101010101010101u;
  }
  return outside == 0;
}

// For kernels that stream weights from memory: fetches what comes kAhead bytes after v and a little after words, for
// two columns of sub-tiles at 50% sparsity. The hardware alone stops at every page: 0.8 ms became 0.46 (4096x8192).
// Fetching past the end does no harm.
template <class V>
inline void fetch_ahead(const V* v, const uint64_t* words) {
  constexpr uintptr_t kAhead = 12 << 10, kWordsAhead = 1 << 10;
  constexpr int kLines = kSub * kSub * 2 * kStripSubs * static_cast<int>(sizeof(V)) / 2 / 64;
  for (int i = 0; i < kLines; ++i)
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(v) + kAhead + i * 64));
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(words) + kWordsAhead));
}

inline float activate(float v, Activation a) {
  switch (a) {
    case Activation::none: return v;
    case Activation::relu: return v < 0 ? 0 : v;  // NaN stays
    case Activation::gelu: return 0.5f * v * (1 + std::erf(v * 0.70710678118654752f));
    case Activation::gelu_tanh: return 0.5f * v * (1 + std::tanh(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case Activation::silu: return v / (1 + std::exp(-v));
  }
  return v;
}

// Ends the sums of one strip and token: scale, bias and activation in float32, then one rounding.
template <class X>
inline void finish(const Linear& a, int64_t s, int64_t token, const float* sums) {
  const int64_t row = s * kStripRows, rest = a.w.shape.rows - row, rows = rest < kStripRows ? rest : kStripRows;
  X* y = static_cast<X*>(a.y) + token * a.w.shape.rows + row;
  const X* bias = static_cast<const X*>(a.bias);
  for (int64_t r = 0; r < rows; ++r) {
    float v = sums[r];
    if (a.scale) v *= a.scale[row + r];
    if (bias) v += to_float(bias[row + r]);
    from_float(activate(v, a.activation), &y[r]);
  }
}

// What a level does with one strip, and with a range of strips for linear. Each level's file defines these.
struct Level {
  template <class V>
  static void count(const Shape&, const Dense& w, uint64_t* bitmap, int64_t* counts, int64_t s);
  template <class V>
  static void fill(const Packed&, const Dense& w, int64_t s);
  template <class V, class Out>
  static void unpack(const Packed&, const float* scale, Out* out, int64_t s, Status*);
  static void linear(const Linear&, int64_t s0, int64_t s1, Status*);
};

// The entries of a level's table, which are alike but for that.
struct Entries {
  static void count(const Shape& shape, Type type, const Dense& w, uint64_t* bitmap, int64_t* counts, int64_t s0,
                    int64_t s1) {
    with_type(type, [&]<class V>(V*) {
      for (int64_t s = s0; s < s1; ++s) Level::count<V>(shape, w, bitmap, counts, s);
    });
  }
  static void fill(const Packed& p, const Dense& w, int64_t s0, int64_t s1) {
    with_type(p.type, [&]<class V>(V*) {
      for (int64_t s = s0; s < s1; ++s) Level::fill<V>(p, w, s);
    });
  }
  static void unpack(const Packed& p, const float* scale, void* out, Type out_type, int64_t s0, int64_t s1,
                     Status* status) {
    with_type(p.type, [&]<class V>(V*) {
      for (int64_t s = s0; s < s1 && status->bad_tile < 0; ++s) {
        if (out_type == p.type)
          Level::unpack<V>(p, scale, static_cast<V*>(out), s, status);
        else
          Level::unpack<V>(p, scale, static_cast<float*>(out), s, status);
      }
    });
    check_inside(p, s0, s1, status);
  }
  static void linear(const Linear& a, int64_t s0, int64_t s1, Status* status) {
    Level::linear(a, s0, s1, status);
    check_inside(a.w, s0, s1, status);
  }
  static void check_inside(const Packed& p, int64_t s0, int64_t s1, Status* status) {
    for (int64_t s = s0; s < s1 && status->bad_tile < 0; ++s)
      if (!strip_inside(p, s)) status->bad_tile = s * p.shape.tiles();
  }
};

}  // namespace
}  // namespace effk::lscd
