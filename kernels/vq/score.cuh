// Scores on CUDA, which vq_score writes as they are and vq_topk as numbers that it can select by: a thread adds up
// table entries that the codes of a key name, for several query heads of the key head at once. Tables are in shared
// memory. With 8-bit tables a word there has the entries of four heads, so that one load serves them all; 16 words of a
// sub-vector are in 16 different banks, and no load waits for another one.
//
// A packed key of 16 codes is 8 bytes; for four heads it takes about 100 instructions, which is what limits the rate on
// GPUs with 4 TB/s: on an H200 131072 keys of 64 heads take 60 us, where their codes could be read in 16.
#pragma once

#include "load.cuh"

namespace effk::vq {

constexpr int kScoreThreads = 256, kScoreHeads = 4;
constexpr int kThreadKeys = 4;                          // at a time
constexpr int kStepKeys = kScoreThreads * kThreadKeys;  // of a block
constexpr int kBinBits = 12, kBins = 1 << kBinBits;     // of a histogram
constexpr int kRowUnit = 32;                            // rows of ranks are as many, or several times

// What scores are made of and what becomes of them.
struct ScoreArgs {
  Score a;  // without lens; out is null where ranks are wanted
  Indices lens;

  // 8-bit tables: of each (batch, key head, tile of up to 4 of its heads) [m, stride] words, and of each head 2 floats:
  // step and base.
  uint32_t* tables;
  float* lines;

  // Those to rank: from sink to window before the end.
  int64_t sink, window;
  // [B, H, rank_stride], of 16 bits with 8-bit tables, otherwise 32.
  void* ranks;
  int64_t rank_stride;
  uint32_t* bins;  // [B, H, kBins]: how many of each `rank >> shift`
  int shift;

  int64_t chunk;  // keys of a block

