// lora_apply on CUDA, in three launches; their sizes come from shapes alone, and nobody waits for the device.
//
// 1. Group. Tokens are taken in chunks, and a block sorts a chunk's pairs by adapter. Those that take part, entries,
//    get numbers in this order. From them it makes tiles (up to 16 entries of an adapter, for step 2) and records (the
//    entries of an adapter in a unit of 1 or 8 tokens, for step 3).
// 2. Shrink: inner = A x in float32, for a tile and 8 of its adapter's ranks in a block, whose warps share the columns.
// 3. Expand: y + sum of factor * (B inner) for a unit of tokens and 128 outputs in a block, a thread has one output. It
//    goes through the unit's records by ascending adapter.
//
// A token's sums are made in the same order whatever tokens are around it, so its result has the same bits.
// Nothing of this has been measured on a GPU.
#pragma once

#include "load.cuh"

namespace effk::lora {

constexpr int kGroupThreads = 256;
constexpr int kMostUnit = 8;       // tokens
constexpr int kMostChunk = 64;     // tokens
constexpr int kChunkPairs = 1024;  // at most
static_assert(kMaxPairs <= kChunkPairs);
constexpr int kTileTokens = 16, kTileRanks = 8;
constexpr int kShrinkWarps = 8, kShrinkThreads = kShrinkWarps * gpu::kWarp;
constexpr int kExpandThreads = 128;
constexpr int64_t kMostApplyBlocks = 1 << 20;  // beyond, blocks take several items

// The arguments of a call, and how it is shared out.
struct ApplyArgs {
  Apply a;  // without groups
  Indices ids;
  const float* gates;  // [tokens, pairs]
  Indices ranks;
  double scale;
  int adapters, pairs;  // pairs of a token

  // Few tokens: more blocks are worth more than reading an adapter once, as it is in L2 anyway.
  EFFK_HD int unit() const { return a.tokens <= kMostChunk || pairs * kMostUnit > kChunkPairs ? 1 : kMostUnit; }
  // A multiple of the unit.
  EFFK_HD int chunk() const {
    return pairs * kMostChunk <= kChunkPairs ? kMostChunk : kChunkPairs / pairs / unit() * unit();
  }
  EFFK_HD int64_t chunks() const { return ceil_div(a.tokens, chunk()); }
  EFFK_HD int64_t units() const { return ceil_div(a.tokens, unit()); }
  // At most, of a chunk.
  EFFK_HD int entries() const { return static_cast<int>(min_of(chunk(), a.tokens)) * pairs; }
  EFFK_HD int tiles() const {
    return static_cast<int>(min_of(entries(), entries() / kTileTokens + min_of(adapters, entries())));
  }
  // At most, of a unit.
  EFFK_HD int records() const { return static_cast<int>(min_of(int64_t{unit()} * pairs, adapters)); }
  EFFK_HD int record_words() const { return 2 + 2 * unit(); }
};

struct Tile {
  int32_t adapter, rank;
  int32_t begin, count;  // entries of the chunk
};

// What the steps hand on to each other. The entries of a chunk begin at the number of its first pair.
struct Grouped {
  float* inner;        // [tokens * pairs, rank], of entries
  Tile* tiles;         // [chunks, tiles]
  int32_t* num_tiles;  // [chunks]
  int32_t* token;      // [tokens * pairs], of entries: their number in the chunk
  // [units, records]: adapter, rank, then the numbers of the tokens' entries in the chunk, or -1, and their factors.
  int32_t* records;
  int32_t* num_records;  // [units]
};

// The layout of one block of memory, aligned to 16 bytes; its size comes back.
inline int64_t place_grouped(const ApplyArgs& p, void* memory, Grouped* out) {
  auto* at = static_cast<char*>(memory);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += ceil_div(count * sizeof(*pointer), 16) * 16;
  };
  take(out->inner, p.a.tokens * p.pairs * p.a.rank);
  take(out->tiles, p.chunks() * p.tiles());
  take(out->num_tiles, p.chunks());
  take(out->token, p.a.tokens * p.pairs);
  take(out->records, p.units() * p.records() * p.record_words());
  take(out->num_records, p.units());
  return at - static_cast<char*>(memory);
}

