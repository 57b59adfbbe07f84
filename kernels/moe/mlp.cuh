// moe_mlp on CUDA: sort, the product with gathered rows and the activation, the product with weighted rows, and their
// sum token by token, in four to six launches whose sizes come from shapes alone.
#pragma once

#include "combine.cuh"
#include "gemm.cuh"
#include "sort.cuh"

namespace effk::moe {

struct MlpArgs {
  Operands first, second;  // second without x
  Activation activation;
  int64_t tokens, pairs, experts, inner, rows;  // pairs: of a token
  Indices ids;                                  // [tokens, pairs]
  const float* weights;                         // likewise
  void* y;                                      // [tokens, rows]
  bool adds;                                    // to y, which is float32 then
};

struct MlpMemory {
  int64_t *perm, *inverse;  // [tokens * pairs]
  int32_t* offsets;         // [experts]
  char* h;                  // [tokens * pairs, inner] of x's type
  float* weighted;          // [tokens * pairs, rows]
  char* sort;
};

// The layout of one block of memory, aligned to 16 bytes; its size comes back.
inline int64_t place_mlp(const MlpArgs& p, void* memory, MlpMemory* out) {
  auto* at = static_cast<char*>(memory);
  const auto take = [&](auto*& pointer, int64_t count) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(at);
    at += ceil_div(count * static_cast<int64_t>(sizeof(*pointer)), 16) * 16;
  };
  const int64_t pairs = p.tokens * p.pairs;
  SortScratch scratch;
  take(out->perm, pairs);
  take(out->inverse, pairs);
  take(out->offsets, p.experts);
  take(out->h, pairs * p.inner * type_size(p.first.type));
  take(out->weighted, pairs * p.rows);
  take(out->sort, place_sort(pairs, p.experts, nullptr, &scratch));
  return at - static_cast<char*>(memory);
}

inline int64_t mlp_workspace(const MlpArgs& p) {
  MlpMemory m;
  return place_mlp(p, nullptr, &m);
}

// The workspace has mlp_workspace(p) bytes. Without a gemm each product chooses.
inline gpu::Error launch_mlp(const MlpArgs& p, const Gemm* gemm, void* workspace, int num_sms, gpu::Stream stream) {
  if (p.tokens == 0 || p.rows == 0) return nullptr;
  MlpMemory m;
  place_mlp(p, workspace, &m);
  const int64_t pairs = p.tokens * p.pairs;
  const Indices offsets{m.offsets, false}, perm{m.perm, true};
  const Groups groups{offsets, p.experts, pairs, false};
  if (gpu::Error e = launch_sort({p.ids, pairs, p.experts, m.perm, m.inverse, m.offsets}, m.sort, stream)) return e;

  Product up{};
  up.in = p.first;
  up.x_rows = p.tokens;
  up.gather = perm;
  up.divisor = static_cast<uint32_t>(p.pairs);
  up.groups = groups;
  up.cols = p.inner;
  up.is_gated = is_gated(p.activation);
  up.y = m.h;
  up.activation = p.activation;
  if (gpu::Error e = launch_product<UpKind>(up, choose_tiling(up, gemm, num_sms), num_sms, stream)) return e;

  Product down{};
  down.in = p.second;
  down.in.x = m.h;
  down.in.x_stride = p.inner;
  down.x_rows = pairs;
  down.divisor = 1;
  down.groups = groups;
  down.cols = p.rows;
  down.y = m.weighted;
  down.weight = p.weights;
  down.pair = m.perm;
  if (gpu::Error e = launch_product<DownKind>(down, choose_tiling(down, gemm, num_sms), num_sms, stream)) return e;

  CombineArgs sum{};
  sum.a = {p.adds ? Type::f32 : p.first.type, p.tokens, p.pairs, p.rows, m.weighted, p.rows, nullptr, nullptr, p.y};
  sum.inverse = {m.inverse, true};
  sum.rows = pairs;
  sum.ends = offsets;
  sum.experts = p.experts;
  sum.adds = p.adds;
  return launch_combine_floats(sum, stream);
}

}  // namespace effk::moe