  EFFK_HD int64_t key_heads() const { return a.heads / a.group; }
  EFFK_HD int64_t head_tiles() const { return ceil_div(a.group, kScoreHeads); }
  // Entries of a sub-vector in a table: as many as codes can name.
  EFFK_HD int64_t stride() const { return a.codes == Codes::packed4 ? 16 : a.codes == Codes::u8 ? 256 : a.words; }
  EFFK_HD int64_t key_bytes() const {
    return a.codes == Codes::packed4 ? a.subspaces / 2 : a.codes == Codes::u8 ? a.subspaces : 2 * a.subspaces;
  }
};

// Where the keys to choose from begin and end.
struct Middle {
  int64_t begin, end, length;
};

EFFK_DEVICE Middle middle_of(const ScoreArgs& p, int64_t batch) {
  const int64_t length = count_at(p.lens, batch, p.a.keys), begin = min_of(p.sink, length);
  return {begin, max_of(begin, length - min_of(p.window, length)), length};
}

// A number that ascends with the score; NaN is below all, and -0 is 0.
EFFK_DEVICE uint32_t rank_of(float score) {
  if (score != score) return 0;
  const uint32_t bits = score == 0 ? 0 : bits_of(score);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

// --- 8-bit tables ---

constexpr int kTableThreads = 256;

// A block makes the table of a (batch, key head, tile of heads), and clears the histograms of its heads.
EFFK_KERNEL(kTableThreads, 2) table_kernel(EFFK_GRID_CONSTANT(ScoreArgs) p) {
  constexpr int kWarps = kTableThreads / gpu::kWarp;
  EFFK_SHARED(float[kScoreHeads][kWarps], warp_range);
  EFFK_SHARED(float[kScoreHeads][kWarps], warp_bad);
  EFFK_SHARED(float[kScoreHeads], steps);
  const Score& a = p.a;
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int64_t tiles = p.head_tiles(), tile = blockIdx.x % tiles, row = blockIdx.x / tiles;  // row: batch, key head
  const int64_t first = row * a.group + tile * kScoreHeads;                                   // batch, head
  const int heads = static_cast<int>(min_of(kScoreHeads, a.group - tile * kScoreHeads));
  if (p.bins)
    for (int64_t i = threadIdx.x; i < int64_t{heads} * kBins; i += kTableThreads) p.bins[first * kBins + i] = 0;
  if (!a.int8_table) return;

  // A warp looks at a sub-vector at a time.
  const int64_t entries = a.subspaces * a.words;
  for (int h = 0; h < heads; ++h) {
    const float* const from = a.lut + (first + h) * entries;
    float range = 0, bad = 0;
    for (int64_t j = warp; j < a.subspaces; j += kWarps) {
      float low = INFINITY, high = -INFINITY;
      for (int64_t c = lane; c < a.words; c += gpu::kWarp) {
        const float v = from[j * a.words + c];
        if (!(fabsf(v) < INFINITY)) bad = 1;
        low = v < low ? v : low;
        high = v > high ? v : high;
      }
#pragma unroll
      for (int by = 1; by < gpu::kWarp; by *= 2) {
        const float other_low = gpu::shuffle_xor(low, by), other_high = gpu::shuffle_xor(high, by);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
      }
      range = high - low > range ? high - low : range;
    }
    if (gpu::vote(bad != 0)) bad = 1;
    if (lane == 0) warp_range[h][warp] = range, warp_bad[h][warp] = bad;
  }
  gpu::sync_block();
  if (threadIdx.x < static_cast<unsigned>(heads)) {
    float range = 0, bad = 0;
    for (int w = 0; w < kWarps; ++w) {
      range = warp_range[threadIdx.x][w] > range ? warp_range[threadIdx.x][w] : range;
      bad += warp_bad[threadIdx.x][w];
    }
    const float step = range / 255;
    const bool is_bad = bad > 0 || !(step < INFINITY);
    steps[threadIdx.x] = is_bad ? 0 : step;
    p.lines[(first + threadIdx.x) * 2] = is_bad ? NAN : step;
    if (is_bad) p.lines[(first + threadIdx.x) * 2 + 1] = NAN;
  }
  gpu::sync_block();

  // Again a warp a sub-vector, this time all heads of a word together; entries that no word has are 0.
  const int64_t stride = p.stride();
  uint32_t* const table = p.tables + blockIdx.x * a.subspaces * stride;
  for (int64_t j = warp; j < a.subspaces; j += kWarps) {
    float low[kScoreHeads];
#pragma unroll
    for (int h = 0; h < kScoreHeads; ++h) {
      low[h] = INFINITY;
      if (h >= heads) continue;
      const float* const from = a.lut + (first + h) * entries + j * a.words;
      for (int64_t c = lane; c < a.words; c += gpu::kWarp) low[h] = from[c] < low[h] ? from[c] : low[h];
#pragma unroll
      for (int by = 1; by < gpu::kWarp; by *= 2) {
        const float other = gpu::shuffle_xor(low[h], by);
        low[h] = other < low[h] ? other : low[h];
      }
    }
    for (int64_t c = lane; c < stride; c += gpu::kWarp) {
      uint32_t word = 0;
#pragma unroll
      for (int h = 0; h < kScoreHeads; ++h) {
        if (h >= heads || c >= a.words) continue;
        const float step = steps[h], v = a.lut[(first + h) * entries + j * a.words + c];
        const float t = step > 0 ? rintf((v - low[h]) / step) : 0;
        word |= static_cast<uint32_t>(t < 255 ? t : 255) << 8 * h;
      }
      table[j * stride + c] = word;
    }
  }
  // The base: least entries in order, by a warp a head.
  if (warp >= heads || p.lines[(first + warp) * 2] != p.lines[(first + warp) * 2]) return;
  float base = 0;
  for (int64_t j = 0; j < a.subspaces; ++j) {
    float low = INFINITY;
    const float* const from = a.lut + (first + warp) * entries + j * a.words;
    for (int64_t c = lane; c < a.words; c += gpu::kWarp) low = from[c] < low ? from[c] : low;
#pragma unroll
    for (int by = 1; by < gpu::kWarp; by *= 2) {
      const float other = gpu::shuffle_xor(low, by);
      low = other < low ? other : low;
    }
    base = gpu::sum(base, low);
  }
  if (lane == 0) p.lines[(first + warp) * 2 + 1] = base;
}

// --- Sums ---

// Of four heads with 8-bit tables: each has 16 bits. Sums of whole words carry from one byte to the next; what the odd
// bytes add up to tells how much.
struct ByteSums {
  static constexpr int kHeads = kScoreHeads;
  uint32_t all = 0, odd = 0;

  EFFK_DEVICE void add(const char* entry, int) {
    const uint32_t v = *reinterpret_cast<const uint32_t*>(entry);
    all += v;
    odd += gpu::permute_bytes(v, 0, 0x4341);
  }
  // Of heads 0 and 2, or 1 and 3.
  EFFK_DEVICE uint32_t pair(int head) const { return head % 2 ? odd : all - (odd << 8); }
  EFFK_DEVICE uint32_t sum(int head) const { return head / 2 ? pair(head) >> 16 : pair(head) & 0xffff; }
  EFFK_DEVICE uint32_t rank(int head) const { return sum(head); }
  EFFK_DEVICE float score(int head, float step, float base) const {
    return gpu::sum(gpu::product(step, static_cast<float>(sum(head))), base);
  }
};

template <int kHeads_>
struct FloatSums {
  static constexpr int kHeads = kHeads_;
  float sums[kHeads] = {};

  EFFK_DEVICE void add(const char* entry, int table_bytes) {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) sums[h] += *reinterpret_cast<const float*>(entry + h * table_bytes);
  }
  EFFK_DEVICE uint32_t rank(int head) const { return rank_of(sums[head]); }
  EFFK_DEVICE float score(int head, float, float) const { return sums[head]; }
};

// --- Codes ---

// How a block reads a table: entries have 4 bytes.
struct Table {
  const char* at;
  int bytes;      // of a head's
  int sub_bytes;  // of a sub-vector
  int last;       // the last word that there is
};

// 8 bytes of codes, those of sub-vectors from j on.
template <Codes kCodes, class Sums>
EFFK_DEVICE void add_piece(Sums& sums, const Table& t, int j, uint2 piece) {
  const uint32_t words[2] = {piece.x, piece.y};
  if constexpr (kCodes == Codes::packed4) {
    const char* const from = t.at + j * 64;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t even = words[i] << 2 & 0x3c3c3c3c, odd = words[i] >> 2 & 0x3c3c3c3c;
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        sums.add(from + (8 * i + 2 * b) * 64 + gpu::permute_bytes(even, 0, 0x4440 + b), t.bytes);
        sums.add(from + (8 * i + 2 * b + 1) * 64 + gpu::permute_bytes(odd, 0, 0x4440 + b), t.bytes);
      }
    }
  } else if constexpr (kCodes == Codes::u8) {
    const char* const from = t.at + j * 1024;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t w = words[i / 4];
      sums.add(from + i * 1024 + (i % 4 == 0 ? w << 2 & 0x3fc : w >> (i % 4 * 8 - 2) & 0x3fc), t.bytes);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int code = static_cast<int>(i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffff);
      sums.add(t.at + (j + i) * t.sub_bytes + (code < t.last ? code : t.last) * 4, t.bytes);
    }
  }
}

