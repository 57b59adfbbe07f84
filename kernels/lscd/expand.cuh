// A warp expands a strip of packed weights: the heart of lscd on CUDA.
//
// The values of consecutive tiles of a strip follow each other in memory, so a warp copies them as one stream,
// in chunks of 512 bytes, into a ring in shared memory. Chunks know nothing of tiles: the ring is full at every
// sparsity, and a dense tile (0% sparsity) needs no larger one.
//
// A step is 16 x 32 weights, two rows of four sub-tiles. With g = lane / 4 and t = lane % 4, a lane expands row g of
// the t-th upper sub-tile and of the one below: 8 consecutive bits of a word each, so 8 consecutive columns, whose
// values are consecutive too, and one popcount finds the first of them. As the columns of W and x may be renamed
// alike, these 8 serve as columns 2t, 2t+1, 2t+8 and 2t+9 of two m16n8k16 products, and a lane loads its 8 columns
// of x, contiguous, at once.
#pragma once

#include "../common/device.cuh"
#include "lscd.h"

namespace effk::lscd {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = kWarps * gpu::kWarp;

constexpr int kStepSubCols = 4;
constexpr int kStepCols = kStepSubCols * kSub;
constexpr int kStepWeights = kStripRows * kStepCols;

// Steps whose values are in the ring at the same time: as many of a tile as fit when they are dense.
constexpr int kGroupBytes = 4096;
template <class V>
constexpr int kGroupSteps = kGroupBytes / kStepWeights / static_cast<int>(sizeof(V)) < kTileSubCols / kStepSubCols
                                ? kGroupBytes / kStepWeights / static_cast<int>(sizeof(V))
                                : kTileSubCols / kStepSubCols;

constexpr int kChunkBytes = 16 * gpu::kWarp;
constexpr int kRingChunks = kGroupBytes / kChunkBytes + 1;  // a group may begin in the middle of a chunk
constexpr int kRingBytes = kRingChunks * kChunkBytes;
constexpr int kMirrorBytes = 32;  // the ring's beginning again, behind its end: 8 values needn't be split there
constexpr int kEntryBytes = 2 * gpu::kWarp * 16;
// Shared memory of a warp.
constexpr int kWarpBytes = kRingBytes + kMirrorBytes + kEntryBytes;
static_assert(kWarpBytes % 16 == 0);

// 8 consecutive weights of a row: the bits of each, those of an int8 with its sign extended.
struct Octet {
  uint32_t v[kSub];
};

// The next stored weights in shared memory, where `bits` has ones; zeros elsewhere.
template <class V>
EFFK_DEVICE Octet expand(uint32_t address, uint32_t bits) {
  Octet w{};
#pragma unroll
  for (int i = 0; i < kSub; ++i) gpu::take_shared<V>(w.v[i], address, bits & 1u << i);
  return w;
}

// The values of a warp's tiles on their way through its ring. Whatever the offsets are, nothing outside of
// `values` is read: the stream is cut there.
class ValueStream {
 public:
  EFFK_DEVICE ValueStream(const Packed& p, int value_bytes, int64_t first, int64_t last, char* ring)
      : ring_(ring), mirrored_((kSub * value_bytes + 15) / 16) {
    // Bits past the end of the stream find old bytes in the ring.
    const int64_t limit = p.num_values - kValuePad;
    const int64_t begin = clamp(p.offsets[first], 0, limit) / kValueAlign * kValueAlign;
    const int64_t end = clamp(p.offsets[last], begin, limit);
    const int lane_byte = static_cast<int>(threadIdx.x) % gpu::kWarp * 16;
    from_ = static_cast<const char*>(p.values) + begin * value_bytes + lane_byte;
    const int64_t bytes = (end - begin) * value_bytes, chunks = (bytes + kChunkBytes - 1) / kChunkBytes;
    constexpr int64_t kMost = int64_t{1} << 30;  // more than a strip can have
    left_ = static_cast<int>(clamp(chunks, 0, kMost));
    // The padding of `values` completes the last 16 bytes.
    is_short_ = left_ > 0 && int64_t{left_ - 1} * kChunkBytes + lane_byte >= bytes;
  }

  // Starts copying into all of the ring but for the chunks in use; with `done` more all lanes are done.
  EFFK_DEVICE void fill(int done) {
    held_ -= done;
    const int lane_byte = static_cast<int>(threadIdx.x) % gpu::kWarp * 16;
#pragma unroll 1
    while (left_ > 0 && held_ < kRingChunks) {
      --left_;
      if (left_ > 0 || !is_short_) {
        gpu::async_copy(ring_ + slot_ * kChunkBytes + lane_byte, from_);
        if (slot_ == 0 && lane_byte < mirrored_ * 16) gpu::async_copy(ring_ + kRingBytes + lane_byte, from_);
      }
      gpu::async_commit();
      from_ += kChunkBytes;
      ++held_;
      slot_ = slot_ + 1 == kRingChunks ? 0 : slot_ + 1;
    }
  }

  // Waits until the ring's first `chunks` are there. Followed by sync_warp(), as other lanes copied some.
  EFFK_DEVICE void wait(int chunks) const {
    const int pending = held_ - chunks;
    // One chunk is one group; waiting for a few more than needed keeps the table short.
    if (pending >= 6)
      gpu::async_wait<6>();
    else if (pending >= 4)
      gpu::async_wait<4>();
    else if (pending >= 2)
      gpu::async_wait<2>();
    else
      gpu::async_wait<0>();
  }

