// lora_merge_, lora_unmerge_ and lora_switch_ on CUDA: one launch for all layers.
//
// What limits it is memory: each weight is read and written once. Two adapters of rank 64 are 256 operations for 4
// bytes though, 40% of what tensor cores can do in that time, so all of it must happen while bytes are on their way,
// and without many bytes from shared memory or L2. Numbers are those of 16-bit types.
//
// Blocks stay, one on a multiprocessor. Each first makes the list of adapters that take part, from ids and gates on the
// device, and then goes through items: tiles of 64 x 256 weights below each other. Items next to each other are in
// progress at the same time, so that one reads b from memory and the others find it in L2. Layers travel as the
// kernel's parameter: nothing to allocate or to copy, and a CUDA graph keeps them by itself.
//
// A step is 16 ranks of one adapter. In shared memory are
// - slots: the tile of the source that is computed and those on their way. A thread copies the 16-byte pieces that its
//   own results belong to, to its own places, so no barrier is needed;
// - the panel: the item's columns of a, loaded once if the steps fit (256 ranks of all adapters together), as the
//   lanes' operands for tensor cores lie in registers;
// - stages: the tile's rows of b, in chunks of 4 steps, on their way up to 3 chunks ahead.
//
// With g = lane / 4 and t = lane % 4, of a warp's 64 x 32: columns may be named as we like. Column 2t + i of product j
// is 8t + 2j + i here, so that what a lane has of a row in four products are 8 neighbours, 16 bytes.
#pragma once

#include <cstddef>

#include "load.cuh"

namespace effk::lora {

constexpr int kMergeThreads = 256, kMergeWarps = kMergeThreads / gpu::kWarp;
constexpr int kTileRows = 64;
constexpr int kPieces = 8;  // of 16 bytes, a thread's share of a tile
constexpr int kSlotBytes = kPieces * kMergeThreads * 16;
constexpr int kMostSlots = 4;
constexpr int kStepBytes = 32;  // of a row of b
constexpr int kChunkSteps = 4, kChunkRowBytes = kChunkSteps * kStepBytes;
constexpr int kStages = 4, kStageBytes = kTileRows * kChunkRowBytes;

template <class X>
struct Shape {
  static constexpr int kCount = 16 / sizeof(X);  // values of a piece
  static constexpr int kTileCols = kSlotBytes / kTileRows / sizeof(X);
  static constexpr int kStepRanks = kStepBytes / sizeof(X);
  static constexpr int kPanelStepBytes = kStepRanks * kTileCols * sizeof(X);
  static constexpr int kMostSteps = (128 << 10) / kPanelStepBytes;  // of a panel
};

// A layer that isn't empty. Small, so that a launch takes many.
struct MergeLayer {
  void* w;             // [rows, cols]
  const void* source;  // the same: base, or w
  const void* a;       // [adapters, rank, cols]
  const void* b;       // [adapters, rows, rank]
  uint32_t w_stride, source_stride;
  int32_t rows, cols, rank;
  int32_t first_item;
};
static_assert(sizeof(MergeLayer) == 56);
constexpr int64_t kMostStride = int64_t{1} << 32;  // of rows: less than that

template <int kLayers>
struct MergeTable {
  MergeLayer layer[kLayers];
};

// Pairs of an adapter and its gate, which counts `sign` times.
struct MergeList {
  Indices ids;
  const float* gates;
  int count;
  float sign;
};

// All but the layers.
struct MergeArgs {
  MergeList lists[2];
  Indices ranks;
  double scale;
  int adapters, rank;  // the largest rank of all layers, of those in other launches too
  bool in_place;       // sources are w
  int num_layers, num_items;
  int item_rows;           // at most, a multiple of kTileRows
  int panel_steps, slots;  // in shared memory

  EFFK_HD int pairs() const { return lists[0].count + lists[1].count; }
};

constexpr int kMostParameterBytes = 32764;  // of a kernel
constexpr int kFewLayers = 16;
constexpr int kMostLayers = (kMostParameterBytes - static_cast<int>(sizeof(MergeArgs)) - 8) / sizeof(MergeLayer);

// --- The adapters that take part ---

// In shared memory, of all pairs; `order` then has the indices of those that take part, by ascending adapter. Pointers
// are made when needed: registers are scarce.
struct ActiveList {
  char* memory;
  int pairs;

