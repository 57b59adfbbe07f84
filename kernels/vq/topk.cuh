// vq_topk on CUDA, without sorting. Scores become numbers of 16 or 32 bits (score.cuh), and a histogram of their upper
// bits tells which bin the k-th one is in; of 32 bits two more rounds tell the rest. Then each head knows the rank of
// its k-th key, and how many of the keys of just that rank it takes. Two bits a key say who is above it and who is
// equal; from them one block a list takes equals by position, joins heads and writes the list. Histograms are sums of
// integers and everything else has an order: the same bits from run to run.
#pragma once

#include "score.cuh"

namespace effk::vq {

constexpr int kSelectThreads = 256, kMarkThreads = 256, kListThreads = 512;

struct TopKArgs {
  ScoreArgs s;
  int64_t k;
  bool union_group;
  int64_t cap;
  int64_t* idx;
  int64_t* count;

  uint32_t* more_bins;  // like s.bins, for the next round
  uint32_t* chosen;     // of each head 2: the bits of the k-th rank that are known, and how many of such a rank to take
  uint32_t *above, *equal;  // [B, H, words()], a bit a key
  uint32_t* taken;          // [B, lists, words()]

  int shift;         // of this round: how many bits of a rank are unknown after it
  int shift_before;  // before it

  EFFK_HD int64_t lists() const { return union_group ? s.key_heads() : s.a.heads; }
  EFFK_HD int64_t words() const { return s.rank_stride / kRowUnit; }
  EFFK_HD bool is_first() const { return shift == s.shift; }
};

EFFK_DEVICE uint32_t rank_at(const ScoreArgs& s, int64_t i) {
  return s.a.int8_table ? static_cast<const uint16_t*>(s.ranks)[i] : static_cast<const uint32_t*>(s.ranks)[i];
}

// By a block a head: which bin has the k-th rank. Clears the bins of the next round.
EFFK_KERNEL(kSelectThreads, 2) select_kernel(EFFK_GRID_CONSTANT(TopKArgs) p) {
  constexpr int kOwn = kBins / kSelectThreads;
  EFFK_SHARED(uint32_t[kSelectThreads / gpu::kWarp], sums);
  const int64_t head = blockIdx.x;
  const Middle middle = middle_of(p.s, head / p.s.a.heads);
  const bool is_first = p.is_first();
  uint32_t* const chosen = p.chosen + 2 * head;
  const uint32_t known = is_first ? 0 : chosen[0];
  const int64_t most = middle.end - middle.begin;
  const uint32_t wanted = is_first ? static_cast<uint32_t>(min_of(p.k, most)) : chosen[1];
  // From the highest bin on.
  const uint32_t* const bins = (is_first ? p.s.bins : p.more_bins) + head * kBins + (kBins - kOwn * (threadIdx.x + 1));
  uint32_t own[kOwn], sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    own[i] = bins[i];
    sum += own[i];
  }
  uint32_t total;
  uint32_t before = scan_block(sum, sums, total);
  gpu::sync_block();  // everybody has read what is written below
  if (!is_first && p.shift > 0)
    for (int i = threadIdx.x; i < kBins; i += kSelectThreads) p.more_bins[head * kBins + i] = 0;
  if (wanted == 0) {  // nothing is above the highest rank
    if (threadIdx.x == 0) chosen[0] = ~0u >> p.shift, chosen[1] = 0;
    return;
  }
  if (before >= wanted || before + sum < wanted) return;
#pragma unroll
  for (int i = kOwn - 1; i >= 0; --i) {
    if (before < wanted && before + own[i] >= wanted) {
      const int bin = kBins - kOwn * (static_cast<int>(threadIdx.x) + 1) + i;
      chosen[0] = (is_first ? 0 : known << (p.shift_before - p.shift)) | static_cast<uint32_t>(bin);
      chosen[1] = wanted - before;
    }
    before += own[i];
  }
}

