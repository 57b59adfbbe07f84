// lora_apply on CUDA, in two launches; their sizes come from shapes alone, and nobody waits for the device.
//
// 1. Shrink: inner = A x in float32, for the tokens of a chunk that have an adapter, and 8 of its ranks, in a block,
//    whose warps share the columns. Each block finds its tokens by itself: that is cheaper than a launch that sorts.
// 2. Expand: y + sum of factor * (B inner) for a unit of 1 or 8 tokens. A block first makes records of them, one for
//    each adapter, in ascending order, then goes through these. 16-bit types: a warp has 16 outputs, on tensor cores,
//    where inner is a sum of three bfloat16 numbers, and so is exact. float32: a thread has one output.
//
// A token's sums are made in the same order whatever tokens are around it, so its result has the same bits.
#pragma once

#include "load.cuh"

namespace effk::lora {

constexpr int kMostUnit = 8;       // tokens
constexpr int kMostChunk = 64;     // tokens
constexpr int kChunkPairs = 1024;  // at most
static_assert(kMaxPairs <= kChunkPairs);
constexpr int kTileTokens = 16, kTileRanks = 8;
constexpr int kShrinkWarps = 8, kShrinkThreads = kShrinkWarps * gpu::kWarp;
constexpr int kExpandThreads = 128;
constexpr int64_t kMostApplyBlocks = 1 << 20;  // beyond, blocks take several items
constexpr int64_t kEnoughBlocks = 512;         // of step 2

// Outputs of a block of step 2.
template <class X>
constexpr int kExpandRows = sizeof(X) == 2 ? kExpandThreads / gpu::kWarp * 16 : kExpandThreads;

// The arguments of a call, and how it is shared out.
struct ApplyArgs {
  Apply a;  // without groups
  Indices ids;
  const float* gates;  // [tokens, pairs]
  Indices ranks;
  double scale;
  int adapters, pairs;  // pairs of a token

  // float32, few tokens: more blocks are worth more than reading an adapter once, as it is in L2 anyway. Tensor cores
  // have 8 columns either way.
  EFFK_HD int unit() const {
    const bool few = a.type == Type::f32 && a.tokens <= kMostChunk;
    return few || pairs * kMostUnit > kChunkPairs ? 1 : kMostUnit;
  }
  EFFK_HD int chunk() const { return pairs * kMostChunk <= kChunkPairs ? kMostChunk : kChunkPairs / pairs; }
  EFFK_HD int64_t chunks() const { return ceil_div(a.tokens, chunk()); }
  EFFK_HD int64_t units() const { return ceil_div(a.tokens, unit()); }
  // At most, of a chunk.
  EFFK_HD int entries() const { return static_cast<int>(min_of(chunk(), a.tokens)) * pairs; }
  EFFK_HD int chunk_adapters() const { return static_cast<int>(min_of(adapters, entries())); }
};

// What step 1 hands on, for a token's first pair of each adapter: [tokens * pairs, rank] floats.
inline int64_t apply_workspace(const ApplyArgs& p) {
  return p.a.tokens * p.pairs * p.a.rank * static_cast<int64_t>(sizeof(float));
}

// Adapters and gates of neighbouring tokens' pairs, in shared memory.
struct TokenPairs {
  int32_t* adapter;
  float* gate;

  // By all threads of the block, which has to wait then.
  EFFK_DEVICE void load(const ApplyArgs& p, int64_t first, int count) const {
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      adapter[i] = adapter_at(p.ids, first + i, p.adapters);
      gate[i] = p.gates[first + i];
    }
  }

  // The factor of pair i, of `pairs` of its token from `first` on: gates of an adapter are summed up at the first of
  // them, in order. 0: takes no part.
  EFFK_DEVICE float factor(const ApplyArgs& p, int first, int i) const {
    const int id = adapter[i];
    if (id < 0) return 0;
    for (int j = first; j < i; ++j)
      if (adapter[j] == id) return 0;
    double sum = 0;
    for (int j = i; j < first + p.pairs; ++j)
      if (adapter[j] == id) sum += static_cast<double>(gate[j]);
    return rank_of(p.ranks, id, static_cast<int>(p.a.rank)) > 0 ? static_cast<float>(sum * p.scale) : 0;
  }
};

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
    constexpr int kAtOnce = kWide ? 8 : 1;  // on their way
