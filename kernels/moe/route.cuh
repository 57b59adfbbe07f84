// moe_route on CUDA: a warp takes a token.
//
// It looks for the best expert k times. No list of those that were taken is needed: the next one is the best of those
// that come after the last one. For up to kCached experts a lane keeps the keys of its own in registers, otherwise they
// are made anew each time.
#pragma once

#include "load.cuh"

namespace effk::moe {

constexpr int kRouteThreads = 128, kRouteWarps = kRouteThreads / gpu::kWarp;
constexpr int kLaneKeys = 16, kCached = kLaneKeys * gpu::kWarp;

// A number that ascends with the key: -0 is 0, and NaN is above all.
EFFK_DEVICE uint32_t rank_of(float key) {
  if (key != key) return ~0u;
  const uint32_t bits = key == 0 ? 0 : bits_of(key);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}

struct Candidate {
  uint32_t rank;
  int32_t expert;  // -1: none
};

EFFK_DEVICE bool comes_before(const Candidate& a, const Candidate& b) {
  if (b.expert < 0) return a.expert >= 0;
  return a.expert >= 0 && (a.rank > b.rank || (a.rank == b.rank && a.expert < b.expert));
}

class TokenScores {
 public:
  EFFK_DEVICE TokenScores(const Route& p, int64_t token) : p_(p), from_(token * p.stride) {
    if (p.score != Score::softmax) return;
    const int lane = threadIdx.x % gpu::kWarp;
    float most = -INFINITY;
    for (int64_t e = lane; e < p.experts; e += gpu::kWarp) most = larger(logit(e), most);
#pragma unroll
    for (int by = 1; by < gpu::kWarp; by *= 2) most = larger(gpu::shuffle_xor(most, by), most);
    float sum = 0;
    for (int64_t e = lane; e < p.experts; e += gpu::kWarp) sum += expf(logit(e) - most);
#pragma unroll
    for (int by = 1; by < gpu::kWarp; by *= 2) sum += gpu::shuffle_xor(sum, by);
    most_ = most;
    sum_ = sum;
  }

  EFFK_DEVICE float score(int64_t expert) const {
    const float v = logit(expert);
    return p_.score == Score::softmax ? expf(v - most_) / sum_ : 1 / (1 + expf(-v));
  }
  // Both scores rise with the logit: without a bias it decides, and no rounding makes equals of what differs.
  EFFK_DEVICE uint32_t rank(int64_t expert) const {
    return rank_of(p_.bias ? score(expert) + p_.bias[expert] : logit(expert));
  }

 private:
  EFFK_DEVICE static float larger(float a, float b) { return a > b || a != a ? a : b; }
  EFFK_DEVICE float logit(int64_t expert) const {
    const int64_t at = from_ + expert;
    switch (p_.type) {
      case Type::f32: return static_cast<const float*>(p_.logits)[at];
      case Type::f16: return to_float(static_cast<const Half*>(p_.logits)[at]);
      default: return to_float(static_cast<const BFloat16*>(p_.logits)[at]);
    }
  }

  const Route& p_;
  int64_t from_;
  float most_ = 0, sum_ = 1;
};

template <bool kIsCached>
EFFK_KERNEL(kRouteThreads, 4)
route_kernel(EFFK_GRID_CONSTANT(Route) p) {
  const int lane = threadIdx.x % gpu::kWarp, experts = static_cast<int>(p.experts);
  const int64_t step = int64_t{gridDim.x} * kRouteWarps;
  for (int64_t token = int64_t{blockIdx.x} * kRouteWarps + threadIdx.x / gpu::kWarp; token < p.tokens; token += step) {
    const TokenScores scores(p, token);
    uint32_t ranks[kIsCached ? kLaneKeys : 1] = {};
    if constexpr (kIsCached)
#pragma unroll
      for (int i = 0; i < kLaneKeys; ++i)
        if (i * gpu::kWarp + lane < experts) ranks[i] = scores.rank(i * gpu::kWarp + lane);
    Candidate last{0, -1};
    float total = 0;
    for (int j = 0; j < static_cast<int>(p.k); ++j) {
      Candidate best{0, -1};
      const auto consider = [&](int expert, uint32_t rank) {
        const Candidate c{rank, expert};
        if ((last.expert < 0 || comes_before(last, c)) && comes_before(c, best)) best = c;
      };
      if constexpr (kIsCached) {
#pragma unroll
        for (int i = 0; i < kLaneKeys; ++i)
          if (i * gpu::kWarp + lane < experts) consider(i * gpu::kWarp + lane, ranks[i]);
      } else {
        for (int expert = lane; expert < experts; expert += gpu::kWarp) consider(expert, scores.rank(expert));
      }
#pragma unroll
      for (int by = 1; by < gpu::kWarp; by *= 2) {
        const Candidate other{gpu::shuffle(best.rank, lane ^ by),
                              static_cast<int32_t>(gpu::shuffle(static_cast<uint32_t>(best.expert), lane ^ by))};
        if (comes_before(other, best)) best = other;
      }
      last = best;
      const float score = scores.score(best.expert);
      total += score;
      if (lane == j % gpu::kWarp) {
        p.ids[token * p.k + j] = best.expert;
        p.weights[token * p.k + j] = score;
      }
    }
    if (!p.renormalize) continue;
    constexpr float kTiny = 0x1p-126f;
    total = total < kTiny ? kTiny : total;
    for (int j = lane; j < static_cast<int>(p.k); j += gpu::kWarp) p.weights[token * p.k + j] /= total;
  }
}

inline gpu::Error launch_route(const Route& p, int num_sms, gpu::Stream stream) {
  if (p.tokens == 0 || p.k == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(min_of(ceil_div(p.tokens, kRouteWarps), int64_t{num_sms} * 8));
  return gpu::launch(p.experts <= kCached ? route_kernel<true> : route_kernel<false>, dim3(blocks), kRouteThreads, 0,
                     stream, p);
}

}  // namespace effk::moe