  EFFK_DEVICE int32_t& count() const { return *reinterpret_cast<int32_t*>(memory); }
  EFFK_DEVICE int32_t& adapter(int i) const { return reinterpret_cast<int32_t*>(memory + 16)[i]; }
  EFFK_DEVICE float& factor(int i) const { return reinterpret_cast<float*>(memory + 16)[pairs + i]; }  // 0: no part
  EFFK_DEVICE float& gate(int i) const { return reinterpret_cast<float*>(memory + 16)[2 * pairs + i]; }
  EFFK_DEVICE int32_t& rank(int i) const { return reinterpret_cast<int32_t*>(memory + 16)[2 * pairs + i]; }  // later
  EFFK_DEVICE uint16_t& order(int i) const { return reinterpret_cast<uint16_t*>(memory + 16 + 12 * pairs)[i]; }
};

EFFK_HD constexpr int active_list_bytes(int pairs) { return 16 + pairs * 14; }

// By all threads of the block. An adapter's gates are summed up at its first pair, in order.
EFFK_DEVICE void make_active_list(const MergeArgs& p, const ActiveList& list) {
  const int pairs = p.pairs(), first_count = p.lists[0].count;
  for (int i = threadIdx.x; i < pairs; i += kMergeThreads) {
    const MergeList& from = i < first_count ? p.lists[0] : p.lists[1];
    const int at = i < first_count ? i : i - first_count;
    list.adapter(i) = adapter_at(from.ids, at, p.adapters);
    list.gate(i) = from.sign * from.gates[at];
  }
  gpu::sync_block();
  for (int i = threadIdx.x; i < pairs; i += kMergeThreads) {
    const int adapter = list.adapter(i);
    float factor = 0;
    int j = 0;
    if (adapter >= 0)
      while (list.adapter(j) != adapter) ++j;
    if (adapter >= 0 && j == i) {
      double sum = 0;
      for (; j < pairs; ++j)
        if (list.adapter(j) == adapter) sum += static_cast<double>(list.gate(j));
      if (rank_of(p.ranks, adapter, p.rank) > 0) factor = static_cast<float>(sum * p.scale);
    }
    list.factor(i) = factor;
  }
  gpu::sync_block();
  for (int i = threadIdx.x; i < pairs; i += kMergeThreads) {
    if (list.factor(i) == 0) continue;
    const int adapter = list.adapter(i);
    int place = 0;
    for (int j = 0; j < pairs; ++j) place += list.adapter(j) < adapter && list.factor(j) != 0;
    list.order(place) = static_cast<uint16_t>(i);
    list.rank(i) = rank_of(p.ranks, adapter, p.rank);
  }
  if (threadIdx.x == 0) {
    int count = 0;
    for (int j = 0; j < pairs; ++j) count += list.factor(j) != 0;
    list.count() = count;
  }
  gpu::sync_block();
}

// --- Steps ---

// Of one adapter: kStepRanks ranks, or what is left.
struct MergeStep {
  const void *a, *b;  // from the first rank on
  int32_t ranks;
  float factor;  // of the adapter, at its last step; 0 before
};

EFFK_DEVICE int used_rank(const MergeLayer& layer, const ActiveList& list, int i) {
  return list.rank(i) < layer.rank ? list.rank(i) : layer.rank;
}

template <class X>
EFFK_DEVICE int steps_of(int rank) {
  return (rank + Shape<X>::kStepRanks - 1) / Shape<X>::kStepRanks;
}

template <class X>
EFFK_DEVICE int count_steps(const MergeLayer& layer, const ActiveList& list) {
  int steps = 0;
  for (int k = 0; k < list.count(); ++k) steps += steps_of<X>(used_rank(layer, list, list.order(k)));
  return steps;
}

// The layer's step of this number, which it has.
template <class X>
EFFK_DEVICE MergeStep make_step(const MergeLayer& layer, const ActiveList& list, int number) {
  int k = 0, i = list.order(0), rank = used_rank(layer, list, i);
  while (number >= steps_of<X>(rank)) {
    number -= steps_of<X>(rank);
    i = list.order(++k);
    rank = used_rank(layer, list, i);
  }
  const int first = number * Shape<X>::kStepRanks, left = rank - first;
  const int64_t adapter = list.adapter(i);
  return {static_cast<const X*>(layer.a) + (adapter * layer.rank + first) * layer.cols,
          static_cast<const X*>(layer.b) + adapter * layer.rows * layer.rank + first,
          left < Shape<X>::kStepRanks ? left : Shape<X>::kStepRanks, left <= Shape<X>::kStepRanks ? list.factor(i) : 0};
}

// --- Items ---

struct MergeItem {
  int layer, col;
  int row, row_end;  // row: of the next tile
};

template <class X, int kLayers>
EFFK_DEVICE MergeItem find_item(const MergeTable<kLayers>& table, const MergeArgs& p, int item) {
  int low = 0, high = p.num_layers;  // layer `low` begins at the item or before it, layer `high` behind it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.layer[middle].first_item <= item ? low : high) = middle;
  }
  const MergeLayer& layer = table.layer[low];
  const int local = item - layer.first_item, across = (layer.cols - 1) / Shape<X>::kTileCols + 1;
  const int row = local / across * p.item_rows;
  return {low, local % across * Shape<X>::kTileCols, row,
          layer.rows - row < p.item_rows ? layer.rows : row + p.item_rows};
}

