// Packing and unpacking on CUDA.
#pragma once

#include "quantize.cuh"

namespace effk::w4a8 {

constexpr int kPackWarps = 4;
constexpr int kPackThreads = kPackWarps * gpu::kWarp;
constexpr int kMaxGroup = 256;

// --- Order ---

// perm from ends [rows], how many of the features up to each one have 8 bits: both kinds keep their order.
EFFK_KERNEL(kThreads, 1) order_kernel(const int64_t* ends, int64_t rows, int32_t* perm) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= rows) return;
  const int64_t before = i == 0 ? 0 : ends[i - 1], n4 = rows - ends[rows - 1];
  perm[ends[i] > before ? n4 + before : i - before] = static_cast<int32_t>(i);
}

EFFK_KERNEL(kThreads, 1) identity_kernel(int64_t rows, int32_t* perm) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows) perm[i] = static_cast<int32_t>(i);
}

inline dim3 grid_of(int64_t items, int64_t of_block) { return dim3(static_cast<unsigned>(ceil_div(items, of_block))); }

// ends may be null: no feature has 8 bits.
inline gpu::Error launch_order(const int64_t* ends, int64_t rows, int32_t* perm, gpu::Stream stream) {
  if (rows == 0) return nullptr;
  return ends ? gpu::launch(order_kernel, grid_of(rows, kThreads), kThreads, 0, stream, ends, rows, perm)
              : gpu::launch(identity_kernel, grid_of(rows, kThreads), kThreads, 0, stream, rows, perm);
}

// --- Pack ---

EFFK_DEVICE float warp_max(float v) {
#pragma unroll
  for (int by = 1; by < gpu::kWarp; by *= 2) {
    const float other = gpu::shuffle_xor(v, by);
    if (other > v) v = other;
  }
  return v;
}

// The lanes' values from 0 to 15, and their scale and zero point.
EFFK_DEVICE float asymmetric(const float (&v)[kMostValues], int32_t (&q)[kMostValues], int32_t* zero) {
  float low = 0, high = 0;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) {
    if (v[i] < low) low = v[i];
    if (v[i] > high) high = v[i];
    finite &= (bits_of(v[i]) & 0x7f800000) != 0x7f800000;
  }
  low = -warp_max(-low);
  high = warp_max(high);
  finite = gpu::vote(!finite) == 0;
  const float scale = scale_of(finite ? high - low : kInfinity, 15);
  *zero = to_integer(-low, scale, 0, 0, 15);
#pragma unroll
  for (int i = 0; i < kMostValues; ++i) q[i] = to_integer(v[i], scale, static_cast<float>(*zero), 0, 15);
  return scale;
}

// A warp packs a group of a block. Its integers are put together in shared memory, [16][group], since a block's words
// go down the rows. Each word and scale is written, those of rows that aren't there too, as zeros.
template <class X>
EFFK_KERNEL(kPackThreads, 1)
pack_kernel(Pack a, bool wide) {
  const Shape& s = a.w.shape;
  const int lane = threadIdx.x % gpu::kWarp, warp = threadIdx.x / gpu::kWarp;
  const int64_t groups = s.groups(), item = int64_t{blockIdx.x} * kPackWarps + warp;
  if (item >= s.blocks() * groups) return;
  const int64_t b = item / groups, group = item % groups;
  const bool is8 = b >= s.blocks4();
  const int64_t block = is8 ? b - s.blocks4() : b, row0 = block * kBlock;  // of its kind
  const int64_t rows = block_rows(is8 ? s.n8 : s.n4, block), first = (is8 ? s.n4 : 0) + row0;
  const int count = static_cast<int>(s.group) / gpu::kWarp;
  const int64_t k0 = group * s.group, valid = s.cols - k0 < s.group ? s.cols - k0 : s.group;

  uint8_t* const integers = reinterpret_cast<uint8_t*>(gpu::shared_memory()) + warp * kBlock * kMaxGroup;
  auto* const scales = const_cast<float*>(is8 ? a.w.scale8 : a.w.scale4) + group_at(s, row0, group);
  auto* const zeros = const_cast<uint8_t*>(a.w.zero4) + group_at(s, row0, group);
#pragma unroll 1
  for (int64_t i = 0; i < kBlock; ++i) {
    int32_t q[kMostValues] = {}, zero = 0;
    float scale = 0;
    if (i < rows) {
      float v[kMostValues];
      load_values(
          static_cast<const X*>(a.dense) + a.w.perm[first + i] * a.row_stride + (k0 + lane * count) * a.col_stride,
          a.col_stride, count, valid - lane * count, wide, v);
      scale = is8 ? symmetric(v, q) : asymmetric(v, q, &zero);
    }
    store_bytes(integers + i * kMaxGroup + lane * count, q, count, count);
    if (lane == 0) {
      scales[i] = scale;
      if (!is8) zeros[i] = static_cast<uint8_t>(zero);
    }
  }
  gpu::sync_warp();

  if (is8) {
    auto* const q8 = const_cast<uint8_t*>(a.w.q8);
    const int64_t words = valid / kWord;
    for (int64_t j = lane; j < words * rows; j += gpu::kWarp) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(integers + j % rows * kMaxGroup + j / rows * kWord);
      *reinterpret_cast<uint32_t*>(q8 + q8_at(s, row0 + j % rows, k0 + j / rows * kWord)) = word ^ 0x80808080;
    }
    const int64_t rest = valid - words * kWord;
    for (int64_t j = lane; j < rest * rows; j += gpu::kWarp) {
      const int64_t k = words * kWord + j % rest;
      q8[q8_at(s, row0 + j / rest, k0 + k)] = integers[j / rest * kMaxGroup + k] ^ kZero8;
    }
  } else {
    auto* const q4 = reinterpret_cast<uint32_t*>(const_cast<uint8_t*>(a.w.q4) + q4_at(s, row0, k0));
    for (int64_t j = lane; j < ceil_div(valid, kChunk) * kBlock; j += gpu::kWarp) {
      const auto* from = reinterpret_cast<const uint32_t*>(integers + j % kBlock * kMaxGroup + j / kBlock * kChunk);
      // What follows the last column is 0 but for the zero point: integers of nothing.
      const int64_t left = valid - j / kBlock * kChunk;
      const auto keep = [](int64_t bytes) { return bytes >= 4 ? ~0u : bytes <= 0 ? 0u : (1u << 8 * bytes) - 1; };
      q4[j] = (from[0] & keep(left)) | (from[1] & keep(left - 4)) << 4;
    }
  }
}

