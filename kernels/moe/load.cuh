// What moe's CUDA kernels share: indices of either type, values one by one, and which rows belong to which expert.
#pragma once

#include <cmath>

#include "../common/indices.cuh"
#include "moe.h"

namespace effk::moe {

// 16 bytes of values, one by one: those from the `valid`-th on aren't read and are 0.
template <class X>
EFFK_DEVICE uint4 load_each(const X* from, int64_t valid) {
  constexpr int kCount = 16 / sizeof(X), kPerWord = 4 / sizeof(X);
  uint32_t word[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < valid) word[i / kPerWord] |= bits_of_value(from[i]) << i % kPerWord * 16;
  return {word[0], word[1], word[2], word[3]};
}

EFFK_DEVICE bool is_multiple(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Rounds neighbouring values to Out and stores those before the `valid`-th, all at once where they may.
template <class Out, int kCount>
EFFK_DEVICE void store_values(Out* to, const float (&v)[kCount], int64_t valid) {
  constexpr int kWords = kCount * static_cast<int>(sizeof(Out)) / 4;
  if constexpr (kWords >= 1 && kCount > 1) {
    if (valid >= kCount && is_multiple(to, 4 * kWords)) {
      uint32_t word[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        if constexpr (sizeof(Out) == 4)
          word[i] = bits_of(v[i]);
        else
          word[i] = gpu::pack_pair<Out>(v[2 * i], v[2 * i + 1]);
      if constexpr (kWords == 1)
        *reinterpret_cast<uint32_t*>(to) = word[0];
      else if constexpr (kWords == 2)
        *reinterpret_cast<uint2*>(to) = {word[0], word[1]};
      else
        *reinterpret_cast<uint4*>(to) = {word[0], word[1], word[2], word[3]};
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < valid) from_float(v[i], to + i);
}

// Whether rows of `stride` values of `size` bytes all begin at multiples of 16 bytes. The stride of one row is free.
inline bool begin_aligned(const void* p, int64_t rows, int64_t stride, int64_t size) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (rows <= 1 || stride * size % 16 == 0);
}

// --- Groups ---

// Which sorted rows each expert has. Offsets are believed as far as they ascend within the rows that there are.
struct Groups {
  Indices offsets;  // [experts]
  int64_t experts;
  int64_t rows;   // less than 2^31
  bool has_tail;  // the rows behind the last offset are a group of their own, number `experts`

  EFFK_HD int64_t count() const { return experts + (has_tail ? 1 : 0); }
};

// A part of a group's rows times a part of the outputs.
struct Part {
  int32_t group;
  int32_t begin, end;  // its rows
  uint32_t row_tile;   // of the group
  uint32_t col_tile;
};

// A launch has fewer: more results than that don't fit into any memory.
constexpr int64_t kMostTiles = int64_t{1} << 31;

// Goes through the tiles of all groups: those of a group follow each other, and of them those with the same columns, so
// that blocks at work at the same time share weights. Which tiles there are is known on the device alone. A warp looks
// at 32 groups at once; all warps of a block do the same.
class Schedule {
 public:
  // kRows rows are a tile; 0: all rows of a group are, even if there are none.
  EFFK_DEVICE Schedule(const Groups& groups, uint32_t col_tiles, uint32_t tile_rows)
      : groups_(groups), col_tiles_(col_tiles), tile_rows_(tile_rows) {
    load();
  }

  // Tiles have to be asked for in ascending order. False: there is no such tile.
  EFFK_DEVICE bool find(uint32_t tile, Part& part) {
    const uint32_t row_tile = tile / col_tiles_;
    while (row_tile >= gpu::shuffle(tiles_end_, gpu::kWarp - 1)) {
      if (first_ + gpu::kWarp >= groups_.count()) return false;
      rows_before_ = gpu::shuffle(end_, gpu::kWarp - 1);
      tiles_before_ = gpu::shuffle(tiles_end_, gpu::kWarp - 1);
      first_ += gpu::kWarp;
      load();
    }
    const int lane = static_cast<int>(gpu::popcount(gpu::vote(tiles_end_ <= row_tile)));
    const uint32_t end = gpu::shuffle(end_, lane), tiles_end = gpu::shuffle(tiles_end_, lane);
    const uint32_t begin = lane ? gpu::shuffle(end_, lane - 1) : rows_before_;
    const uint32_t tiles_begin = lane ? gpu::shuffle(tiles_end_, lane - 1) : tiles_before_;
    const uint32_t local = tile - tiles_begin * col_tiles_, tiles = tiles_end - tiles_begin;
    part.group = first_ + lane;
    part.begin = static_cast<int32_t>(begin);
    part.end = static_cast<int32_t>(end);
    part.row_tile = local % tiles;
    part.col_tile = local / tiles;
    return true;
  }

 private:
  EFFK_DEVICE void load() {
    const int lane = threadIdx.x % gpu::kWarp, group = first_ + lane;
    uint32_t end = 0;
    if (group < groups_.experts) {
      const int64_t offset = index_at(groups_.offsets, group);
      end = static_cast<uint32_t>(offset < 0 ? 0 : min_of(offset, groups_.rows));
    } else if (group < groups_.count()) {
      end = static_cast<uint32_t>(groups_.rows);
    }
    if (lane == 0 && end < rows_before_) end = rows_before_;
#pragma unroll
    for (int by = 1; by < gpu::kWarp; by *= 2) {
      const uint32_t before = gpu::shuffle_up(end, by);
      end = before > end ? before : end;
    }
    const uint32_t before = gpu::shuffle_up(end, 1), begin = lane ? before : rows_before_;
    uint32_t tiles = 0;
    if (group < groups_.count()) tiles = tile_rows_ ? (end - begin + tile_rows_ - 1) / tile_rows_ : 1;
    if (lane == 0) tiles += tiles_before_;
#pragma unroll
    for (int by = 1; by < gpu::kWarp; by *= 2) {
      const uint32_t sum = gpu::shuffle_up(tiles, by);
      if (lane >= by) tiles += sum;
    }
    end_ = end;
    tiles_end_ = tiles;
  }

  const Groups& groups_;
  uint32_t col_tiles_, tile_rows_;
  int32_t first_ = 0;                            // group of lane 0
  uint32_t rows_before_ = 0, tiles_before_ = 0;  // it
  uint32_t end_, tiles_end_;                     // of the lane's group
};

// --- Items ---

// What a block does at a time, told to all its threads.
struct Item {
  int32_t group;       // the number of experts: none
  int32_t begin, end;  // rows
  int32_t row, col;    // the first of the result
  int32_t steps;       // at least 1; 0: there are no more items
};

// Takes a block through its items, every gridDim.x-th one. Stages of shared memory are filled several steps ahead,
// those of the next item while the one before is still computed. work has
//   kStages, kStageBytes
//   bool find(uint32_t i, Item&)    whether there is an item i, and which
//   void start(const Item&)         from now on fetch() is about this one
//   void fetch(char* stage)         starts the copies of its next step
//   void clear()                    begins with a sum
//   void multiply(const char* stage)
//   void finish(const Item&)        what becomes of the sum
template <class W>
EFFK_DEVICE void run_items(W& work) {
  constexpr int kStages = W::kStages;
  static_assert(kStages >= 3);  // an item is told of at least one barrier before it begins
  EFFK_SHARED(Item[kStages], items);
  char* const stages = gpu::shared_memory();
  uint32_t next = blockIdx.x;
  int place = 0, left = 0;
  bool more = true;
  const auto fetch = [&](int stage) {
    if (left == 0 && more) {
      Item item{};
      more = work.find(next, item);
      next += gridDim.x;
      if (more) work.start(item);
      left = item.steps;
      if (threadIdx.x == 0) items[place] = item;
      place = place + 1 == kStages ? 0 : place + 1;
    }
    if (left > 0) {
      work.fetch(stages + stage * W::kStageBytes);
      --left;
    }
    gpu::async_commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) fetch(i);
  gpu::sync_block();
  int stage = 0;
#pragma unroll 1
  for (int at = 0;; at = at + 1 == kStages ? 0 : at + 1) {
    int steps = items[at].steps;
    if (steps == 0) break;
    work.clear();
#pragma unroll 1
    for (; steps > 0; --steps) {
      gpu::async_wait<kStages - 2>();
      gpu::sync_block();  // the stage is there, and nobody uses the one before, which comes next
      fetch(stage == 0 ? kStages - 1 : stage - 1);
      work.multiply(stages + stage * W::kStageBytes);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    work.finish(items[at]);
  }
  gpu::async_wait<0>();
}

}  // namespace effk::moe
