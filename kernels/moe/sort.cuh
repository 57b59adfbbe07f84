// moe_sort on CUDA: a stable counting sort, in one launch up to kChunk pairs and in three beyond.
//
// Pairs are taken in chunks. 1. A block counts what a chunk has of each expert. 2. One block makes of the counts where
// each chunk's begin. 3. A block gives the pairs of a chunk their places: each of its warps has a part of them and goes
// through it in order, 32 at a time, votes telling who has the same expert. No result depends on an order of threads.
//
// Experts are sorted by up to 2^kDigitBits at once, more of them digit by digit, lowest first; then the offsets come
// from searching the sorted pairs. Pairs of no expert have the number of experts for a key, the highest.
#pragma once

#include "load.cuh"

namespace effk::moe {

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / gpu::kWarp;
constexpr int kWarpPairs = 256, kChunk = kWarpPairs * kSortWarps;
constexpr int kDigitBits = 10, kMostBins = 1 << kDigitBits;
constexpr int kScanThreads = 1024;

struct SortArgs {
  Indices ids;  // [pairs]
  int64_t pairs, experts;
  int64_t* perm;
  int64_t* inverse;
  int32_t* offsets;  // [experts]

  EFFK_HD int64_t chunks() const { return max_of(1, ceil_div(pairs, kChunk)); }
};

// One digit.
struct SortPass {
  SortArgs a;
  int shift, bits, bins;
  const int64_t* from;  // pairs in order of the digits before, or null: as they come
  int64_t* to;
  bool is_last;
  int32_t* counts;  // [bins, chunks]
  int32_t* starts;  // [bins]

  // Whether offsets come from the counts.
  EFFK_HD bool is_only() const { return !from && is_last; }

  EFFK_DEVICE int64_t pair(int64_t i) const { return from ? from[i] : i; }
  EFFK_DEVICE uint32_t bin(int64_t pair) const;
};

EFFK_DEVICE int64_t sort_key(const SortArgs& a, int64_t pair) {
  const int64_t id = index_at(a.ids, pair);
  return id >= 0 && id < a.experts ? id : a.experts;
}
EFFK_DEVICE uint32_t SortPass::bin(int64_t pair) const {
  return static_cast<uint32_t>(sort_key(a, pair) >> shift) & ((1u << bits) - 1);
}

// By one warp: numbers become the sums of those before them, plus `sum`.
EFFK_DEVICE void scan_by_warp(int32_t* numbers, int64_t count, uint32_t sum) {
  const int lane = threadIdx.x % gpu::kWarp;
  for (int64_t i = lane; i - lane < count; i += gpu::kWarp) {
    const uint32_t own = i < count ? static_cast<uint32_t>(numbers[i]) : 0;
    uint32_t upto = own;
#pragma unroll
    for (int by = 1; by < gpu::kWarp; by *= 2) {
      const uint32_t before = gpu::shuffle_up(upto, by);
      if (lane >= by) upto += before;
    }
    if (i < count) numbers[i] = static_cast<int32_t>(sum + upto - own);
    sum += gpu::shuffle(upto, gpu::kWarp - 1);
  }
}

EFFK_KERNEL(kSortThreads, 4) sort_count_kernel(SortPass p) {
  EFFK_SHARED(int32_t[kMostBins], counts);
  const int64_t begin = int64_t{blockIdx.x} * kChunk, end = min_of(begin + kChunk, p.a.pairs);
  for (int i = threadIdx.x; i < p.bins; i += kSortThreads) counts[i] = 0;
  gpu::sync_block();
  for (int64_t i = begin + threadIdx.x; i < end; i += kSortThreads) gpu::atomic_add(&counts[p.bin(p.pair(i))], 1);
  gpu::sync_block();
  for (int i = threadIdx.x; i < p.bins; i += kSortThreads) p.counts[i * p.a.chunks() + blockIdx.x] = counts[i];
}

// Where each bin begins, in `starts`, and where each chunk's part of it does, counted from there, in `counts`.
EFFK_KERNEL(kScanThreads, 1) sort_scan_kernel(SortPass p) {
  EFFK_SHARED(int32_t[kMostBins], totals);
  const int64_t chunks = p.a.chunks();
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  for (int i = warp; i < p.bins; i += kScanThreads / gpu::kWarp) {
    int32_t* const counts = p.counts + i * chunks;
    const int32_t last = counts[chunks - 1];  // read before it is written
    gpu::sync_warp();
    scan_by_warp(counts, chunks, 0);
    gpu::sync_warp();
    if (lane == 0) totals[i] = counts[chunks - 1] + last;
  }
  gpu::sync_block();
  if (warp == 0) scan_by_warp(totals, p.bins, 0);
  gpu::sync_block();
  for (int i = threadIdx.x; i < p.bins; i += kScanThreads) {
    p.starts[i] = totals[i];
    if (p.is_only() && i > 0) p.a.offsets[i - 1] = totals[i];
  }
}

// In shared memory: of each bin where it begins, and of each warp how many pairs of it come before those of the warp.
EFFK_HD constexpr int sort_place_bytes(int bins) { return (1 + kSortWarps) * bins * 4; }

EFFK_KERNEL(kSortThreads, 4) sort_place_kernel(SortPass p) {
  auto* const starts = reinterpret_cast<int32_t*>(gpu::shared_memory());
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const auto of_warp = [&](int w) { return starts + (1 + w) * p.bins; };
  const int64_t chunks = p.a.chunks(), begin = int64_t{blockIdx.x} * kChunk + warp * kWarpPairs;
  const int64_t end = min_of(begin + kWarpPairs, p.a.pairs);

  for (int i = threadIdx.x; i < kSortWarps * p.bins; i += kSortThreads) of_warp(0)[i] = 0;
  gpu::sync_block();
  for (int64_t i = begin + lane; i < end; i += gpu::kWarp) gpu::atomic_add(&of_warp(warp)[p.bin(p.pair(i))], 1);
  gpu::sync_block();
  for (int i = threadIdx.x; i < p.bins; i += kSortThreads) {
    int32_t sum = 0;
#pragma unroll
    for (int w = 0; w < kSortWarps; ++w) {
      const int32_t count = of_warp(w)[i];
      of_warp(w)[i] = sum;
      sum += count;
    }
    starts[i] = chunks == 1 ? sum : p.starts[i] + p.counts[i * chunks + blockIdx.x];
  }
  gpu::sync_block();
  if (chunks == 1) {
    if (warp == 0) scan_by_warp(starts, p.bins, 0);
    gpu::sync_block();
    if (p.is_only())
      for (int i = 1 + threadIdx.x; i < p.bins; i += kSortThreads) p.a.offsets[i - 1] = starts[i];
  }

  for (int64_t i = begin + lane; i - lane < end; i += gpu::kWarp) {
    const bool is_there = i < end;
    const int64_t pair = is_there ? p.pair(i) : 0;
    const uint32_t bin = is_there ? p.bin(pair) : 0;
    uint32_t same = gpu::vote(is_there);
    for (int b = 0; b < p.bits; ++b) {
      const uint32_t ones = gpu::vote(bin >> b & 1);
      same &= bin >> b & 1 ? ones : ~ones;
    }
    int32_t* const before = &of_warp(warp)[bin];
    const uint32_t lower = gpu::popcount(same & ((1u << lane) - 1));
    int64_t place = 0;
    if (is_there) place = int64_t{starts[bin]} + *before + lower;
    gpu::sync_warp();
    if (is_there && lower == 0) *before += static_cast<int32_t>(gpu::popcount(same));
    gpu::sync_warp();
    if (!is_there) continue;
    p.to[place] = pair;
    if (p.is_last) p.a.inverse[pair] = place;
  }
}

// Of each expert: how many pairs have it or one before it.
EFFK_KERNEL(kSortThreads, 4) sort_offsets_kernel(SortArgs a) {
  const int64_t step = int64_t{gridDim.x} * kSortThreads;
  for (int64_t e = int64_t{blockIdx.x} * kSortThreads + threadIdx.x; e < a.experts; e += step) {
    int64_t low = 0, high = a.pairs;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (sort_key(a, a.perm[middle]) <= e)
        low = middle + 1;
      else
        high = middle;
    }
    a.offsets[e] = static_cast<int32_t>(low);
  }
}

