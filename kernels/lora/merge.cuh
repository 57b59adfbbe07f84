// lora_merge_, lora_unmerge_ and lora_switch_ on CUDA: one launch for all layers.
//
// What limits it is memory, as long as ranks are small: each weight is read and written once. Blocks stay: each of them
// first makes the list of adapters that take part, from ids and gates on the device, and then goes through tiles of
// 64 x 128 weights, its share of all layers' tiles, down the rows first, so that its columns of a stay in L1. Layers
// travel as the kernel's parameter: nothing to allocate or to copy, and a CUDA graph keeps them by itself.
//
// A thread has the same 16-byte pieces of each tile. It copies its own pieces of the next tiles to its own places in
// shared memory, so that no barrier is needed and nobody waits for DRAM: bytes are always on their way. a and b come
// straight from L1 and L2 in the layout of the tensor cores. With g = lane / 4 and t = lane % 4, of a warp's 32 x 32:
// - Columns may be named as we like. Column 2t + i of product j is 8t + 2j + i here, so that what a lane has of a row
//   in four products are 8 neighbours, 16 bytes.
// - So may ranks, which are summed over: a lane's are 4t to 4t + 3 of 16, in a and in b.
//
// Nothing of this has been measured on a GPU.
#pragma once

#include "load.cuh"

namespace effk::lora {

constexpr int kMergeThreads = 256;
template <bool kWide>
constexpr int kMergeBlocks = kWide ? 2 : 1;          // of a multiprocessor, as registers allow
constexpr int kTileRows = 64, kTileCols = 128;       // of a block
constexpr int kWarpRows = 32, kWarpCols = 32;        // of a warp
constexpr int kWarpsAcross = kTileCols / kWarpCols;  // of a block
static_assert(kTileRows / kWarpRows * kWarpsAcross * gpu::kWarp == kMergeThreads);

// A layer that isn't empty. Small, so that a launch takes many.
struct MergeLayer {
  void* w;             // [rows, cols]
  const void* source;  // the same: base, or w
  const void* a;       // [adapters, rank, cols]
  const void* b;       // [adapters, rows, rank]
  uint32_t w_stride, source_stride;
  int32_t rows, cols, rank;
  int32_t first_tile;
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
  int num_layers, num_tiles;

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

// --- Tiles ---

struct MergeTile {
  int layer;
  int row, col;  // the first
};

template <int kLayers>
EFFK_DEVICE MergeTile find_tile(const MergeTable<kLayers>& table, int num_layers, int tile) {
  int low = 0, high = num_layers;  // layer `low` begins at the tile or before it, layer `high` behind it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.layer[middle].first_tile <= tile ? low : high) = middle;
  }
  const int local = tile - table.layer[low].first_tile, tiles_down = (table.layer[low].rows - 1) / kTileRows + 1;
  return {low, local % tiles_down * kTileRows, local / tiles_down * kTileCols};
}

template <int kLayers>
EFFK_DEVICE void step(const MergeTable<kLayers>& table, MergeTile& tile) {
  tile.row += kTileRows;
  if (tile.row < table.layer[tile.layer].rows) return;
  tile.row = 0;
  tile.col += kTileCols;
  if (tile.col < table.layer[tile.layer].cols) return;
  tile.col = 0;
  ++tile.layer;
}

// A thread's pieces of a tile, kCount values of 16 bytes each, and their sums.
template <class X>
struct Pieces {
  static constexpr int kCount = 16 / sizeof(X);
  static constexpr int kLanesAcross = kWarpCols / kCount;
  static constexpr int kRowStep = gpu::kWarp / kLanesAcross;  // from a piece to the next
  static constexpr int kPieces = kWarpRows / kRowStep;
  static constexpr int kSlotBytes = kPieces * kMergeThreads * 16;
  // Tiles in shared memory: the one that is computed and those on their way.
  static constexpr int kSlots = sizeof(X) == 2 ? 3 : 2;

  int row, col;  // of the first piece