// a.w.q8 is aligned to 4 bytes, as new tensors are.
inline gpu::Error launch_pack(const Pack& a, gpu::Stream stream) {
  const Shape& s = a.w.shape;
  const int64_t items = s.blocks() * s.groups();
  if (items == 0) return nullptr;
  const bool wide = can_load_wide(a.dense, a.row_stride, a.col_stride, s.group / gpu::kWarp, type_size(a.type));
  const auto kernel = a.type == Type::f32   ? pack_kernel<float>
                      : a.type == Type::f16 ? pack_kernel<Half>
                                            : pack_kernel<BFloat16>;
  return gpu::launch(kernel, grid_of(items, kPackWarps), kPackThreads, kPackWarps * kBlock * kMaxGroup, stream, a,
                     wide);
}

// --- Unpack ---

EFFK_KERNEL(kThreads, 1) invert_kernel(const int32_t* perm, int64_t rows, int32_t* inverse) {
  invert(perm, rows, inverse, int64_t{blockIdx.x} * kThreads + threadIdx.x);
}

// A thread unpacks 8 columns of a row: 32 bytes of the result. The rows of a block are neighbours, as in the words.
// Then it fills its columns of a feature that perm forgot, if perm is corrupt.
EFFK_KERNEL(kThreads, 1) unpack_kernel(Packed w, const int32_t* inverse, float* dense) {
  const Shape& s = w.shape;
  const int64_t chunks = s.chunks(), item = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t b = item / (chunks * kBlock), chunk = item / kBlock % chunks, k = chunk * kChunk;
  if (b >= s.blocks()) return;
  const bool is8 = b >= s.blocks4();
  const int64_t row = (is8 ? b - s.blocks4() : b) * kBlock + item % kBlock;  // of its kind
  if (row >= (is8 ? s.n8 : s.n4)) return;
  const Place place = place_of(w, inverse, (is8 ? s.n4 : 0) + row);

  const int64_t at = group_at(s, row, k / s.group), valid = s.cols - k;
  const float scale = is8 ? w.scale8[at] : w.scale4[at];
  const int32_t zero = is8 ? kZero8 : w.zero4[at];
  float out[kChunk] = {};
  if (is8) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < valid) out[i] = static_cast<float>(w.q8[q8_at(s, row, k + i)] - zero) * scale;
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(w.q4 + q4_at(s, row, k));
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int32_t q = word >> (i % 4 * 8 + i / 4 * 4) & 15;
      out[i] = static_cast<float>(q - zero) * scale;
    }
  }
  const auto write = [&](int32_t feature, bool fill) {
    if (feature < 0) return;
    float* const to = dense + feature * s.cols + k;
    if (s.cols % 4 == 0 && valid >= kChunk) {
#pragma unroll
      for (int i = 0; i < kChunk; i += 4)
        *reinterpret_cast<uint4*>(to + i) =
            fill ? uint4{0, 0, 0, 0}
                 : uint4{bits_of(out[i]), bits_of(out[i + 1]), bits_of(out[i + 2]), bits_of(out[i + 3])};
    } else {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < valid) to[i] = fill ? 0 : out[i];
    }
  };
  write(place.feature, false);
  write(place.hole, true);
}

// dense [rows, cols], aligned to 16 bytes; q4 aligned to 4; inverse has room for rows.
inline gpu::Error launch_unpack(const Packed& w, int32_t* inverse, float* dense, gpu::Stream stream) {
  const Shape& s = w.shape;
  if (s.rows() == 0 || s.cols == 0) return nullptr;
  if (gpu::Error e =
          gpu::launch(invert_kernel, grid_of(s.rows(), kThreads), kThreads, 0, stream, w.perm, s.rows(), inverse))
    return e;
  return gpu::launch(unpack_kernel, grid_of(s.blocks() * s.chunks() * kBlock, kThreads), kThreads, 0, stream, w,
                     inverse, dense);
}

}  // namespace effk::w4a8