template <class X>
EFFK_DEVICE Values<X, Shape<X>::kCount> values_of(const uint4& piece) {
  return {{piece.x, piece.y, piece.z, piece.w}};
}

// A thread's pieces of a tile.
template <class X>
struct Pieces {
  static constexpr int kRowStep = sizeof(X) == 2 ? 8 : 1;  // from a piece to the next
  int row, col;                                            // of the first piece

  EFFK_DEVICE Pieces(int tile_row, int tile_col) {
    const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
    row = tile_row + (sizeof(X) == 2 ? lane / 4 : warp * kPieces);
    col = tile_col + (sizeof(X) == 2 ? warp * 4 + lane % 4 : lane) * Shape<X>::kCount;
  }
  EFFK_DEVICE bool has(const MergeLayer& layer, int i) const {
    return row + i * kRowStep < layer.rows && col < layer.cols;
  }
  // Whether all pieces are there and aligned.
  EFFK_DEVICE bool are_whole(const MergeLayer& layer, const void* of, uint32_t stride) const {
    return is_aligned(of, stride, sizeof(X), 16) && row + (kPieces - 1) * kRowStep < layer.rows &&
           col + Shape<X>::kCount <= layer.cols;
  }
  // Of the first piece, and from a piece to the next.
  EFFK_DEVICE int64_t offset(uint32_t stride) const { return int64_t{row} * stride + col; }
  EFFK_DEVICE static int64_t step(uint32_t stride) { return int64_t{kRowStep} * stride; }

  EFFK_DEVICE static uint4* slot(char* slots, int i) {
    return reinterpret_cast<uint4*>(slots) + i * kMergeThreads + threadIdx.x;
  }
};

// Starts the copies of the thread's pieces of a tile.
template <class X>
EFFK_DEVICE void fetch_source(const MergeLayer& layer, const Pieces<X>& pieces, char* slot) {
  const X* from = static_cast<const X*>(layer.source) + pieces.offset(layer.source_stride);
  const int64_t step = pieces.step(layer.source_stride);
  if (pieces.are_whole(layer, layer.source, layer.source_stride)) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) gpu::async_copy(pieces.slot(slot, i), from + i * step);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kPieces; ++i, from += step) {
    if (!pieces.has(layer, i)) continue;
    const auto v = load_each<X, Shape<X>::kCount>(from, layer.cols - pieces.col);
    *pieces.slot(slot, i) = {v.word[0], v.word[1], v.word[2], v.word[3]};
  }
}

// Stores the thread's pieces of a tile: piece i is make(what its slot has, i).
template <class X, class Make>
EFFK_DEVICE void store_tile(const MergeLayer& layer, const Pieces<X>& pieces, char* slot, const Make& make) {
  X* to = static_cast<X*>(layer.w) + pieces.offset(layer.w_stride);
  const int64_t step = pieces.step(layer.w_stride);
  if (pieces.are_whole(layer, layer.w, layer.w_stride)) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) gpu::store_once(to + i * step, make(*pieces.slot(slot, i), i));
    return;
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i)
    if (pieces.has(layer, i)) *pieces.slot(slot, i) = make(*pieces.slot(slot, i), i);