inline int64_t apply_workspace(const ApplyArgs& p) {
  Grouped g;
  return place_grouped(p, nullptr, &g);
}

// --- Group ---

// In shared memory, of a chunk's pairs.
EFFK_HD constexpr int group_bytes(int pairs) { return pairs * 14; }

EFFK_KERNEL(kGroupThreads, 1) group_kernel(ApplyArgs p, Grouped out) {
  const int64_t chunk = blockIdx.x, token0 = chunk * p.chunk(), pair0 = token0 * p.pairs;
  const int tokens = static_cast<int>(min_of(p.chunk(), p.a.tokens - token0)), pairs = tokens * p.pairs;
  const int all_pairs = p.entries(), unit = p.unit(), unit_pairs = unit * p.pairs;
  auto* const adapter = reinterpret_cast<int32_t*>(gpu::shared_memory());
  auto* const factor = reinterpret_cast<float*>(adapter + all_pairs);      // 0: takes no part
  auto* const number = reinterpret_cast<int32_t*>(factor + all_pairs);     // of the entry
  auto* const is_first = reinterpret_cast<uint16_t*>(number + all_pairs);  // bit 0: of a tile, bit 1: of a record
  const auto takes_part = [&](int i) { return factor[i] != 0; };
  const int64_t unit0 = token0 / unit;  // units don't cross chunks
  const int units = static_cast<int>(ceil_div(tokens, unit));
  const auto record_of = [&](int u, int i) { return out.records + ((unit0 + u) * p.records() + i) * p.record_words(); };

  for (int i = threadIdx.x; i < pairs; i += kGroupThreads) adapter[i] = adapter_at(p.ids, pair0 + i, p.adapters);
  for (int i = threadIdx.x; i < units * p.records(); i += kGroupThreads) {
    int32_t* const record = record_of(i / p.records(), i % p.records());
    for (int u = 0; u < unit; ++u) record[2 + u] = -1;
  }
  gpu::sync_block();

  // A token's gates of an adapter are summed up at the first of its pairs, in order.
  for (int i = threadIdx.x; i < pairs; i += kGroupThreads) {
    const int first = i / p.pairs * p.pairs, id = adapter[i];
    float f = 0;
    int j = first;
    if (id >= 0)
      while (adapter[j] != id) ++j;
    if (id >= 0 && j == i) {
      double sum = 0;
      for (; j < first + p.pairs; ++j)
        if (adapter[j] == id) sum += static_cast<double>(p.gates[pair0 + j]);
      if (rank_of(p.ranks, id, static_cast<int>(p.a.rank)) > 0) f = static_cast<float>(sum * p.scale);
    }
    factor[i] = f;
  }
  gpu::sync_block();

  for (int i = threadIdx.x; i < pairs; i += kGroupThreads) {
    if (!takes_part(i)) continue;
    const int id = adapter[i], my_unit = i / unit_pairs * unit_pairs;
    int before = 0, of_group = 0, of_record = 0;
    for (int j = 0; j < pairs; ++j) {
      if (!takes_part(j)) continue;
      before += adapter[j] < id;
      if (adapter[j] == id && j < i) ++of_group, of_record += j >= my_unit;
    }
    number[i] = before + of_group;
    is_first[i] = static_cast<uint16_t>((of_group % kTileTokens == 0) | (of_record == 0) << 1);
    out.token[pair0 + number[i]] = i / p.pairs;
  }
  gpu::sync_block();

  for (int i = threadIdx.x; i < pairs; i += kGroupThreads) {
    if (!takes_part(i)) continue;
    const int id = adapter[i], rank = rank_of(p.ranks, id, static_cast<int>(p.a.rank));
    const int my_unit = i / unit_pairs * unit_pairs, end = my_unit + unit_pairs;
    int records = 0;
    for (int j = my_unit; j < end && j < pairs; ++j) records += takes_part(j) && adapter[j] < id && is_first[j] >> 1;
    int32_t* const record = record_of(i / unit_pairs, records);
    if (is_first[i] >> 1) record[0] = id, record[1] = rank;
    const int u = i / p.pairs % unit;
    record[2 + u] = number[i];
    record[2 + unit + u] = static_cast<int32_t>(bits_of(factor[i]));
    if (is_first[i] & 1) {
      int tiles = 0, count = 0;
      for (int j = 0; j < pairs; ++j) {
        if (!takes_part(j)) continue;
        tiles += number[j] < number[i] && (is_first[j] & 1);
        count += adapter[j] == id && number[j] >= number[i] && number[j] < number[i] + kTileTokens;
      }
      out.tiles[chunk * p.tiles() + tiles] = {id, rank, number[i], count};
    }
  }
  for (int u = threadIdx.x; u < units; u += kGroupThreads) {
    int records = 0;
    for (int j = u * unit_pairs; j < (u + 1) * unit_pairs && j < pairs; ++j)
      records += takes_part(j) && is_first[j] >> 1;
    out.num_records[unit0 + u] = records;
  }
  if (threadIdx.x == 0) {
    int tiles = 0;
    for (int j = 0; j < pairs; ++j) tiles += takes_part(j) && (is_first[j] & 1);
    out.num_tiles[chunk] = tiles;
  }
}