// A key's codes one by one.
template <Codes kCodes, class Sums>
EFFK_DEVICE void add_each(Sums& sums, const Table& t, int subspaces, const void* key) {
  const auto add = [&](int j, int code) {
    sums.add(t.at + j * t.sub_bytes + (code < t.last ? code : t.last) * 4, t.bytes);
  };
  for (int j = 0; j < subspaces; ++j)
    if constexpr (kCodes == Codes::packed4)
      add(j, static_cast<const uint8_t*>(key)[j / 2] >> j % 2 * 4 & 15);
    else if constexpr (kCodes == Codes::u8)
      add(j, static_cast<const uint8_t*>(key)[j]);
    else
      add(j, static_cast<const uint16_t*>(key)[j]);
}

// How a thread loads keys: 8 bytes each, two neighbours at once; pieces of 8 bytes; single codes.
enum class Load { pair, pieces, each };

// A block has a chunk of the keys of a (batch, key head) and a tile of its heads. kIsShared: the tables are copied to
// shared memory.
template <Codes kCodes, class Sums, Load kLoad, bool kIsShared, bool kIsRanked>
EFFK_KERNEL(kScoreThreads, 3)
score_kernel(EFFK_GRID_CONSTANT(ScoreArgs) p) {
  constexpr int kHeads = Sums::kHeads;
  constexpr bool kIsByte = std::is_same_v<Sums, ByteSums>;
  const Score& a = p.a;
  const int64_t chunks = ceil_div(a.keys, p.chunk), tiles = ceil_div(a.group, kHeads);
  const int64_t chunk = blockIdx.x % chunks, tile = blockIdx.x / chunks % tiles, row = blockIdx.x / chunks / tiles;
  const int64_t batch = row / p.key_heads(), first = row * a.group + tile * kHeads;
  const int heads = static_cast<int>(min_of(kHeads, a.group - tile * kHeads));
  const int subspaces = static_cast<int>(a.subspaces);
  const Middle middle = middle_of(p, batch);

  // Keys to look at, and results to write: ranks of whole rows of 32, so that they can be read in pieces.
  int64_t begin = chunk * p.chunk, end = min_of(begin + p.chunk, kIsRanked ? p.rank_stride : a.keys);
  const int64_t from = kIsRanked ? middle.begin : 0, to = kIsRanked ? middle.end : middle.length;
  if constexpr (kIsRanked) {
    begin = max_of(begin, from / kRowUnit * kRowUnit);
    end = min_of(end, round_up(to, kRowUnit));
  }
  if (begin >= end) return;

  char* const shared = gpu::shared_memory();
  const int64_t stride = p.stride(), entries = a.subspaces * a.words;
  Table table{shared, static_cast<int>(a.subspaces * stride * 4), static_cast<int>(stride * 4),
              static_cast<int>(stride) - 1};
  if constexpr (kIsByte) {
    const uint32_t* const made = p.tables + (row * p.head_tiles() + tile) * a.subspaces * stride;
    if constexpr (kIsShared)
      for (int i = threadIdx.x; i < table.bytes / 4; i += kScoreThreads)
        reinterpret_cast<uint32_t*>(shared)[i] = made[i];
    else
      table.at = reinterpret_cast<const char*>(made);
  } else if constexpr (kIsShared) {
    for (int h = 0; h < kHeads; ++h) {
      const float* const lut = a.lut + (first + h) * entries;
      for (int j = 0; j < subspaces; ++j)
        for (int c = threadIdx.x; c < static_cast<int>(stride); c += kScoreThreads)
          reinterpret_cast<float*>(shared + h * table.bytes)[j * stride + c] =
              h < heads && c < a.words ? lut[j * a.words + c] : 0;
    }
  } else {
    table = {reinterpret_cast<const char*>(a.lut + first * entries), static_cast<int>(entries * 4),
             static_cast<int>(a.words * 4), static_cast<int>(a.words) - 1};
  }
  auto* const bins = reinterpret_cast<uint32_t*>(shared + (kIsShared ? (kIsByte ? 1 : kHeads) * table.bytes : 0));
  if constexpr (kIsRanked)
    for (int i = threadIdx.x; i < heads * kBins; i += kScoreThreads) bins[i] = 0;
  float step[kHeads], base[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    step[h] = kIsByte && !kIsRanked && h < heads ? p.lines[(first + h) * 2] : 0;
    base[h] = kIsByte && !kIsRanked && h < heads ? p.lines[(first + h) * 2 + 1] : 0;
  }
  gpu::sync_block();

  const int64_t key_bytes = p.key_bytes();
  const char* const codes =
      static_cast<const char*>(a.code) +
      (batch * a.code_stride[0] + row % p.key_heads() * a.code_stride[1]) * (kCodes == Codes::i16 ? 2 : 1);
  const auto finish = [&](int64_t key, const Sums& sums) {
    if (key >= end) return;
    const bool is_in = key >= from && key < to;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads) continue;
      if constexpr (!kIsRanked) {
        a.out[(first + h) * a.keys + key] = is_in ? sums.score(h, step[h], base[h]) : -INFINITY;
      } else {
        const uint32_t rank = is_in ? sums.rank(h) : 0;
        const int64_t at = (first + h) * p.rank_stride + key;
        if constexpr (kIsByte)
          static_cast<uint16_t*>(p.ranks)[at] = static_cast<uint16_t>(rank);
        else
          static_cast<uint32_t*>(p.ranks)[at] = rank;
        if (is_in) gpu::atomic_add(&bins[h * kBins + (rank >> p.shift)], 1u);
      }
    }
  };
  // Of two neighbours in the middle, whose ranks are bins.
  const auto finish_pair = [&](int64_t key, const ByteSums& one, const ByteSums& two) {
    uint16_t* const ranks = static_cast<uint16_t*>(p.ranks) + first * p.rank_stride + key;
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (h >= heads) continue;
      *reinterpret_cast<uint32_t*>(ranks + h * p.rank_stride) =
          gpu::permute_bytes(one.pair(h), two.pair(h), h / 2 ? 0x7632 : 0x5410);
      gpu::atomic_add(&bins[h * kBins + one.sum(h)], 1u);
      gpu::atomic_add(&bins[h * kBins + two.sum(h)], 1u);
    }
  };