#pragma unroll 1
  for (int i = 0; i < kPieces; ++i, to += step) {
    if (!pieces.has(layer, i)) continue;
    const auto v = values_of<X>(*pieces.slot(slot, i));
#pragma unroll
    for (int k = 0; k < Shape<X>::kCount; ++k)
      if (pieces.col + k < layer.cols) to[k] = value(v, k);
  }
}

// --- The panel and the stages ---

// Copies 16 bytes to shared memory, and need not wait for them. Values from the `valid`-th on aren't read and become 0.
template <class X>
EFFK_DEVICE void fetch_values(char* to, const X* from, int valid) {
  constexpr int kCount = Shape<X>::kCount, kPerWord = 4 / sizeof(X);
  if (reinterpret_cast<uintptr_t>(from) % 4 == 0) {
    auto* const words = reinterpret_cast<uint32_t*>(to);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int left = valid - i * kPerWord;
      if (left >= kPerWord)
        gpu::async_copy<4>(words + i, from + i * kPerWord);
      else
        words[i] = left > 0 ? bits_of_value(from[i * kPerWord]) : 0;
    }
  } else {
    const auto v = load_each<X, kCount>(from, valid);
    *reinterpret_cast<uint4*>(to) = {v.word[0], v.word[1], v.word[2], v.word[3]};
  }
}

// Where the 16 bytes of a stage's row lie: rows below each other in other banks.
EFFK_DEVICE int stage_at(int row, int piece) { return row * kChunkRowBytes + (piece ^ (row & 7)) * 16; }

// Starts the copy of a tile's rows of b, of a chunk of steps.
template <class X>
EFFK_DEVICE void fetch_chunk(const MergeLayer& layer, int tile_row, const MergeStep* steps, int num_steps,
                             char* stage) {
  constexpr int kPiecesOfRow = kChunkRowBytes / 16, kRowStep = kMergeThreads / kPiecesOfRow;
  const int piece = threadIdx.x % kPiecesOfRow;
  if (piece / 2 >= num_steps) return;
  const MergeStep& step = steps[piece / 2];
  const int first = piece % 2 * Shape<X>::kCount, valid = step.ranks - first;
  const int row = threadIdx.x / kPiecesOfRow;
  const X* from = static_cast<const X*>(step.b) + first + int64_t{tile_row + row} * layer.rank;
  char* to = stage + stage_at(row, piece);  // and so on: kRowStep is a multiple of 8
  static_assert(kRowStep % 8 == 0);
  if (valid >= Shape<X>::kCount && tile_row + kTileRows <= layer.rows && is_aligned(from, layer.rank, sizeof(X), 16)) {
#pragma unroll
    for (int i = 0; i < kTileRows / kRowStep; ++i)
      gpu::async_copy(to + i * kRowStep * kChunkRowBytes, from + int64_t{i * kRowStep} * layer.rank);
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kTileRows / kRowStep; ++i) {
    fetch_values(to, from, tile_row + row + i * kRowStep < layer.rows ? valid : 0);
    from += int64_t{kRowStep} * layer.rank;
    to += kRowStep * kChunkRowBytes;
  }
}