#pragma unroll 1
    for (int first = warp * kStep; first < cols; first += kAtOnce * kShrinkWarps * kStep) {
      Values<X, 8> of_a[kAtOnce], of_x[kAtOnce][2];
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s) {
        const int k = first + s * kShrinkWarps * kStep + t * 8, left = cols - k;
        of_a[s] = load_values<kWide, X, 8>(from_a + k, left);
#pragma unroll
        for (int i = 0; i < 2; ++i) of_x[s][i] = load_values<kWide, X, 8>(from_x[i] + k, left);
      }
#pragma unroll
      for (int s = 0; s < kAtOnce; ++s)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          gpu::mma<X>(c, of_x[s][0].word[i], of_x[s][1].word[i], of_x[s][0].word[i + 1], of_x[s][1].word[i + 1],
                      of_a[s].word[i], of_a[s].word[i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(g + i / 2 * 8) * kTileRanks + 2 * t + i % 2] = c[i];
  } else {
    constexpr int kTokens = 4, kRanks = 4;  // at once
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
        for (int r0 = 0; r0 < kTileRanks; r0 += kRanks) {
          Values<X, 4> of_a[kRanks];
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
            of_a[r] = load_values<kWide, X, 4>(rows + (r0 + r < last_rank ? r0 + r : last_rank) * a.cols + k, left);
#pragma unroll
          for (int r = 0; r < kRanks; ++r)
#pragma unroll
            for (int i = 0; i < kTokens; ++i)
#pragma unroll
              for (int j = 0; j < 4; ++j) c[i][r0 + r] = fmaf(value(of_a[r], j), value(of_x[i], j), c[i][r0 + r]);
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

// In shared memory: a chunk's pairs.
EFFK_HD constexpr int shrink_bytes(int pairs) { return pairs * 8; }

template <class X>
EFFK_KERNEL(kShrinkThreads, 2)
shrink_kernel(ApplyArgs p, float* inner) {
  constexpr int kSums = kTileTokens * kTileRanks;
  EFFK_SHARED(float[kShrinkWarps][kSums], sums);
  EFFK_SHARED(int32_t[kMostChunk], token);
  EFFK_SHARED(int32_t[kMostChunk], entry);  // token's pair
  const Apply& a = p.a;
  auto* const ids = reinterpret_cast<int32_t*>(gpu::shared_memory());
  const TokenPairs of{ids, reinterpret_cast<float*>(ids + p.entries())};
  const int candidates = p.chunk_adapters(), rank_tiles = static_cast<int>(ceil_div(a.rank, kTileRanks));
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const bool wide =
      is_aligned(a.a, a.cols, sizeof(X), 16) && is_aligned(a.x, a.tokens > 1 ? a.x_stride : 0, sizeof(X), 16);
  for (int64_t item = blockIdx.x; item < p.chunks() * candidates * rank_tiles; item += gridDim.x) {
    const int64_t token0 = item / rank_tiles / candidates * p.chunk();
    const int candidate = static_cast<int>(item / rank_tiles % candidates);
    const int r0 = static_cast<int>(item % rank_tiles) * kTileRanks;
    const int tokens = static_cast<int>(min_of(p.chunk(), a.tokens - token0)), pairs = tokens * p.pairs;
    gpu::sync_block();  // the item before
    of.load(p, token0 * p.pairs, pairs);
    gpu::sync_block();

    // Candidates are all adapters, or where there are more of them than pairs, those of the pairs.
    int id = candidate;
    if (p.adapters > p.entries()) {
      id = candidate < pairs ? ids[candidate] : -1;
      for (int i = 0; i < candidate && id >= 0; ++i)
        if (ids[i] == id) id = -1;  // of another block
    }
    if (id < 0) continue;
    const int rank = rank_of(p.ranks, id, static_cast<int>(a.rank));
    if (r0 >= rank) continue;

    // Warps all make the same list, of 32 tokens at a time; the first one writes it down.
    int count = 0;
    for (int first = 0; first < tokens; first += gpu::kWarp) {
      const int mine = first + lane, end = mine < tokens ? (mine + 1) * p.pairs : 0;
      int i = mine * p.pairs;
      while (i < end && ids[i] != id) ++i;
      const bool has = i < end && of.factor(p, mine * p.pairs, i) != 0;
      const uint32_t all = gpu::vote(has);
      if (has && warp == 0) {
        const int at = count + static_cast<int>(gpu::popcount(all & ((1u << lane) - 1)));
        token[at] = mine;
        entry[at] = i;
      }
      count += static_cast<int>(gpu::popcount(all));
    }
    gpu::sync_block();

    const X* const rows = static_cast<const X*>(a.a) + (int64_t{id} * a.rank + r0) * a.cols;
    const X* const x = static_cast<const X*>(a.x) + token0 * a.x_stride;
    const int ranks = static_cast<int>(min_of(rank - r0, kTileRanks));
    const int ranks_written = static_cast<int>(min_of(ceil_div(rank, 4) * 4, a.rank)) - r0;  // 4 are read at a time
    for (int first = 0; first < count; first += kTileTokens) {
      const int here = static_cast<int>(min_of(count - first, kTileTokens));
      if (wide)
        shrink_warp<true>(a, rows, ranks - 1, token + first, x, here - 1, sums[warp]);
      else
        shrink_warp<false>(a, rows, ranks - 1, token + first, x, here - 1, sums[warp]);
      gpu::sync_block();
      if (threadIdx.x < kSums) {
        const int t = threadIdx.x / kTileRanks, r = threadIdx.x % kTileRanks;
        if (t < here && r < ranks_written) {
          float sum = 0;
          if (r < ranks)
#pragma unroll
            for (int i = 0; i < kShrinkWarps; ++i) sum += sums[i][threadIdx.x];
          inner[(token0 * p.pairs + entry[first + t]) * a.rank + r0 + r] = sum;
        }
      }
      gpu::sync_block();
    }
  }
}

// --- Expand ---

// In shared memory, of a unit's pairs: adapters that take part, in ascending order, and which pair a token has of each.
struct Records {
  TokenPairs of;
  int pairs;         // room
  float* factor;     // of pairs
  int32_t* adapter;  // of records
  int32_t* rank;
  int16_t* pair;   // [records, unit]: the token's one with the adapter, or -1
  int16_t* leads;  // of pairs: whether it is the first one with its adapter

  EFFK_DEVICE Records(char* memory, int room) : pairs(room) {
    of = {reinterpret_cast<int32_t*>(memory), reinterpret_cast<float*>(memory) + room};
    factor = of.gate + room;
    adapter = of.adapter + 3 * room;
    rank = adapter + room;
    leads = reinterpret_cast<int16_t*>(rank + room);
    pair = leads + room;
  }
  EFFK_HD static constexpr int bytes(int pairs, int unit) { return pairs * (22 + 2 * unit); }

  // By all threads of the block, for `count` pairs from number `first` on; gives the number of records.
  template <int kUnit>
  EFFK_DEVICE int make(const ApplyArgs& p, int64_t first, int count) const {
    of.load(p, first, count);
    gpu::sync_block();
    for (int i = threadIdx.x; i < count; i += kExpandThreads) factor[i] = of.factor(p, i / p.pairs * p.pairs, i);
    gpu::sync_block();
    for (int i = threadIdx.x; i < count; i += kExpandThreads) {
      bool lead = factor[i] != 0;
      for (int j = 0; j < i && lead; ++j) lead = factor[j] == 0 || of.adapter[j] != of.adapter[i];
      leads[i] = lead;
    }
    gpu::sync_block();
    int records = 0;
    for (int j = 0; j < count; ++j) records += leads[j];
    for (int i = threadIdx.x; i < count; i += kExpandThreads) {
      if (!leads[i]) continue;
      const int id = of.adapter[i];
      int place = 0;
      for (int j = 0; j < count; ++j) place += leads[j] && of.adapter[j] < id;
      adapter[place] = id;
      rank[place] = rank_of(p.ranks, id, static_cast<int>(p.a.rank));
#pragma unroll
      for (int u = 0; u < kUnit; ++u) pair[place * kUnit + u] = -1;
      for (int j = i; j < count; ++j)
        if (factor[j] != 0 && of.adapter[j] == id) pair[place * kUnit + j / p.pairs] = static_cast<int16_t>(j);
    }
    gpu::sync_block();
    return records;
  }
};

// The upper 16 bits of a float, as one; v becomes the rest, exactly.
EFFK_DEVICE uint32_t take_upper(float& v) {
  const uint32_t upper = bits_of(v) & 0xffff0000;
  v -= float_of(upper);
  return upper;
}

// The upper parts of two floats as bfloat16 numbers.
EFFK_DEVICE uint32_t take_pair(float& low, float& high) {
  return gpu::permute_bytes(take_upper(low), take_upper(high), 0x7632);
}

// 16 ranks of a record on tensor cores, of which a lane has 4: those of outputs g and g + 8 and of token g.
template <class X>
struct RecordStep {
  Values<X, 4> of_b[2];
  Values<float, 4> inner;
  int record;
  bool is_last;

  // product += b inner, for outputs g, g + 8 and tokens 2t, 2t + 1.
  EFFK_DEVICE void add(float (&product)[4]) const {
    float v[4];
    to_floats(inner, v);
    uint32_t parts[3][2];
#pragma unroll
    for (auto& part : parts) part[0] = take_pair(v[0], v[1]), part[1] = take_pair(v[2], v[3]);
    const auto multiply = [&](const uint32_t (&b)[2][2]) {
#pragma unroll
      for (int i = 2; i >= 0; --i)  // small ones first
        gpu::mma<BFloat16>(product, b[0][0], b[1][0], b[0][1], b[1][1], parts[i][0], parts[i][1]);
    };
    if constexpr (std::is_same_v<X, BFloat16>) {
      multiply({{of_b[0].word[0], of_b[0].word[1]}, {of_b[1].word[0], of_b[1].word[1]}});
    } else {  // float16 numbers are sums of two bfloat16 ones
      uint32_t upper[2][2], lower[2][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float f[4];
        to_floats(of_b[i], f);
        upper[i][0] = take_pair(f[0], f[1]), upper[i][1] = take_pair(f[2], f[3]);
        lower[i][0] = take_pair(f[0], f[1]), lower[i][1] = take_pair(f[2], f[3]);
      }
      multiply(lower);
      multiply(upper);
    }
  }
};

EFFK_DEVICE bool is_finite(float v) { return (bits_of(v) & 0x7f800000) != 0x7f800000; }

template <class X>
EFFK_DEVICE float plain_product(const X* b, const float* inner, int rank) {
  float sum = 0;
#pragma unroll 1
  for (int r = 0; r < rank; ++r) sum = fmaf(to_float(b[r]), inner[r], sum);
  return sum;
}

// A warp's 16 outputs from `row0` on, of a unit's tokens.
template <bool kWide, class X, int kUnit>
EFFK_DEVICE void expand_warp(const ApplyArgs& p, const Records& records, int num_records, const float* inner,
                             int64_t token0, int64_t row0) {
  constexpr int kStep = 16, kAtOnce = 4;
  const Apply& a = p.a;
  const int lane = threadIdx.x % gpu::kWarp, g = lane / 4, t = lane % 4;
  const auto row_of = [&](int i) { return row0 + g + i / 2 * 8; };
  const auto token_of = [&](int i) { return 2 * t + i % 2; };
  const auto is_there = [&](int i) {
    return row_of(i) < a.rows && token_of(i) < kUnit && token0 + token_of(i) < a.tokens;
  };
  float total[4] = {}, product[4] = {};
  if (a.y_in) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (is_there(i))
        total[i] = to_float(static_cast<const X*>(a.y_in)[(token0 + token_of(i)) * a.y_stride + row_of(i)]);
  }
  const auto b_of = [&](int record) { return static_cast<const X*>(a.b) + records.adapter[record] * a.rows * a.rank; };
  const float* const from_inner = inner + token0 * p.pairs * a.rank + 4 * t;
  int record = 0, r = 0;
  while (record < num_records) {
    RecordStep<X> steps[kAtOnce];
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      RecordStep<X>& step = steps[s];
      step.record = record;
      if (record >= num_records) continue;
      const int rank = records.rank[record], left = rank - r - 4 * t;
      const int pair = g < kUnit ? records.pair[record * kUnit + g] : -1;
      const X* const b = b_of(record) + (row0 + g) * a.rank + r + 4 * t;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        step.of_b[i] = load_values<kWide, X, 4>(b + 8 * i * a.rank, row_of(2 * i) < a.rows ? left : 0);
        if (kWide && left < 4) cut(step.of_b[i], left);
      }
      step.inner = load_values<kWide, float, 4>(from_inner + pair * a.rank + r, pair >= 0 ? left : 0);
      r += kStep;
      step.is_last = r >= rank;
      if (step.is_last) r = 0, ++record;
    }
#pragma unroll
    for (int s = 0; s < kAtOnce; ++s) {
      const RecordStep<X>& step = steps[s];
      if (step.record >= num_records) continue;
      step.add(product);
      if (!step.is_last) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = token_of(i) < kUnit ? records.pair[step.record * kUnit + token_of(i)] : -1;
        if (pair >= 0 && row_of(i) < a.rows) {
          if (!is_finite(product[i]))  // infinity isn't a sum of three numbers
            product[i] = plain_product(b_of(step.record) + row_of(i) * a.rank,
                                       inner + (token0 * p.pairs + pair) * a.rank, records.rank[step.record]);
          total[i] = fmaf(records.factor[pair], product[i], total[i]);
        }
        product[i] = 0;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (is_there(i)) from_float(total[i], static_cast<X*>(a.y) + (token0 + token_of(i)) * a.rows + row_of(i));
}

// total += factor * (b inner) of one output, for the tokens that have the adapter of the record.
template <bool kWide, int kUnit>
EFFK_DEVICE void add_record(const float* b, const float* inner, int64_t inner_stride, const Records& records,
                            int record, float (&total)[kUnit]) {
  constexpr int kStep = 4;
  const int rank = records.rank[record];
  int pair[kUnit];
#pragma unroll
  for (int u = 0; u < kUnit; ++u) pair[u] = records.pair[record * kUnit + u];
  float sums[kUnit] = {};
#pragma unroll(kUnit == 1 ? 4 : 1)
  for (int r = 0; r < rank; r += kStep) {
    float of_b[kStep];
    to_floats(load_values<kWide, float, kStep>(b + r, rank - r), of_b);
#pragma unroll
    for (int u = 0; u < kUnit; ++u) {
      if (pair[u] < 0) continue;
      const auto v = load_values<kWide, float, kStep>(inner + pair[u] * inner_stride + r, rank - r);
#pragma unroll
      for (int i = 0; i < kStep; ++i) sums[u] = fmaf(of_b[i], value(v, i), sums[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < kUnit; ++u)
    if (pair[u] >= 0) total[u] = fmaf(records.factor[pair[u]], sums[u], total[u]);
}

// A thread's output of a unit's tokens.
template <int kUnit>
EFFK_DEVICE void expand_thread(const ApplyArgs& p, const Records& records, int num_records, const float* inner,
                               int64_t token0, int64_t row) {
  const Apply& a = p.a;
  if (row >= a.rows) return;
  const int tokens = static_cast<int>(min_of(kUnit, a.tokens - token0));
  float total[kUnit];
#pragma unroll
  for (int u = 0; u < kUnit; ++u)
    total[u] = a.y_in && u < tokens ? static_cast<const float*>(a.y_in)[(token0 + u) * a.y_stride + row] : 0;
  const bool wide = is_aligned(a.b, a.rank, sizeof(float), 16);
  for (int i = 0; i < num_records; ++i) {
    const float* const b = static_cast<const float*>(a.b) + (records.adapter[i] * a.rows + row) * a.rank;
    const float* const from = inner + token0 * p.pairs * a.rank;
    if (wide && records.rank[i] % 4 == 0)
      add_record<true>(b, from, a.rank, records, i, total);
    else
      add_record<false>(b, from, a.rank, records, i, total);
  }
#pragma unroll
  for (int u = 0; u < kUnit; ++u)
    if (u < tokens) static_cast<float*>(a.y)[(token0 + u) * a.rows + row] = total[u];
}

// A block goes through `slices` slices of outputs with the same records.
template <class X, int kUnit>
EFFK_KERNEL(kExpandThreads, 4)
expand_kernel(ApplyArgs p, const float* inner, int64_t slices) {
  const Apply& a = p.a;
  const Records records(gpu::shared_memory(), kUnit * p.pairs);
  const int64_t rows = slices * kExpandRows<X>, blocks = ceil_div(a.rows, rows);  // of a unit
  // 4 ranks at a time, of b and of inner.
  const bool wide = is_aligned(a.b, a.rank, sizeof(X), 4 * sizeof(X)) && a.rank % 4 == 0;
  for (int64_t item = blockIdx.x; item < p.units() * blocks; item += gridDim.x) {
    const int64_t token0 = item / blocks * kUnit, first = item % blocks * rows, end = min_of(first + rows, a.rows);
    const int tokens = static_cast<int>(min_of(kUnit, a.tokens - token0));
    gpu::sync_block();  // the item before
    const int count = records.make<kUnit>(p, token0 * p.pairs, tokens * p.pairs);
#pragma unroll 1
    for (int64_t slice = first; slice < end; slice += kExpandRows<X>) {
      if constexpr (sizeof(X) == 4)
        expand_thread<kUnit>(p, records, count, inner, token0, slice + threadIdx.x);
      else if (wide)
        expand_warp<true, X, kUnit>(p, records, count, inner, token0, slice + threadIdx.x / gpu::kWarp * 16);
      else
        expand_warp<false, X, kUnit>(p, records, count, inner, token0, slice + threadIdx.x / gpu::kWarp * 16);
    }
  }
}

// --- Host side ---

template <class X>
gpu::Error launch_apply_of(const ApplyArgs& p, float* inner, int64_t most_blocks, gpu::Stream stream) {
  const auto grid = [&](int64_t items) { return dim3(static_cast<unsigned>(min_of(items, most_blocks))); };
  const int64_t shrinks = p.chunks() * p.chunk_adapters() * ceil_div(p.a.rank, kTileRanks);
  // With many tokens, making records shouldn't count.
  const int64_t all_slices = ceil_div(p.a.rows, kExpandRows<X>);
  const int64_t some_slices = p.units() * all_slices / min_of(kEnoughBlocks, most_blocks);
  const int64_t slices = some_slices < 1 ? 1 : min_of(some_slices, all_slices);
  const int64_t expands = p.units() * ceil_div(all_slices, slices);
  if (shrinks > 0)
    if (const gpu::Error error =
            gpu::launch(shrink_kernel<X>, grid(shrinks), kShrinkThreads, shrink_bytes(p.entries()), stream, p, inner))
      return error;
  const auto expand = p.unit() == 1 ? expand_kernel<X, 1> : expand_kernel<X, kMostUnit>;
  return gpu::launch(expand, grid(expands), kExpandThreads, Records::bytes(p.unit() * p.pairs, p.unit()), stream, p,
                     static_cast<const float*>(inner), slices);
}

// The workspace has apply_workspace(p) bytes.
inline gpu::Error launch_apply(const ApplyArgs& p, void* workspace, gpu::Stream stream,
                               int64_t most_blocks = kMostApplyBlocks) {
  if (p.a.tokens == 0 || p.a.rows == 0) return nullptr;
  auto* const inner = static_cast<float*>(workspace);
  switch (p.a.type) {
    case Type::f32: return launch_apply_of<float>(p, inner, most_blocks, stream);
    case Type::f16: return launch_apply_of<Half>(p, inner, most_blocks, stream);
    default: return launch_apply_of<BFloat16>(p, inner, most_blocks, stream);
  }
}

}  // namespace effk::lora