#pragma unroll 1
  for (int64_t at = begin; at < end; at += kStepKeys) {
    if constexpr (kLoad == Load::pair) {
      constexpr int kPairs = kThreadKeys / 2;
      const bool is_inner = at >= from && at + kStepKeys <= to;
      uint4 loaded[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int64_t key = at + (i * kScoreThreads + threadIdx.x) * 2;
        loaded[i] = {0, 0, 0, 0};
        if (key + 1 >= from && key < to) loaded[i] = gpu::load_once(codes + key * 8);
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const int64_t key = at + (i * kScoreThreads + threadIdx.x) * 2;
        Sums one, two;
        add_piece<kCodes>(one, table, 0, {loaded[i].x, loaded[i].y});
        add_piece<kCodes>(two, table, 0, {loaded[i].z, loaded[i].w});
        if constexpr (kIsRanked && kIsByte)
          if (is_inner) {
            finish_pair(key, one, two);
            continue;
          }
        finish(key, one);
        finish(key + 1, two);
      }
    } else {
#pragma unroll 2
      for (int i = 0; i < kThreadKeys; ++i) {
        const int64_t key = at + i * kScoreThreads + threadIdx.x;
        Sums sums;
        if (key >= from && key < to) {
          const char* const of_key = codes + key * key_bytes;
          if constexpr (kLoad == Load::pieces)
            for (int b = 0; b < static_cast<int>(key_bytes); b += 8)
              add_piece<kCodes>(sums, table,
                                kCodes == Codes::packed4 ? 2 * b
                                : kCodes == Codes::u8    ? b
                                                         : b / 2,
                                *reinterpret_cast<const uint2*>(of_key + b));
          else
            add_each<kCodes>(sums, table, subspaces, of_key);
        }
        finish(key, sums);
      }
    }
  }
  if constexpr (kIsRanked) {
    gpu::sync_block();
    for (int i = threadIdx.x; i < heads * kBins; i += kScoreThreads)
      if (bins[i]) gpu::atomic_add(&p.bins[first * kBins + i], bins[i]);
  }
}