// --- Host side ---

inline int key_bits(int64_t experts) {
  int bits = 1;
  while (experts >> bits) ++bits;
  return bits;
}

struct SortScratch {
  int32_t *counts, *starts;
  int64_t* order;  // between digits
};

// The layout of one block of memory, aligned to 16 bytes; its size comes back.
inline int64_t place_sort(int64_t pairs, int64_t experts, void* memory, SortScratch* out) {
  auto* at = static_cast<char*>(memory);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 16) * 16;
  };
  const int64_t bins = min_of(experts + 1, kMostBins), chunks = ceil_div(pairs, kChunk);
  take(out->counts, chunks > 1 ? bins * chunks : 0);
  take(out->starts, chunks > 1 ? bins : 0);
  take(out->order, key_bits(experts) > kDigitBits ? pairs : 0);
  return at - static_cast<char*>(memory);
}

// scratch has place_sort() bytes. Fewer than 2^31 pairs.
inline gpu::Error launch_sort(const SortArgs& a, void* scratch, gpu::Stream stream) {
  SortScratch s;
  place_sort(a.pairs, a.experts, scratch, &s);
  const int all_bits = key_bits(a.experts), passes = static_cast<int>(ceil_div(all_bits, kDigitBits));
  const dim3 grid(static_cast<unsigned>(a.chunks()));
  const int64_t* from = nullptr;
  for (int i = 0; i < passes; ++i) {
    const int bits = static_cast<int>(min_of(all_bits - i * kDigitBits, kDigitBits));
    const int bins = passes == 1 ? static_cast<int>(a.experts) + 1 : 1 << bits;
    int64_t* const to = (passes - 1 - i) % 2 == 0 ? a.perm : s.order;
    const SortPass p{a, i * kDigitBits, bits, bins, from, to, i == passes - 1, s.counts, s.starts};
    if (a.chunks() > 1) {
      if (gpu::Error e = gpu::launch(sort_count_kernel, grid, kSortThreads, 0, stream, p)) return e;
      if (gpu::Error e = gpu::launch(sort_scan_kernel, dim3(1), kScanThreads, 0, stream, p)) return e;
    }
    if (gpu::Error e = gpu::launch(sort_place_kernel, grid, kSortThreads, sort_place_bytes(bins), stream, p)) return e;
    from = to;
  }
  if (passes == 1) return nullptr;
  const int64_t blocks = min_of(ceil_div(a.experts, kSortThreads), 4096);
  return gpu::launch(sort_offsets_kernel, dim3(static_cast<unsigned>(blocks)), kSortThreads, 0, stream, a);
}

}  // namespace effk::moe