 private:
  EFFK_DEVICE static int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }

  const char* from_;  // the lane's next 16 bytes
  char* ring_;
  int mirrored_;   // 16-byte pieces of it
  int left_;       // chunks of the stream that are still to copy
  bool is_short_;  // the last of them ends before the lane's bytes
  int held_ = 0;   // chunks that the ring has or is getting; fewer than none where the bitmap wants too many
  int slot_ = 0;   // of the next one
};

// Sum of the lanes before this one.
EFFK_DEVICE uint32_t sum_before(uint32_t v) {
  const int lane = threadIdx.x % gpu::kWarp;
  uint32_t sum = v;
#pragma unroll
  for (int by = 1; by < gpu::kWarp; by *= 2) {
    const uint32_t other = gpu::shuffle_up(sum, by);
    if (lane >= by) sum += other;
  }
  return sum - v;
}

// Calls f(column, upper, lower) for each step of tiles [t0, t1) of a strip, in all lanes of a warp at once: `upper`
// is this lane's Octet at row lane / 4 and `column`, `lower` the one 8 rows below. `shared` is the warp's
// kWarpBytes of shared memory, free again afterwards.
template <class V, int kUnroll, class F>
EFFK_DEVICE void for_each_step(const Packed& p, int64_t strip, int t0, int t1, char* shared, F&& f) {
  if (t0 >= t1) return;
  constexpr int kBytes = sizeof(V);
  const int lane = threadIdx.x % gpu::kWarp, g = lane / 4, t = lane % 4;
  char* const ring = shared;
  uint4* const entries = reinterpret_cast<uint4*>(shared + kRingBytes + kMirrorBytes);
  const int sub_cols = static_cast<int>(p.shape.sub_cols());
  const int64_t first_tile = strip * p.shape.tiles();

  // A lane loads the upper and lower word of one column of sub-tiles of each tile.
  const uint64_t* words = p.bitmap + (strip * sub_cols + t0 * kTileSubCols + lane) * kStripSubs;
  const auto load_words = [&](int tile) {
    uint4 w{0, 0, 0, 0};
    if (tile < t1 && tile * kTileSubCols + lane < sub_cols) w = gpu::load_once(words);
    words += kTileWords;
    return w;
  };
  uint4 next = load_words(t0);
  ValueStream stream(p, kBytes, first_tile + t0, first_tile + t1, ring);
  stream.fill(0);

  const uint32_t row_shift = g % 4 * kSub;
  const uint32_t ring_end = gpu::shared_address(ring) + kRingBytes;
  int in_chunk = 0;  // bytes that are used up of the first chunk in use
  int at = 0;        // the first byte that isn't, in the ring
  for (int tile = t0; tile < t1; ++tile) {
    // For each half word where its values begin, counted from the tile's first: entries[half][column] is
    // {upper half word, its begin, lower half word, its begin}.
    const uint4 w = next;
    next = load_words(tile + 1);
    const uint32_t upper_half = gpu::popcount(w.x), upper = upper_half + gpu::popcount(w.y);
    const uint32_t lower_half = upper + gpu::popcount(w.z), ones = lower_half + gpu::popcount(w.w);
    const uint32_t before = sum_before(ones);
    entries[lane] = {w.x, before, w.z, before + upper};
    entries[gpu::kWarp + lane] = {w.y, before + upper_half, w.w, before + lower_half};
    const int tile_values = align_values(gpu::shuffle(before + ones, gpu::kWarp - 1));

    const int rest = sub_cols - tile * kTileSubCols;
    const int tile_steps = rest < kTileSubCols ? (rest + kStepSubCols - 1) / kStepSubCols : kTileSubCols / kStepSubCols;
    int group_begin = 0;  // values of the tile before the group
    for (int step0 = 0; step0 < tile_steps; step0 += kGroupSteps<V>) {
      const int step1 = step0 + kGroupSteps<V> < tile_steps ? step0 + kGroupSteps<V> : tile_steps;
      const int group_end = step1 < tile_steps ? gpu::shuffle(before, step1 * kStepSubCols) : tile_values;
      const int group_bytes = (group_end - group_begin) * kBytes;
      // Of the tile's first value, could the ring be unrolled backwards.
      const uint32_t group_address = ring_end - kRingBytes + at - group_begin * kBytes;
      in_chunk += group_bytes;
      stream.wait((in_chunk + kChunkBytes - 1) / kChunkBytes);
      gpu::sync_warp();
#pragma unroll kUnroll
      for (int step = step0; step < step1; ++step) {
        const uint4 e = entries[g / 4 * gpu::kWarp + step * kStepSubCols + t];
        const auto octet = [&](uint32_t half, uint32_t begin) {
          const uint32_t value = begin + gpu::popcount(half & ((1u << row_shift) - 1));
          uint32_t address = group_address + value * kBytes;
          if (address >= ring_end) address -= kRingBytes;
          return expand<V>(address, half >> row_shift);
        };
        f(static_cast<uint32_t>(tile) * kTileCols + step * kStepCols + t * kSub, octet(e.x, e.y), octet(e.z, e.w));
      }
      gpu::sync_warp();

      group_begin = group_end;
      at += group_bytes;
      if (at >= kRingBytes) at -= kRingBytes;
      stream.fill(in_chunk / kChunkBytes);
      in_chunk %= kChunkBytes;
    }
  }
  gpu::async_wait<0>();  // corrupt offsets may have started copies that nobody waited for
  gpu::sync_warp();
}

}  // namespace effk::lscd