// --- Host side ---

// Takes parts of one block of memory, each aligned to 16 bytes. Of none, it counts what is needed.
struct Scratch {
  char* at;

  template <class T>
  void take(T*& pointer, int64_t count) {
    pointer = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 16);
  }
};

inline void take_tables(ScoreArgs& p, Scratch& scratch) {
  const int64_t tables = p.a.int8_table ? p.a.batch * p.key_heads() * p.head_tiles() : 0;
  scratch.take(p.tables, tables * p.a.subspaces * p.stride());
  scratch.take(p.lines, p.a.int8_table ? p.a.batch * p.a.heads * 2 : 0);
}

inline gpu::Error launch_tables(const ScoreArgs& p, gpu::Stream stream) {
  return gpu::launch(table_kernel, dim3(static_cast<unsigned>(p.a.batch * p.key_heads() * p.head_tiles())),
                     kTableThreads, 0, stream, p);
}

template <Codes kCodes, class Sums, Load kLoad, bool kIsShared>
gpu::Error launch_score_of(const ScoreArgs& p, int64_t bytes, gpu::Stream stream) {
  const int64_t blocks = p.a.batch * p.key_heads() * ceil_div(p.a.group, Sums::kHeads) * ceil_div(p.a.keys, p.chunk);
  return gpu::launch(p.a.out ? score_kernel<kCodes, Sums, kLoad, kIsShared, false>
                             : score_kernel<kCodes, Sums, kLoad, kIsShared, true>,
                     dim3(static_cast<unsigned>(blocks)), kScoreThreads, static_cast<int>(bytes), stream, p);
}