// --- Shrink ---

// A warp's share of the sums [token][rank] of a tile and 8 ranks: columns in strides of all warps. `last_token` and
// `last_rank` are the last ones that there are; the others repeat them, and nobody asks for the results.
template <bool kWide, class X>
EFFK_DEVICE void shrink_warp(const Apply& a, const X* rows, int last_rank, const int32_t* token, const X* x,
                             int last_token, float* sums) {
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp, cols = static_cast<int>(a.cols);
  if constexpr (sizeof(X) == 2) {
    // Columns may be named as we like: a lane's are 8t to 8t + 7 of 32, for two products.
    constexpr int kStep = 32;
    const int g = lane / 4, t = lane % 4;
    const auto token_at = [&](int i) { return x + int64_t{token[i < last_token ? i : last_token]} * a.x_stride; };
    const X* const from_a = rows + int64_t{g < last_rank ? g : last_rank} * a.cols;
    const X* const from_x[2] = {token_at(g), token_at(g + 8)};
    float c[4] = {};
#pragma unroll 4
    for (int k = warp * kStep + t * 8; k - t * 8 < cols; k += kShrinkWarps * kStep) {
      const int left = cols - k;
      const auto of_a = load_values<kWide, X, 8>(from_a + k, left);
      const auto x0 = load_values<kWide, X, 8>(from_x[0] + k, left), x1 = load_values<kWide, X, 8>(from_x[1] + k, left);
#pragma unroll
      for (int i = 0; i < 4; i += 2)
        gpu::mma<X>(c, x0.word[i], x1.word[i], x0.word[i + 1], x1.word[i + 1], of_a.word[i], of_a.word[i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(g + i / 2 * 8) * kTileRanks + 2 * t + i % 2] = c[i];
  } else {
    constexpr int kTokens = 4;  // at once
#pragma unroll 1
    for (int first = 0; first <= last_token; first += kTokens) {
      const X* from_x[kTokens];
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
        from_x[i] = x + int64_t{token[first + i < last_token ? first + i : last_token]} * a.x_stride;
      float c[kTokens][kTileRanks] = {};
      for (int k = (warp * gpu::kWarp + lane) * 4; k < cols; k += kShrinkThreads * 4) {
        const int left = cols - k;
        Values<X, 4> of_x[kTokens];
#pragma unroll
        for (int i = 0; i < kTokens; ++i) of_x[i] = load_values<kWide, X, 4>(from_x[i] + k, left);
#pragma unroll
        for (int r = 0; r < kTileRanks; ++r) {
          if (r > last_rank) break;
          const auto of_a = load_values<kWide, X, 4>(rows + r * a.cols + k, left);
#pragma unroll
          for (int i = 0; i < kTokens; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) c[i][r] = fmaf(value(of_a, j), value(of_x[i], j), c[i][r]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int r = 0; r < kTileRanks; ++r) {
#pragma unroll
          for (int by = 1; by < gpu::kWarp; by *= 2) c[i][r] += gpu::shuffle_xor(c[i][r], by);
          if (lane == 0) sums[(first + i) * kTileRanks + r] = c[i][r];
        }
    }
  }
}

template <class X>
EFFK_KERNEL(kShrinkThreads, 2)
shrink_kernel(ApplyArgs p, Grouped g) {
  constexpr int kSums = kTileTokens * kTileRanks;
  EFFK_SHARED(float[kShrinkWarps][kSums], sums);
  const Apply& a = p.a;
  const int tiles = p.tiles(), rank_tiles = static_cast<int>(ceil_div(a.rank, kTileRanks));
  const bool wide =
      is_aligned(a.a, a.cols, sizeof(X), 16) && is_aligned(a.x, a.tokens > 1 ? a.x_stride : 0, sizeof(X), 16);
  for (int64_t item = blockIdx.x; item < p.chunks() * tiles * rank_tiles; item += gridDim.x) {
    const int64_t chunk = item / rank_tiles / tiles;
    const int at = static_cast<int>(item / rank_tiles % tiles), r0 = static_cast<int>(item % rank_tiles) * kTileRanks;
    if (at >= g.num_tiles[chunk]) continue;
    const Tile tile = g.tiles[chunk * tiles + at];
    if (r0 >= tile.rank) continue;
    const int64_t entry0 = chunk * p.chunk() * p.pairs + tile.begin;
    const X* const rows = static_cast<const X*>(a.a) + (int64_t{tile.adapter} * a.rank + r0) * a.cols;
    const X* const x = static_cast<const X*>(a.x) + chunk * p.chunk() * a.x_stride;
    const int ranks = static_cast<int>(min_of(tile.rank - r0, kTileRanks)), warp = threadIdx.x / gpu::kWarp;
    if (wide)
      shrink_warp<true>(a, rows, ranks - 1, g.token + entry0, x, tile.count - 1, sums[warp]);
    else
      shrink_warp<false>(a, rows, ranks - 1, g.token + entry0, x, tile.count - 1, sums[warp]);
    gpu::sync_block();
    if (threadIdx.x < kSums) {
      const int token = threadIdx.x / kTileRanks, r = threadIdx.x % kTileRanks;
      if (token < tile.count && r < ranks) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kShrinkWarps; ++i) sum += sums[i][threadIdx.x];
        g.inner[(entry0 + token) * a.rank + r0 + r] = sum;
      }
    }
    gpu::sync_block();
  }
}

// --- Expand ---

// total += factor * (b inner) of one output, for the tokens that have the adapter of the record.
template <bool kWide, class X, int kUnit>
EFFK_DEVICE void add_record(const X* b, const float* inner, int64_t inner_stride, const int32_t* record,
                            float (&total)[kUnit]) {
  constexpr int kStep = 4;
  const int rank = record[1];
  int entry[kUnit];
#pragma unroll
  for (int u = 0; u < kUnit; ++u) entry[u] = record[2 + u];
  float sums[kUnit] = {};
#pragma unroll(kUnit == 1 ? 4 : 1)
  for (int r = 0; r < rank; r += kStep) {
    float of_b[kStep];
    to_floats(load_values<kWide, X, kStep>(b + r, rank - r), of_b);
#pragma unroll
    for (int u = 0; u < kUnit; ++u) {
      if (entry[u] < 0) continue;
      const auto v = load_values<kWide, float, kStep>(inner + entry[u] * inner_stride + r, rank - r);
#pragma unroll
      for (int i = 0; i < kStep; ++i) sums[u] = fmaf(of_b[i], value(v, i), sums[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnit; ++u)
    if (entry[u] >= 0) total[u] = fmaf(float_of(static_cast<uint32_t>(record[2 + kUnit + u])), sums[u], total[u]);
}

template <class X, int kUnit>
EFFK_KERNEL(kExpandThreads, 4)
expand_kernel(ApplyArgs p, Grouped g) {
  const Apply& a = p.a;
  const int64_t slices = ceil_div(a.rows, kExpandThreads);
  const bool wide = is_aligned(a.b, a.rank, sizeof(X), 4 * sizeof(X)) && a.rank % 4 == 0;
  for (int64_t item = blockIdx.x; item < p.units() * slices; item += gridDim.x) {
    const int64_t unit = item / slices, row = item % slices * kExpandThreads + threadIdx.x, token0 = unit * kUnit;
    if (row >= a.rows) continue;
    const int64_t chunk0 = token0 / p.chunk() * p.chunk() * p.pairs;  // its first entry
    const int tokens = static_cast<int>(min_of(kUnit, a.tokens - token0));
    float total[kUnit];
#pragma unroll
    for (int u = 0; u < kUnit; ++u)
      total[u] = a.y_in && u < tokens ? to_float(static_cast<const X*>(a.y_in)[(token0 + u) * a.y_stride + row]) : 0;
    const int records = g.num_records[unit];
    for (int i = 0; i < records; ++i) {
      const int32_t* const record = g.records + (unit * p.records() + i) * p.record_words();
      const X* const b = static_cast<const X*>(a.b) + (record[0] * a.rows + row) * a.rank;
      const float* const inner = g.inner + chunk0 * a.rank;
      if (wide && record[1] % 4 == 0)
        add_record<true>(b, inner, a.rank, record, total);
      else
        add_record<false>(b, inner, a.rank, record, total);
    }
#pragma unroll
    for (int u = 0; u < kUnit; ++u)
      if (u < tokens) from_float(total[u], static_cast<X*>(a.y) + (token0 + u) * a.rows + row);
  }
}

// --- Host side ---

template <class X>
gpu::Error launch_apply_of(const ApplyArgs& p, const Grouped& g, int64_t most_blocks, gpu::Stream stream) {
  const auto grid = [&](int64_t items) { return dim3(static_cast<unsigned>(min_of(items, most_blocks))); };
  const int64_t shrinks = p.chunks() * p.tiles() * ceil_div(p.a.rank, kTileRanks);
  const int64_t expands = p.units() * ceil_div(p.a.rows, kExpandThreads);
  if (shrinks > 0)
    if (const gpu::Error error = gpu::launch(shrink_kernel<X>, grid(shrinks), kShrinkThreads, 0, stream, p, g))
      return error;
  const auto expand = p.unit() == 1 ? expand_kernel<X, 1> : expand_kernel<X, kMostUnit>;
  return gpu::launch(expand, grid(expands), kExpandThreads, 0, stream, p, g);
}

// The workspace has apply_workspace(p) bytes.
inline gpu::Error launch_apply(const ApplyArgs& p, void* workspace, gpu::Stream stream,
                               int64_t most_blocks = kMostApplyBlocks) {
  if (p.a.tokens == 0 || p.a.rows == 0) return nullptr;
  Grouped g;
  place_grouped(p, workspace, &g);
  if (const gpu::Error error = gpu::launch(group_kernel, dim3(static_cast<unsigned>(p.chunks())), kGroupThreads,
                                           group_bytes(p.entries()), stream, p, g))
    return error;
  switch (p.a.type) {
    case Type::f32: return launch_apply_of<float>(p, g, most_blocks, stream);
    case Type::f16: return launch_apply_of<Half>(p, g, most_blocks, stream);
    default: return launch_apply_of<BFloat16>(p, g, most_blocks, stream);
  }
}

}  // namespace effk::lora