// Of a step of 16-bit values the panel has for each warp, which has 32 columns, the lanes' words of b (device.cuh) of
// two products, 16 bytes a lane, and then of two more.
template <bool kWide, class X>
EFFK_DEVICE void load_panel(const MergeLayer& layer, int tile_col, const MergeStep* steps, int num_steps, char* panel) {
  constexpr int kAtOnce = kWide ? 4 : 1;  // steps on their way
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  auto* to = reinterpret_cast<uint4*>(panel);
  if constexpr (sizeof(X) == 2) {
    // 4 ranks, 4 columns: a half of what two lanes have.
    const int t = lane % 4, octet = lane / 4 % 4, half = lane / 16;
    const int col = tile_col + warp * 32 + octet * 8 + half * 4, cols = layer.cols - col;
    to += (warp * 2 + half) * gpu::kWarp + t;
#pragma unroll 1
    for (int first = 0; first < num_steps; first += kAtOnce, to += kAtOnce * Shape<X>::kPanelStepBytes / 16) {
      Values<X, 4> v[kAtOnce][4];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        if (first + s >= num_steps) continue;
        const MergeStep& step = steps[first + s];
        const X* const from = static_cast<const X*>(step.a) + int64_t{2 * t} * layer.cols + col;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int rank = i / 2 * 8 + i % 2;
          v[s][i] = load_values<kWide, X, 4>(from + int64_t{rank} * layer.cols, 2 * t + rank < step.ranks ? cols : 0);
        }
      }
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        if (first + s >= num_steps) continue;
        const auto& [v0, v1, v2, v3] = v[s];
#pragma unroll
        for (int order = 0; order < 2; ++order) {  // neighbours in the other one: no two lanes at one bank
          const int i = order ^ (octet & 1);
          const uint32_t of_col = i ? 0x7632 : 0x5410;
          to[s * Shape<X>::kPanelStepBytes / 16 + (2 * octet + i) * 4] = {
              gpu::permute_bytes(v0.word[0], v1.word[0], of_col), gpu::permute_bytes(v2.word[0], v3.word[0], of_col),
              gpu::permute_bytes(v0.word[1], v1.word[1], of_col), gpu::permute_bytes(v2.word[1], v3.word[1], of_col)};
        }
      }
    }
  } else {  // as a is
    static_assert(Shape<X>::kStepRanks == kMergeWarps);
    const int col = tile_col + lane * 4, cols = layer.cols - col;
    to += threadIdx.x;
#pragma unroll 1
    for (int first = 0; first < num_steps; first += kAtOnce, to += kAtOnce * kMergeThreads) {
      Values<X, 4> v[kAtOnce];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        if (first + s >= num_steps) continue;
        const MergeStep& step = steps[first + s];
        const X* const from = static_cast<const X*>(step.a) + int64_t{warp} * layer.cols + col;
        v[s] = load_values<kWide, X, 4>(from, warp < step.ranks ? cols : 0);
      }
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s)
        if (first + s < num_steps) to[s * kMergeThreads] = {v[s].word[0], v[s].word[1], v[s].word[2], v[s].word[3]};
    }
  }
}

// --- Sums ---

template <class X>
struct Sums {
  static constexpr int kValues = kPieces * Shape<X>::kCount;
  // product: b a of an adapter so far. 16 bits: of rows 16i and columns j of a lane's four, as mma has them.
  float product[kValues / 4][4] = {};
  float total[kValues / 4][4] = {};

  // The adapter is done.
  EFFK_DEVICE void add(float factor) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      total[i / 4][i % 4] = fmaf(factor, product[i / 4][i % 4], total[i / 4][i % 4]);
      product[i / 4][i % 4] = 0;
    }
  }

  // A piece of the source plus the total, rounded.
  EFFK_DEVICE uint4 result(const uint4& source, int piece) const {
    float sum[Shape<X>::kCount];
    to_floats(values_of<X>(source), sum);
#pragma unroll
    for (int i = 0; i < Shape<X>::kCount; ++i)
      sum[i] += sizeof(X) == 2 ? total[piece / 2 * 4 + i / 2][piece % 2 * 2 + i % 2] : total[piece][i];
    if constexpr (sizeof(X) == 4)
      return {bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])};
    else
      return {gpu::pack_pair<X>(sum[0], sum[1]), gpu::pack_pair<X>(sum[2], sum[3]), gpu::pack_pair<X>(sum[4], sum[5]),
              gpu::pack_pair<X>(sum[6], sum[7])};
  }
};

// What a lane needs for a step.
struct StepOperands {
  uint32_t of_b[kTileRows / 16][4];
  uint4 of_a[2];

  EFFK_DEVICE void load(const char* stage, const char* panel, int step) {
    const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i)
      gpu::load_matrices(of_b[i], stage + i * 16 * kChunkRowBytes + stage_at(lane % 16, step * 2 + lane / 16));
    const auto* const from =
        reinterpret_cast<const uint4*>(panel) + (step * kMergeWarps + warp) * 2 * gpu::kWarp + lane;
    of_a[0] = from[0], of_a[1] = from[gpu::kWarp];
  }
};