// Of ranks whose upper bits are those of the k-th one: how many have which bits after them.
EFFK_KERNEL(kMarkThreads, 4) refine_kernel(EFFK_GRID_CONSTANT(TopKArgs) p) {
  EFFK_SHARED(uint32_t[kBins], bins);
  const int64_t chunks = ceil_div(p.s.a.keys, p.s.chunk), head = blockIdx.x / chunks;
  const Middle middle = middle_of(p.s, head / p.s.a.heads);
  const int64_t chunk = blockIdx.x % chunks * p.s.chunk;
  const int64_t begin = max_of(chunk, middle.begin), end = min_of(chunk + p.s.chunk, middle.end);
  if (begin >= end) return;
  for (int i = threadIdx.x; i < kBins; i += kMarkThreads) bins[i] = 0;
  gpu::sync_block();
  const uint32_t known = p.chosen[2 * head], mask = (1u << (p.shift_before - p.shift)) - 1;
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kMarkThreads) {
    const uint32_t rank = rank_at(p.s, head * p.s.rank_stride + i);
    if (rank >> p.shift_before == known) gpu::atomic_add(&bins[rank >> p.shift & mask], 1u);
  }
  gpu::sync_block();
  for (int i = threadIdx.x; i < kBins; i += kMarkThreads)
    if (bins[i]) gpu::atomic_add(&p.more_bins[head * kBins + i], bins[i]);
}

// 8 keys a thread: who is above the k-th rank, and who is equal.
template <class Rank>
EFFK_KERNEL(kMarkThreads, 4)
mark_kernel(EFFK_GRID_CONSTANT(TopKArgs) p) {
  constexpr int kKeys = 8, kPieces = kKeys * sizeof(Rank) / 16;
  const int64_t units = p.s.rank_stride / kKeys, all = p.s.a.batch * p.s.a.heads * units;
  const int64_t step = int64_t{gridDim.x} * kMarkThreads;
  // From the end, which was written last and may still be in the cache.
  for (int64_t i = all - 1 - int64_t{blockIdx.x} * kMarkThreads - threadIdx.x; i >= 0; i -= step) {
    const int64_t head = i / units, first = i % units * kKeys;
    const Middle middle = middle_of(p.s, head / p.s.a.heads);
    uint32_t above = 0, equal = 0;
    if (first < middle.end && first + kKeys > middle.begin) {
      const Rank* const ranks = static_cast<const Rank*>(p.s.ranks) + head * p.s.rank_stride + first;
      uint32_t word[4 * kPieces];
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        const uint4 u = gpu::load_once(ranks + j * (kKeys / kPieces));
        word[4 * j] = u.x, word[4 * j + 1] = u.y, word[4 * j + 2] = u.z, word[4 * j + 3] = u.w;
      }
      const uint32_t kth = p.chosen[2 * head];
#pragma unroll
      for (int j = 0; j < kKeys; ++j) {
        uint32_t rank;
        if constexpr (sizeof(Rank) == 4)
          rank = word[j];
        else
          rank = word[j / 2] >> j % 2 * 16 & 0xffff;
        if (first + j < middle.begin || first + j >= middle.end) continue;
        above |= (rank > kth ? 1u : 0u) << j;
        equal |= (rank == kth ? 1u : 0u) << j;
      }
    }
    reinterpret_cast<uint8_t*>(p.above)[i] = static_cast<uint8_t>(above);
    reinterpret_cast<uint8_t*>(p.equal)[i] = static_cast<uint8_t>(equal);
  }
}

// The lowest `count` ones of a word.
EFFK_DEVICE uint32_t lowest_ones(uint32_t word, uint32_t count) {
  if (gpu::popcount(word) <= count) return word;
  uint32_t left = word;
  for (; count > 0; --count) left &= left - 1;
  return word & ~left;
}

// Ones at [begin, end) of the keys of a word that begins at `first`.
EFFK_DEVICE uint32_t ones_of(int64_t begin, int64_t end, int64_t first) {
  const auto up_to = [&](int64_t key) {
    const int64_t n = key - first;
    return n <= 0 ? 0 : n >= 32 ? ~0u : (1u << n) - 1;
  };
  return up_to(end) & ~up_to(begin);
}

