// lscd_pack and lscd_unpack on CUDA. A warp has a tile; a lane one column of sub-tiles of it when packing.
#pragma once

#include "expand.cuh"

namespace effk::lscd {

// 8 neighbours of a row as they are in memory.
template <class V>
struct alignas(kSub * sizeof(V) < 16 ? kSub * sizeof(V) : 16) Neighbours {
  V v[kSub];
};

// --- Pack. First pass: bitmap and sizes of tiles; their running sum gives the offsets; second pass: values. ---

// V holds the bits of a weight, and `sign` those of them that a zero may have (-0.0).
template <class V>
struct Weights {
  const V* data;
  int64_t row_stride, col_stride;
  V sign;
  bool wide;  // 8 neighbours can be loaded at once
};

// Row r of the tile in this lane's column of sub-tiles that begins at `col`; zeros outside.
template <class V>
EFFK_DEVICE Neighbours<V> load_row(const Weights<V>& w, const Shape& shape, int64_t row, int64_t col) {
  Neighbours<V> out{};
  if (row >= shape.rows) return out;
  const V* from = w.data + row * w.row_stride + col * w.col_stride;
  if (w.wide && col + kSub <= shape.cols) return *reinterpret_cast<const Neighbours<V>*>(from);
#pragma unroll
  for (int i = 0; i < kSub; ++i)
    if (col + i < shape.cols) out.v[i] = from[i * w.col_stride];
  return out;
}

template <class V>
EFFK_DEVICE uint32_t stored_bits(const Weights<V>& w, const Neighbours<V>& row) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kSub; ++i) bits |= static_cast<uint32_t>((row.v[i] & static_cast<V>(~w.sign)) != 0) << i;
  return bits;
}

constexpr int kPackWarps = 4;
constexpr int kPackThreads = kPackWarps * gpu::kWarp;

// Writes the sizes of tiles, as multiples of kValueAlign.
template <class V>
EFFK_KERNEL(kPackThreads, 1)
count_kernel(Shape shape, Weights<V> w, uint64_t* bitmap, int64_t* sizes) {
  const int lane = threadIdx.x % gpu::kWarp;
  const int64_t tile = int64_t{blockIdx.x} * kPackWarps + threadIdx.x / gpu::kWarp, tiles = shape.tiles();
  if (tile >= shape.strips() * tiles) return;
  const int64_t row = tile / tiles * kStripRows, sub_col = tile % tiles * kTileSubCols + lane;
  uint32_t halves[4] = {};
#pragma unroll
  for (int r = 0; r < kStripRows; ++r)
    halves[r / 4] |= stored_bits(w, load_row(w, shape, row + r, sub_col * kSub)) << r % 4 * kSub;
  uint32_t ones = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) ones += gpu::popcount(halves[i]);
  if (sub_col < shape.sub_cols()) {
    uint64_t* words = bitmap + (tile / tiles * shape.sub_cols() + sub_col) * kStripSubs;
    for (int h = 0; h < 2; ++h) words[h] = halves[2 * h] | static_cast<uint64_t>(halves[2 * h + 1]) << 32;
  }
  const uint32_t before = sum_before(ones);
  if (lane == gpu::kWarp - 1) sizes[tile] = align_values(before + ones);
}

// A tile is put together in shared memory and written as a whole.
template <class V>
EFFK_KERNEL(kPackThreads, 1)
fill_kernel(Shape shape, Weights<V> w, const int64_t* offsets, V* values) {
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp;
  const int64_t tile = int64_t{blockIdx.x} * kPackWarps + warp, tiles = shape.tiles();
  if (tile >= shape.strips() * tiles) return;
  const int64_t row = tile / tiles * kStripRows, col = (tile % tiles * kTileSubCols + lane) * kSub;
  V* const packed = reinterpret_cast<V*>(gpu::shared_memory()) + warp * kTileWeights;

  uint32_t ones = 0;
#pragma unroll
  for (int r = 0; r < kStripRows; ++r) ones += gpu::popcount(stored_bits(w, load_row(w, shape, row + r, col)));
  const uint32_t before = sum_before(ones), total = gpu::shuffle(before + ones, gpu::kWarp - 1);
  const uint32_t size = static_cast<uint32_t>(align_values(total));
  if (total + lane < size) packed[total + lane] = V{};  // the gap, at most 15
  V* to = packed + before;
#pragma unroll 4
  for (int r = 0; r < kStripRows; ++r) {
    const Neighbours<V> from = load_row(w, shape, row + r, col);
    const uint32_t bits = stored_bits(w, from);
#pragma unroll
    for (int i = 0; i < kSub; ++i)
      if (bits & 1u << i) *to++ = from.v[i];
  }
  gpu::sync_warp();

  constexpr uint32_t kPerPiece = 16 / sizeof(V);
  V* const out = values + offsets[tile];
  for (uint32_t i = lane * kPerPiece; i < size; i += gpu::kWarp * kPerPiece)
    *reinterpret_cast<uint4*>(out + i) = *reinterpret_cast<const uint4*>(packed + i);
}

template <class V>
Weights<V> weights_of(const Dense& w, bool is_float) {
  const bool wide = w.col_stride == 1 && w.row_stride % kSub == 0 &&
                    reinterpret_cast<uintptr_t>(w.data) % alignof(Neighbours<V>) == 0;
  const V sign = is_float ? static_cast<V>(V{1} << (8 * sizeof(V) - 1)) : V{0};
  return {static_cast<const V*>(w.data), w.row_stride, w.col_stride, sign, wide};
}