// product += b a of a chunk's steps; panel: from the first of them on.
template <class X>
EFFK_DEVICE void add_chunk(const char* stage, const char* panel, const MergeStep* steps, int num_steps, Sums<X>& sums) {
  static_assert(sizeof(X) == 2);
  StepOperands now, next;
  now.load(stage, panel, 0);
#pragma unroll 2
  for (int s = 0; s < num_steps; ++s, now = next) {
    if (s + 1 < num_steps) next.load(stage, panel, s + 1);
#pragma unroll
    for (int i = 0; i < kTileRows / 16; ++i) {
      const auto& [b0, b1, b2, b3] = now.of_b[i];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4& a = now.of_a[j];
        gpu::mma<X>(sums.product[i * 4 + 2 * j], b0, b1, b2, b3, a.x, a.y);
        gpu::mma<X>(sums.product[i * 4 + 2 * j + 1], b0, b1, b2, b3, a.z, a.w);
      }
    }
    if (const float factor = steps[s].factor) sums.add(factor);
  }
}

// The same of float32, without tensor cores, which would round to TF32.
EFFK_DEVICE void add_chunk(const char* stage, const char* panel, const MergeStep* steps, int num_steps,
                           Sums<float>& sums) {
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const auto* from_a = reinterpret_cast<const uint4*>(panel) + lane;
#pragma unroll 1
  for (int s = 0; s < num_steps; ++s) {
#pragma unroll
    for (int half = 0; half < 2; ++half, from_a += 4 * gpu::kWarp) {
      float a[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) to_floats(values_of<float>(from_a[k * gpu::kWarp]), a[k]);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        float b[4];
        to_floats(values_of<float>(*reinterpret_cast<const uint4*>(stage + stage_at(warp * kPieces + i, s * 2 + half))),
                  b);
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
          for (int j = 0; j < 4; ++j) sums.product[i][j] = fmaf(b[k], a[k][j], sums.product[i][j]);
      }
    }
    if (const float factor = steps[s].factor) sums.add(factor);
  }
}

// --- The kernel ---

// Waits until all but the thread's latest `groups` groups of copies are complete.
EFFK_DEVICE void wait_for_all_but(int groups) {
  static_assert(kMostSlots == 4);
  switch (groups) {
    case 0: return gpu::async_wait<0>();
    case 1: return gpu::async_wait<1>();
    case 2: return gpu::async_wait<2>();
    default: return gpu::async_wait<3>();
  }
}