// By a block a list. A thread has some of the words, which follow each other.
EFFK_KERNEL(kListThreads, 1) list_kernel(EFFK_GRID_CONSTANT(TopKArgs) p) {
  EFFK_SHARED(uint32_t[kListThreads / gpu::kWarp], sums);
  const int64_t lists = p.lists(), heads = p.s.a.heads / lists, list = blockIdx.x, batch = list / lists;
  const int64_t first_head = batch * p.s.a.heads + list % lists * heads;
  const Middle middle = middle_of(p.s, batch);
  const int64_t words = p.words(), own = ceil_div(words, kListThreads);
  const int64_t begin = min_of(words, threadIdx.x * own), end = min_of(words, begin + own);
  uint32_t* const taken = p.taken + list * words;
  uint32_t count = 0, total;
  for (int64_t h = 0; h < heads && words > 0; ++h) {
    const uint32_t* const above = p.above + (first_head + h) * words;
    const uint32_t* const equal = p.equal + (first_head + h) * words;
    uint32_t equals = 0;
    for (int64_t i = begin; i < end; ++i) equals += gpu::popcount(equal[i]);
    const uint32_t before = scan_block(equals, sums, total);
    const uint32_t wanted = p.chosen[2 * (first_head + h) + 1];
    uint32_t left = wanted > before ? wanted - before : 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t some = lowest_ones(equal[i], left);
      left -= gpu::popcount(some);
      const uint32_t others =
          h == 0 ? ones_of(0, middle.begin, i * 32) | ones_of(middle.end, middle.length, i * 32) : taken[i];
      const uint32_t all = others | above[i] | some;
      taken[i] = all;
      if (h == heads - 1) count += gpu::popcount(all);
    }
  }
  int64_t at = scan_block(count, sums, total);
  int64_t* const idx = p.idx + list * p.cap;
  for (int64_t i = begin; i < end; ++i)
    for (uint32_t left = taken[i]; left; left &= left - 1, ++at)
      if (at < p.cap) idx[at] = i * 32 + gpu::popcount((left & -left) - 1);
  for (int64_t i = total + threadIdx.x; i < p.cap; i += kListThreads) idx[i] = -1;
  if (threadIdx.x == 0) p.count[list] = min_of(total, p.cap);
}

// --- Host side ---

// Sets the fields of p that follow from others, and places scratch, aligned to 16 bytes; its size comes back.
inline int64_t place_topk(TopKArgs& p, void* memory, int num_sms) {
  ScoreArgs& s = p.s;
  Scratch scratch{static_cast<char*>(memory)};
  int bits = 32;
  if (s.a.int8_table)
    for (bits = 0; 255 * s.a.subspaces >> bits; ++bits) {
    }
  s.shift = bits > kBinBits ? bits - kBinBits : 0;
  s.chunk = score_chunk(s.a, num_sms);
  s.rank_stride = round_up(s.a.keys, kRowUnit);
  const int64_t heads = s.a.batch * s.a.heads, rows = heads * p.words();
  char* ranks;
  take_tables(s, scratch);
  scratch.take(s.bins, heads * kBins);
  scratch.take(p.more_bins, s.shift ? heads * kBins : 0);
  scratch.take(p.chosen, heads * 2);
  scratch.take(ranks, heads * s.rank_stride * (s.a.int8_table ? 2 : 4));
  scratch.take(p.above, rows);
  scratch.take(p.equal, rows);
  scratch.take(p.taken, s.a.batch * p.lists() * p.words());
  s.ranks = ranks;
  return scratch.at - static_cast<char*>(memory);
}

// p has been placed.
inline gpu::Error launch_topk(TopKArgs p, gpu::Stream stream) {
  const int64_t heads = p.s.a.batch * p.s.a.heads;
  if (heads == 0) return nullptr;
  if (p.s.a.keys > 0) {
    const dim3 of_heads(static_cast<unsigned>(heads));
    if (p.s.shift)
      if (gpu::Error e = gpu::zero(p.more_bins, heads * kBins * 4, stream)) return e;
    if (gpu::Error e = launch_tables(p.s, stream)) return e;
    if (gpu::Error e = launch_score(p.s, stream)) return e;
    p.shift = p.s.shift;
    p.shift_before = 32;
    if (gpu::Error e = gpu::launch(select_kernel, of_heads, kSelectThreads, 0, stream, p)) return e;
    while (p.shift > 0) {
      p.shift_before = p.shift;
      p.shift = p.shift > kBinBits ? p.shift - kBinBits : 0;
      const dim3 blocks(static_cast<unsigned>(heads * ceil_div(p.s.a.keys, p.s.chunk)));
      if (gpu::Error e = gpu::launch(refine_kernel, blocks, kMarkThreads, 0, stream, p)) return e;
      if (gpu::Error e = gpu::launch(select_kernel, of_heads, kSelectThreads, 0, stream, p)) return e;
    }
    const int64_t marks = ceil_div(heads * p.s.rank_stride / 8, kMarkThreads);
    const dim3 blocks(static_cast<unsigned>(min_of(marks, 1 << 20)));
    if (gpu::Error e = gpu::launch(p.s.a.int8_table ? mark_kernel<uint16_t> : mark_kernel<uint32_t>, blocks,
                                   kMarkThreads, 0, stream, p))
      return e;
  }
  return gpu::launch(list_kernel, dim3(static_cast<unsigned>(p.s.a.batch * p.lists())), kListThreads, 0, stream, p);
}

}  // namespace effk::vq