  EFFK_DEVICE explicit Pieces(const MergeTile& tile) {
    const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
    row = tile.row + warp / kWarpsAcross * kWarpRows + lane / kLanesAcross;
    col = tile.col + warp % kWarpsAcross * kWarpCols + lane % kLanesAcross * kCount;
  }
  EFFK_DEVICE int row_of(int i) const { return row + i * kRowStep; }
  EFFK_DEVICE bool has(const MergeLayer& layer, int i) const { return row_of(i) < layer.rows && col < layer.cols; }
  EFFK_DEVICE static uint4* slot(char* slots, int i) {
    return reinterpret_cast<uint4*>(slots) + i * kMergeThreads + threadIdx.x;
  }
};

// Starts the copies of the thread's pieces of a tile.
template <class X>
EFFK_DEVICE void fetch(const MergeLayer& layer, const MergeTile& tile, char* slots) {
  using P = Pieces<X>;
  const P pieces(tile);
  const bool wide =
      is_aligned(layer.source, layer.source_stride, sizeof(X), 16) && pieces.col + P::kCount <= layer.cols;
  const X* const from = static_cast<const X*>(layer.source) + pieces.col;
#pragma unroll
  for (int i = 0; i < P::kPieces; ++i) {
    if (!pieces.has(layer, i)) continue;
    const X* const piece = from + int64_t{pieces.row_of(i)} * layer.source_stride;
    if (wide) {
      gpu::async_copy(P::slot(slots, i), piece);
    } else {
      const auto v = load_each<X, P::kCount>(piece, layer.cols - pieces.col);
      *P::slot(slots, i) = {v.word[0], v.word[1], v.word[2], v.word[3]};
    }
  }
}

template <class X>
EFFK_DEVICE void store(const MergeLayer& layer, const Pieces<X>& pieces, int i, const uint4& piece) {
  using P = Pieces<X>;
  X* const to = static_cast<X*>(layer.w) + int64_t{pieces.row_of(i)} * layer.w_stride + pieces.col;
  if (is_aligned(layer.w, layer.w_stride, sizeof(X), 16) && pieces.col + P::kCount <= layer.cols) {
    *reinterpret_cast<uint4*>(to) = piece;
    return;
  }
  const Values<X, P::kCount> v{{piece.x, piece.y, piece.z, piece.w}};
#pragma unroll
  for (int j = 0; j < P::kCount; ++j)
    if (pieces.col + j < layer.cols) to[j] = value(v, j);
}

template <class X>
using Sums = float[Pieces<X>::kPieces][Pieces<X>::kCount];

// sums += factor * b a on tensor cores. a and b begin at the adapter's. A lane's 8 columns in two halves: all at once
// would take more registers than there are.
template <bool kWide, class X>
EFFK_DEVICE void add_update(const MergeLayer& layer, const Pieces<X>& pieces, const X* a, const X* b, int rank,
                            float factor, Sums<X>& sums) {
  static_assert(sizeof(X) == 2);
  constexpr int kStep = 16, kLaneRanks = 4, kHalf = 4;
  const int lane = threadIdx.x % gpu::kWarp, g = lane / 4, t = lane % 4;
  // Products' columns with this lane's g: word j of these 16 bytes has that of product j, in one half.
  const int col = pieces.col - t * 8 + g / 2 * 8;
  const uint32_t half = g % 2 ? 0x7632 : 0x5410;
#pragma unroll
  for (int first = 0; first < 2 * kHalf; first += kHalf) {
    const int cols = layer.cols - col - first;
    const X* from_a = a + col + first + int64_t{t * kLaneRanks} * layer.cols;
    const X* from_b = b + int64_t{pieces.row} * layer.rank + t * kLaneRanks;
    float products[2][2][4] = {};
#pragma unroll 1
    for (int left = rank - t * kLaneRanks; left > -t * kLaneRanks; left -= kStep) {
      Values<X, kLaneRanks> of_b[4];
      Values<X, kHalf> of_a[kLaneRanks];
      const X* row = from_b;
#pragma unroll
      for (int i = 0; i < 4; ++i, row += int64_t{Pieces<X>::kRowStep} * layer.rank)
        of_b[i] = load_values<kWide, X, kLaneRanks>(row, pieces.row_of(i) < layer.rows ? left : 0);
      row = from_a;
#pragma unroll
      for (int i = 0; i < kLaneRanks; ++i, row += layer.cols)
        of_a[i] = load_values<kWide, X, kHalf>(row, i < left ? cols : 0);
      if (kWide && left < kLaneRanks)  // behind an adapter's rank there may be anything
#pragma unroll
        for (int i = 0; i < 4; ++i) cut(of_b[i], left);
      from_a += int64_t{kStep} * layer.cols;
      from_b += kStep;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t a0 = gpu::permute_bytes(of_a[0].word[j], of_a[1].word[j], half);
        const uint32_t a1 = gpu::permute_bytes(of_a[2].word[j], of_a[3].word[j], half);
#pragma unroll
        for (int i = 0; i < 2; ++i)
          gpu::mma<X>(products[i][j], of_b[2 * i].word[0], of_b[2 * i + 1].word[0], of_b[2 * i].word[1],
                      of_b[2 * i + 1].word[1], a0, a1);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        float& sum = sums[i][first + j];
        sum = fmaf(factor, products[i / 2][j / 2][i % 2 * 2 + j % 2], sum);
      }
  }
}

// The same of float32, without tensor cores, which would round to TF32.
template <bool kWide>
EFFK_DEVICE void add_update(const MergeLayer& layer, const Pieces<float>& pieces, const float* a, const float* b,
                            int rank, float factor, Sums<float>& sums) {
  using P = Pieces<float>;
  constexpr int kStep = 4;
  constexpr int kRows = P::kPieces / 2;  // at once
  const int cols = layer.cols - pieces.col;
#pragma unroll
  for (int first = 0; first < P::kPieces; first += kRows) {
    const float* from_a = a + pieces.col;
    const float* from_b = b + int64_t{pieces.row_of(first)} * layer.rank;
    float products[kRows][P::kCount] = {};
#pragma unroll 1
    for (int left = rank; left > 0; left -= kStep, from_b += kStep) {
      Values<float, P::kCount> of_a[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i, from_a += layer.cols)
        of_a[i] = load_values<kWide, float, P::kCount>(from_a, i < left ? cols : 0);
      const float* row = from_b;
#pragma unroll
      for (int i = 0; i < kRows; ++i, row += int64_t{P::kRowStep} * layer.rank) {
        auto of_b = load_values<kWide, float, kStep>(row, pieces.row_of(first + i) < layer.rows ? left : 0);
        if (kWide && left < kStep) cut(of_b, left);
#pragma unroll
        for (int k = 0; k < kStep; ++k)
#pragma unroll
          for (int j = 0; j < P::kCount; ++j) products[i][j] = fmaf(value(of_b, k), value(of_a[k], j), products[i][j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < P::kCount; ++j) sums[first + i][j] = fmaf(factor, products[i][j], sums[first + i][j]);
  }
}

template <class X>
EFFK_DEVICE uint4 round_piece(const float (&v)[Pieces<X>::kCount]) {
  if constexpr (sizeof(X) == 4)
    return {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])};
  else
    return {gpu::pack_pair<X>(v[0], v[1]), gpu::pack_pair<X>(v[2], v[3]), gpu::pack_pair<X>(v[4], v[5]),
            gpu::pack_pair<X>(v[6], v[7])};
}

// A tile whose source lies in the thread's slots.
template <bool kWide, class X>
EFFK_DEVICE void merge_tile(const MergeLayer& layer, const MergeTile& tile, const ActiveList& list, char* slots) {
  using P = Pieces<X>;
  const P pieces(tile);
  const int count = layer.rank > 0 ? list.count() : 0;  // without rank nothing takes part, to the bit
  if (count == 0) {
#pragma unroll
    for (int i = 0; i < P::kPieces; ++i)
      if (pieces.has(layer, i)) store(layer, pieces, i, *P::slot(slots, i));
    return;
  }
  Sums<X> sums;
#pragma unroll
  for (int i = 0; i < P::kPieces; ++i) {
    uint4 piece{0, 0, 0, 0};
    if (pieces.has(layer, i)) piece = *P::slot(slots, i);
    const Values<X, P::kCount> v{{piece.x, piece.y, piece.z, piece.w}};
    to_floats(v, sums[i]);
  }
  for (int k = 0; k < count; ++k) {
    const int i = list.order(k), adapter = list.adapter(i);
    const int rank = list.rank(i) < layer.rank ? list.rank(i) : layer.rank;
    const X* const a = static_cast<const X*>(layer.a) + int64_t{adapter} * layer.rank * layer.cols;
    const X* const b = static_cast<const X*>(layer.b) + int64_t{adapter} * layer.rank * layer.rows;
    add_update<kWide>(layer, pieces, a, b, rank, list.factor(i), sums);
  }
#pragma unroll
  for (int i = 0; i < P::kPieces; ++i)
    if (pieces.has(layer, i)) store(layer, pieces, i, round_piece<X>(sums[i]));
}

// kWide: all layers are wide, as below.
template <bool kWide, class X, int kLayers>
EFFK_KERNEL(kMergeThreads, kMergeBlocks<kWide>)
merge_kernel(EFFK_GRID_CONSTANT(MergeArgs) p, EFFK_GRID_CONSTANT(MergeTable<kLayers>) table) {
  using P = Pieces<X>;
  constexpr int kSlots = P::kSlots;
  char* const slots = gpu::shared_memory();
  const int begin = static_cast<int>(int64_t{p.num_tiles} * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(int64_t{p.num_tiles} * (blockIdx.x + 1) / gridDim.x);
  MergeTile tile = find_tile(table, p.num_layers, begin);
  int left = end - begin, slot = 0;
  // The tile that is `by` tiles ahead, if there are more than that.
  const auto fetch_ahead = [&](int by) {
    if (by < left) {
      MergeTile ahead = tile;
      for (int i = 0; i < by; ++i) step(table, ahead);
      const int to = slot + by < kSlots ? slot + by : slot + by - kSlots;
      fetch<X>(table.layer[ahead.layer], ahead, slots + to * P::kSlotBytes);
    }
    gpu::async_commit();
  };
#pragma unroll
  for (int i = 0; i < kSlots - 1; ++i) fetch_ahead(i);

  const ActiveList list{slots + kSlots * P::kSlotBytes, p.pairs()};
  make_active_list(p, list);
  if (list.count() == 0 && p.in_place) {
    gpu::async_wait<0>();
    return;
  }
  for (; left > 0; --left) {
    fetch_ahead(kSlots - 1);
    gpu::async_wait<kSlots - 1>();
    merge_tile<kWide, X>(table.layer[tile.layer], tile, list, slots + slot * P::kSlotBytes);
    if (left > 1) step(table, tile);
    slot = slot + 1 < kSlots ? slot + 1 : 0;
  }
}

// --- Host side ---

// Whether rows of a and b can be loaded in pieces of 8 (4 of float32) columns and of 4 ranks.
inline bool is_wide(Type type, const Layer& layer) {
  const int64_t size = type_size(type);
  return is_aligned(layer.a, layer.cols, size, 16) && is_aligned(layer.b, layer.rank, size, 4 * size);
}

template <bool kWide, class X, int kLayers>
gpu::Error launch_merge_of(const MergeArgs& p, const MergeTable<kLayers>& table, int num_sms, gpu::Stream stream) {
  const int most = num_sms * kMergeBlocks<kWide>, blocks = p.num_tiles < most ? p.num_tiles : most;
  const int shared_bytes = Pieces<X>::kSlots * Pieces<X>::kSlotBytes + active_list_bytes(p.pairs());
  return gpu::launch(merge_kernel<kWide, X, kLayers>, dim3(static_cast<unsigned>(blocks)), kMergeThreads, shared_bytes,
                     stream, p, table);
}

template <class X>
gpu::Error launch_merge_of(const MergeArgs& p, bool wide, const MergeTable<kMostLayers>& table, int num_sms,
                           gpu::Stream stream) {
  if (p.num_layers > kFewLayers)
    return wide ? launch_merge_of<true, X>(p, table, num_sms, stream)
                : launch_merge_of<false, X>(p, table, num_sms, stream);
  MergeTable<kFewLayers> few{};  // a small parameter is launched sooner
  for (int i = 0; i < p.num_layers; ++i) few.layer[i] = table.layer[i];
  return wide ? launch_merge_of<true, X>(p, few, num_sms, stream) : launch_merge_of<false, X>(p, few, num_sms, stream);
}

// Of p, all but the layers' and tiles' numbers is given. Strides of layers with more than one row are less than
// kMostStride. Either all layers have a base or none.
inline gpu::Error launch_merge(MergeArgs p, Type type, const Layer* layers, int64_t num_layers, int num_sms,
                               gpu::Stream stream) {
  if (p.in_place && p.pairs() == 0) return nullptr;
  MergeTable<kMostLayers> table;
  bool wide = true;
  p.num_layers = p.num_tiles = 0;
  const auto launch = [&]() -> gpu::Error {
    if (p.num_layers == 0) return nullptr;
    switch (type) {
      case Type::f32: return launch_merge_of<float>(p, wide, table, num_sms, stream);
      case Type::f16: return launch_merge_of<Half>(p, wide, table, num_sms, stream);
      default: return launch_merge_of<BFloat16>(p, wide, table, num_sms, stream);
    }
  };
  for (int64_t i = 0; i < num_layers; ++i) {
    const Layer& from = layers[i];
    if (from.rows == 0 || from.cols == 0) continue;
    // Far less than 2^31, or the layer would have more bytes than there are addresses.
    const int64_t tiles = ceil_div(from.rows, kTileRows) * ceil_div(from.cols, kTileCols);
    if (p.num_layers == kMostLayers || p.num_tiles + tiles > INT32_MAX) {
      if (const gpu::Error error = launch()) return error;
      p.num_layers = p.num_tiles = 0;
      wide = true;
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
                                   p.num_tiles};
    p.num_tiles += static_cast<int>(tiles);
    wide = wide && is_wide(type, from);
  }
  return launch();
}

}  // namespace effk::lora