template <class X, int kLayers>
EFFK_KERNEL(kMergeThreads, 1)
merge_kernel(EFFK_GRID_CONSTANT(MergeArgs) p, EFFK_GRID_CONSTANT(MergeTable<kLayers>) table) {
  using S = Shape<X>;
  char* const slots = gpu::shared_memory();
  char* const panel = slots + p.slots * kSlotBytes;
  char* const stages = panel + p.panel_steps * S::kPanelStepBytes;
  auto* const steps = reinterpret_cast<MergeStep*>(stages + (p.panel_steps > 0 ? kStages * kStageBytes : 0));
  const ActiveList list{reinterpret_cast<char*>(steps + p.panel_steps), p.pairs()};

  // Sources are fetched slots - 1 tiles ahead.
  int item_ahead = blockIdx.x, slot_ahead = 0;
  MergeItem ahead{};
  if (item_ahead < p.num_items) ahead = find_item<X>(table, p, item_ahead);
  const auto fetch_ahead = [&] {
    if (item_ahead >= p.num_items) return;
    fetch_source<X>(table.layer[ahead.layer], {ahead.row, ahead.col}, slots + slot_ahead * kSlotBytes);
    slot_ahead = slot_ahead + 1 < p.slots ? slot_ahead + 1 : 0;
    ahead.row += kTileRows;
    if (ahead.row < ahead.row_end) return;
    item_ahead += gridDim.x;
    if (item_ahead < p.num_items) ahead = find_item<X>(table, p, item_ahead);
  };
  for (int i = 1; i < p.slots; ++i) {
    fetch_ahead();
    gpu::async_commit();
  }

  make_active_list(p, list);
  if (list.count() == 0 && p.in_place) {
    gpu::async_wait<0>();
    return;
  }

  int slot = 0;
  for (int item = blockIdx.x; item < p.num_items; item += gridDim.x) {
    const MergeItem at = find_item<X>(table, p, item);
    const MergeLayer& layer = table.layer[at.layer];
    const int num_steps = count_steps<X>(layer, list);
    const int panels = num_steps > 0 ? (num_steps - 1) / p.panel_steps + 1 : 0;
    const bool stays = panels == 1;

    // Chunks of b are fetched kStages - 1 chunks ahead, as long as the panel lasts.
    int row_ahead = 0, row_end = 0, chunk_ahead = 0, panel_steps = 0, chunks = 0;
    uint32_t stage_ahead = 0, stage = 0;
    const auto chunk_steps = [&](int chunk) {
      const int left = panel_steps - chunk * kChunkSteps;
      return left < kChunkSteps ? left : kChunkSteps;
    };
    const auto fetch_b_ahead = [&] {
      if (row_ahead >= row_end) return;
      fetch_chunk<X>(layer, row_ahead, steps + chunk_ahead * kChunkSteps, chunk_steps(chunk_ahead),
                     stages + stage_ahead++ % kStages * kStageBytes);
      if (++chunk_ahead < chunks) return;
      chunk_ahead = 0;
      row_ahead += kTileRows;
    };

    for (int row = at.row; row < at.row_end; row += kTileRows) {
      char* const my_slot = slots + slot * kSlotBytes;
      slot = slot + 1 < p.slots ? slot + 1 : 0;
      fetch_ahead();
      if (panels == 0) {  // to the bit
        gpu::async_commit();
        wait_for_all_but(p.slots - 1);
        store_tile<X>(layer, {row, at.col}, my_slot, [](const uint4& piece, int) { return piece; });
        continue;
      }
      Sums<X> sums;
      for (int number = 0; number < panels; ++number) {
        if (!stays || row == at.row) {
          const int first = number * p.panel_steps;
          panel_steps = num_steps - first < p.panel_steps ? num_steps - first : p.panel_steps;
          chunks = (panel_steps - 1) / kChunkSteps + 1;
          gpu::sync_block();  // the panel before isn't needed any more
          if (static_cast<int>(threadIdx.x) < panel_steps)
            steps[threadIdx.x] = make_step<X>(layer, list, first + static_cast<int>(threadIdx.x));
          gpu::sync_block();
          row_ahead = row, row_end = stays ? at.row_end : row + kTileRows, chunk_ahead = 0;
          stage_ahead = stage = 0;
          for (int i = 1; i < kStages; ++i) {
            fetch_b_ahead();
            gpu::async_commit();
          }
          if (is_aligned(layer.a, layer.cols, sizeof(X), 16))
            load_panel<true, X>(layer, at.col, steps, panel_steps, panel);
          else
            load_panel<false, X>(layer, at.col, steps, panel_steps, panel);
        }
        for (int chunk = 0; chunk < chunks; ++chunk) {
          gpu::async_wait<kStages - 2>();
          gpu::sync_block();
          fetch_b_ahead();
          gpu::async_commit();
          add_chunk(stages + stage++ % kStages * kStageBytes, panel + chunk * kChunkSteps * S::kPanelStepBytes,
                    steps + chunk * kChunkSteps, chunk_steps(chunk), sums);
        }
      }
      // Waiting for b has been waiting for this tile already where that many chunks lie between.
      if (p.slots * chunks < kStages || !stays) wait_for_all_but(p.slots - 1);
      store_tile<X>(layer, {row, at.col}, my_slot, [&](const uint4& piece, int i) { return sums.result(piece, i); });
    }
  }
}

// --- Host side ---

// Sets how a block's shared memory, at most most_shared bytes, is shared out; gives its size.
template <class X>
int share_memory(MergeArgs& p, int most_shared) {
  using S = Shape<X>;
  constexpr int kFewSteps = 4, kFewSlots = 2;
  constexpr int kOfStep = S::kPanelStepBytes + static_cast<int>(sizeof(MergeStep));
  // As many steps as there may be.
  const int64_t most_steps = p.pairs() * ceil_div(p.rank, S::kStepRanks);
  p.panel_steps = static_cast<int>(min_of(most_steps, S::kMostSteps));
  const auto others = [&] {
    return p.panel_steps * kOfStep + (p.panel_steps > 0 ? kStages * kStageBytes : 0) + active_list_bytes(p.pairs());
  };
  const auto slots = [&] { return (most_shared - others()) / kSlotBytes; };
  while (p.panel_steps > kFewSteps && slots() < kFewSlots) --p.panel_steps;
  while (p.panel_steps > 1 && slots() < 1) --p.panel_steps;
  p.slots = static_cast<int>(min_of(slots(), kMostSlots));
  return p.slots * kSlotBytes + others();
}