template <Codes kCodes>
gpu::Error launch_score_codes(const ScoreArgs& p, gpu::Stream stream) {
  const Score& a = p.a;
  const int64_t key_bytes = p.key_bytes();
  const auto is_aligned = [&](int64_t unit) {
    const int64_t size = kCodes == Codes::i16 ? 2 : 1;
    return reinterpret_cast<uintptr_t>(a.code) % unit == 0 && a.code_stride[0] * size % unit == 0 &&
           a.code_stride[1] * size % unit == 0;
  };
  const bool pieces = key_bytes % 8 == 0 && is_aligned(8);
  // Bytes of shared memory with so many tables there, and histograms of so many heads.
  const auto bytes = [&](int64_t tables, int64_t heads) {
    return tables * a.subspaces * p.stride() * 4 + (a.out ? 0 : min_of(heads, a.group) * kBins * 4);
  };
  if (a.int8_table) {
    const int64_t all = bytes(1, kScoreHeads);
    if (all > kMostShared)
      return launch_score_of<kCodes, ByteSums, Load::each, false>(p, bytes(0, kScoreHeads), stream);
    if (key_bytes == 8 && is_aligned(16) && a.keys % 2 == 0)
      return launch_score_of<kCodes, ByteSums, Load::pair, true>(p, all, stream);
    if (pieces) return launch_score_of<kCodes, ByteSums, Load::pieces, true>(p, all, stream);
    return launch_score_of<kCodes, ByteSums, Load::each, true>(p, all, stream);
  }
  if (const int64_t all = bytes(kScoreHeads, kScoreHeads); a.group > 1 && all <= kMostShared) {
    if (pieces) return launch_score_of<kCodes, FloatSums<kScoreHeads>, Load::pieces, true>(p, all, stream);
    return launch_score_of<kCodes, FloatSums<kScoreHeads>, Load::each, true>(p, all, stream);
  }
  const int64_t all = bytes(1, 1);
  if (all > kMostShared) return launch_score_of<kCodes, FloatSums<1>, Load::each, false>(p, bytes(0, 1), stream);
  if (pieces) return launch_score_of<kCodes, FloatSums<1>, Load::pieces, true>(p, all, stream);
  return launch_score_of<kCodes, FloatSums<1>, Load::each, true>(p, all, stream);
}

// Keys of a block, such that all blocks run at once, if they aren't very few keys then.
inline int64_t score_chunk(const Score& a, int num_sms) {
  const int64_t rows = a.batch * (a.heads / a.group) * ceil_div(a.group, kScoreHeads), blocks = 3 * int64_t{num_sms};
  const int64_t keys = ceil_div(a.keys, max_of(1, blocks / max_of(1, rows)));
  return max_of(round_up(keys, kStepKeys), 2 * kStepKeys);
}

// Without tables, which launch_tables() has made.
inline gpu::Error launch_score(const ScoreArgs& p, gpu::Stream stream) {
  if (p.a.subspaces * p.stride() > INT32_MAX / 4) return "a table has more than 2^31 bytes";
  switch (p.a.codes) {
    case Codes::packed4: return launch_score_codes<Codes::packed4>(p, stream);
    case Codes::u8: return launch_score_codes<Codes::u8>(p, stream);
    default: return launch_score_codes<Codes::i16>(p, stream);
  }
}

// Sets the fields of p that follow from others for vq_score, and places scratch, aligned to 16 bytes; its size comes
// back.
inline int64_t place_scores(ScoreArgs& p, void* memory, int num_sms) {
  Scratch scratch{static_cast<char*>(memory)};
  take_tables(p, scratch);
  p.bins = nullptr;
  p.chunk = score_chunk(p.a, num_sms);
  return scratch.at - static_cast<char*>(memory);
}

// vq_score. p has been placed.
inline gpu::Error launch_scores(const ScoreArgs& p, gpu::Stream stream) {
  if (p.a.batch == 0 || p.a.keys == 0) return nullptr;
  if (p.a.int8_table)
    if (gpu::Error e = launch_tables(p, stream)) return e;
  return launch_score(p, stream);
}

}  // namespace effk::vq