// Calls f with a null pointer to an unsigned integer of the size of t.
template <class F>
gpu::Error with_bits_of(Type t, const F& f) {
  switch (type_size(t)) {
    case 1: return f(static_cast<uint8_t*>(nullptr));
    case 2: return f(static_cast<uint16_t*>(nullptr));
    default: return f(static_cast<uint32_t*>(nullptr));
  }
}

inline dim3 pack_grid(const Shape& shape) {
  return dim3(static_cast<unsigned>((shape.strips() * shape.tiles() + kPackWarps - 1) / kPackWarps));
}

// First pass. sizes [strips * tiles].
inline gpu::Error launch_count(const Shape& shape, Type type, const Dense& w, uint64_t* bitmap, int64_t* sizes,
                               gpu::Stream stream) {
  if (shape.words() == 0) return nullptr;
  return with_bits_of(type, [&]<class V>(V*) {
    return gpu::launch(count_kernel<V>, pack_grid(shape), kPackThreads, 0, stream, shape,
                       weights_of<V>(w, type != Type::i8), bitmap, sizes);
  });
}

// Second pass. p.values is aligned to 16 bytes and p.offsets are right.
inline gpu::Error launch_fill(const Packed& p, const Dense& w, gpu::Stream stream) {
  return with_bits_of(p.type, [&]<class V>(V*) -> gpu::Error {
    V* const values = static_cast<V*>(const_cast<void*>(p.values));
    if (gpu::Error e = gpu::zero(values + p.num_values - kValuePad, kValuePad * sizeof(V), stream)) return e;
    if (p.shape.words() == 0) return nullptr;
    return gpu::launch(fill_kernel<V>, pack_grid(p.shape), kPackThreads, kPackWarps * kTileWeights * int{sizeof(V)},
                       stream, p.shape, weights_of<V>(w, p.type != Type::i8), p.offsets, values);
  });
}

// --- Unpack ---

constexpr int kUnpackTiles = 4;  // of a warp

// Writes an octet, of which `cols` are inside of the matrix. The bits of a weight stay as they are where the type does
// and there is no scale.
template <class V, class Out>
EFFK_DEVICE void unpack_octet(const Octet& w, const float* scale, Out* to, int64_t cols, bool wide) {
  Neighbours<Out> out;
#pragma unroll
  for (int i = 0; i < kSub; ++i) {
    V v;
    if constexpr (sizeof(V) == 4)
      v = float_of(w.v[i]);
    else if constexpr (sizeof(V) == 2)
      v.bits = static_cast<uint16_t>(w.v[i]);
    else
      v = static_cast<V>(w.v[i]);

    if constexpr (std::is_same_v<Out, V>) out.v[i] = v;
    if constexpr (!std::is_same_v<Out, int8_t>)
      if (scale || !std::is_same_v<Out, V>) from_float(scale ? to_float(v) * *scale : to_float(v), &out.v[i]);
  }
  if (wide) {
    *reinterpret_cast<Neighbours<Out>*>(to) = out;
  } else {
#pragma unroll
    for (int i = 0; i < kSub; ++i)
      if (i < cols) to[i] = out.v[i];
  }
}

// out [rows, cols], contiguous and aligned to 16 bytes.
template <class V, class Out>
EFFK_KERNEL(kThreads, 2)
unpack_kernel(Packed p, const float* scale, Out* out) {
  const int warp = threadIdx.x / gpu::kWarp, g = threadIdx.x % gpu::kWarp / 4;
  const int64_t tiles = p.shape.tiles(), parts = (tiles + kUnpackTiles - 1) / kUnpackTiles;
  const int64_t item = int64_t{blockIdx.x} * kWarps + warp, strip = item / parts;
  if (strip >= p.shape.strips()) return;
  const int t0 = static_cast<int>(item % parts) * kUnpackTiles;
  const int t1 = t0 + kUnpackTiles < tiles ? t0 + kUnpackTiles : static_cast<int>(tiles);
  const int64_t row = strip * kStripRows + g, cols = p.shape.cols;
  for_each_step<V, 1>(p, strip, t0, t1, gpu::shared_memory() + warp * kWarpBytes,
                      [&](uint32_t col, const Octet& upper, const Octet& lower) {
                        const int64_t left = cols - col;
                        const auto write = [&](int64_t r, const Octet& w) {
                          if (r < p.shape.rows && left > 0)
                            unpack_octet<V>(w, scale ? scale + r : nullptr, out + r * cols + col, left,
                                            cols % kSub == 0);
                        };
                        write(row, upper);
                        write(row + kSub, lower);
                      });
}

// out_type: that of the values, or any float type for int8 ones.
inline gpu::Error launch_unpack(const Packed& p, const float* scale, void* out, Type out_type, gpu::Stream stream) {
  if (p.shape.words() == 0) return nullptr;
  const auto run = [&]<class V, class Out>(V*, Out*) {
    const int64_t items = p.shape.strips() * ((p.shape.tiles() + kUnpackTiles - 1) / kUnpackTiles);
    return gpu::launch(unpack_kernel<V, Out>, dim3(static_cast<unsigned>((items + kWarps - 1) / kWarps)), kThreads,
                       kWarps * kWarpBytes, stream, p, scale, static_cast<Out*>(out));
  };
  float* const f32 = nullptr;
  Half* const f16 = nullptr;
  BFloat16* const bf16 = nullptr;
  int8_t* const i8 = nullptr;
  if (p.type != Type::i8)
    return p.type == Type::f32 ? run(f32, f32) : p.type == Type::f16 ? run(f16, f16) : run(bf16, bf16);
  switch (out_type) {
    case Type::f32: return run(i8, f32);
    case Type::f16: return run(i8, f16);
    case Type::bf16: return run(i8, bf16);
    default: return run(i8, i8);
  }
}

}  // namespace effk::lscd