// Where a launch's layers begin in the order of items; how many tiles an item has at most such that blocks are busy
// equally long, if the panel takes as long as a tile.
template <class X, int kLayers>
void share_items(MergeArgs& p, MergeTable<kLayers>& table, int num_sms) {
  constexpr int kMostTiles = 16;
  int64_t least = INT64_MAX;
  const auto items_of = [](const MergeLayer& layer, int rows) {
    return ceil_div(layer.rows, rows) * ceil_div(layer.cols, Shape<X>::kTileCols);
  };
  for (int tiles = kMostTiles; tiles > 0; tiles /= 2) {
    int64_t items = 0;
    for (int i = 0; i < p.num_layers; ++i) items += items_of(table.layer[i], tiles * kTileRows);
    const int64_t cost = ceil_div(items, num_sms) * (tiles + 1);
    if (cost < least) least = cost, p.item_rows = tiles * kTileRows;
  }
  p.num_items = 0;
  for (int i = 0; i < p.num_layers; ++i) {
    table.layer[i].first_item = p.num_items;
    p.num_items += static_cast<int>(items_of(table.layer[i], p.item_rows));
  }
}

template <class X>
gpu::Error launch_merge_of(MergeArgs p, MergeTable<kMostLayers>& table, int num_sms, int most_shared,
                           gpu::Stream stream) {
  const int shared_bytes = share_memory<X>(p, most_shared);
  share_items<X>(p, table, num_sms);
  const dim3 grid(static_cast<unsigned>(min_of(p.num_items, num_sms)));
  if (p.num_layers > kFewLayers)
    return gpu::launch(merge_kernel<X, kMostLayers>, grid, kMergeThreads, shared_bytes, stream, p, table);
  MergeTable<kFewLayers> few{};  // a small parameter is launched sooner
  for (int i = 0; i < p.num_layers; ++i) few.layer[i] = table.layer[i];
  return gpu::launch(merge_kernel<X, kFewLayers>, grid, kMergeThreads, shared_bytes, stream, p, few);
}

// Of p, all but the layers' and items' numbers and the shares is given. Strides of layers with more than one row are
// less than kMostStride. Either all layers have a base or none. A block may have most_shared bytes of shared memory.
inline gpu::Error launch_merge(MergeArgs p, Type type, const Layer* layers, int64_t num_layers, int num_sms,
                               int most_shared, gpu::Stream stream) {
  constexpr int64_t kMostTiles = 1 << 30;  // of a launch
  if (p.in_place && p.pairs() == 0) return nullptr;
  MergeTable<kMostLayers> table;
  int64_t tiles = 0;
  p.num_layers = 0;
  const auto launch = [&]() -> gpu::Error {
    if (p.num_layers == 0) return nullptr;
    switch (type) {
      case Type::f32: return launch_merge_of<float>(p, table, num_sms, most_shared, stream);
      case Type::f16: return launch_merge_of<Half>(p, table, num_sms, most_shared, stream);
      default: return launch_merge_of<BFloat16>(p, table, num_sms, most_shared, stream);
    }
  };
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& from = layers[i];
    if (from.rows == 0 || from.cols == 0) continue;
    // Far less than kMostTiles, or the layer would have more bytes than there are addresses.
    const int64_t more = ceil_div(from.rows, kTileRows) * ceil_div(from.cols, Shape<float>::kTileCols);
    if (p.num_layers == kMostLayers || tiles + more > kMostTiles) {
      if (const gpu::Error error = launch()) return error;
      p.num_layers = 0;
      tiles = 0;
    }
    const auto stride = [&](int64_t v) { return from.rows > 1 ? static_cast<uint32_t>(v) : 0; };
    table.layer[p.num_layers++] = {from.w,
                                   from.base ? from.base : from.w,
                                   from.a,
                                   from.b,
                                   stride(from.w_stride),
                                   stride(from.base ? from.base_stride : from.w_stride),
                                   static_cast<int32_t>(from.rows),
                                   static_cast<int32_t>(from.cols),
                                   static_cast<int32_t>(from.rank),
                                   0};
    tiles += more;
  }
  return launch();
}

}  // namespace effk::lora
