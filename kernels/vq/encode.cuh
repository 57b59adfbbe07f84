// vq_encode on CUDA: a block takes a tile of keys through both products, k L and the dot products with all words, whose
// sums stay in registers until the nearest word is known. All in float32: the products of tensor cores are too coarse
// to tell near words apart. Limited by FMA: with L, D^2 + C D of them a key.
//
// Words are taken in groups of 16 of one sub-vector; the 16 threads of a half-warp have a word of a group each.
#pragma once

#include "load.cuh"

namespace effk::vq {

constexpr int kEncodeThreads = 256, kLanes = 16;    // lanes of a group
constexpr int kGroups = 8, kDepth = 32;             // groups and numbers of a word that are staged at once
constexpr int kStaged = kGroups * kLanes;           // words
constexpr int kStagePitch = kDepth + 4;             // rows that follow each other are in other banks
constexpr int kKeyLanes = kEncodeThreads / kLanes;  // keys that threads have one each of

// The parts of a block's shared memory.
struct EncodeLayout {
  int pitch, sub_pitch, turned_pitch;  // floats: of a key, of a sub-vector of a turned key, of a turned key
  int turned, staged, norms, codes, bytes;

  EFFK_HD EncodeLayout(const Encode& p, int keys) {
    const int dim = static_cast<int>(p.dim), subspaces = static_cast<int>(p.subspaces);
    pitch = (dim + 3) / 4 * 4 + 4;
    sub_pitch = (dim / subspaces + 3) / 4 * 4;
    turned_pitch = subspaces * sub_pitch + 4;
    turned = p.chol ? keys * pitch * 4 : 0;
    staged = turned + keys * turned_pitch * 4;
    norms = staged + kStaged * kStagePitch * 4;
    codes = norms + kStaged * 4;
    bytes = codes + keys * subspaces * 2;
  }
};

// sums[i][n] += a of its key i times word n, `depth` numbers of each; `of_group(n)` is where a begins for group n.
template <int kPer, bool kIsOne, class F>
EFFK_DEVICE void multiply_staged(float (&sums)[kPer][kGroups], const float* a, int pitch, const float* words, int depth,
                                 const F& of_group) {
  const int key = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll 1
  for (int d = 0; d < depth; d += 4) {
    float4 x[kPer];
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      if (n == 0 || !kIsOne)
#pragma unroll
        for (int i = 0; i < kPer; ++i)
          x[i] = *reinterpret_cast<const float4*>(a + (key + i * kKeyLanes) * pitch + of_group(n) + d);
      const float4 w = *reinterpret_cast<const float4*>(words + (n * kLanes + lane) * kStagePitch + d);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        sums[i][n] = fmaf(x[i].x, w.x, sums[i][n]);
        sums[i][n] = fmaf(x[i].y, w.y, sums[i][n]);
        sums[i][n] = fmaf(x[i].z, w.z, sums[i][n]);
        sums[i][n] = fmaf(x[i].w, w.w, sums[i][n]);
      }
    }
  }
}

template <class X, int kPer>
EFFK_KERNEL(kEncodeThreads, kPer > 1 ? 1 : 2)
encode_kernel(EFFK_GRID_CONSTANT(Encode) p) {
  constexpr int kKeys = kPer * kKeyLanes;
  EFFK_SHARED(int[kGroups], begins);
  const EncodeLayout at(p, kKeys);
  const int dim = static_cast<int>(p.dim), subspaces = static_cast<int>(p.subspaces), sub = dim / subspaces;
  const int words = static_cast<int>(p.words);
  const int64_t tiles = ceil_div(p.keys, kKeys), row = blockIdx.x / tiles, head = row % p.heads;
  const int64_t first = blockIdx.x % tiles * kKeys;
  const int count = static_cast<int>(min_of(kKeys, p.keys - first));
  char* const shared = gpu::shared_memory();
  float* const turned = reinterpret_cast<float*>(shared + at.turned);
  float* const staged = reinterpret_cast<float*>(shared + at.staged);
  float* const norms = reinterpret_cast<float*>(shared + at.norms);
  uint16_t* const codes = reinterpret_cast<uint16_t*>(shared + at.codes);
  const int warp = threadIdx.x / gpu::kWarp, lane = threadIdx.x % gpu::kWarp;
  const int key = threadIdx.x / kLanes, word_lane = threadIdx.x % kLanes;
  const auto place = [&](int d) { return at.sub_pitch == sub ? d : d / sub * at.sub_pitch + d % sub; };

  // Turned keys are 0 between their sub-vectors; keys as they come are 0 behind their ends.
  if (p.chol || at.sub_pitch != sub)
    for (int i = threadIdx.x; i < kKeys * at.turned_pitch; i += kEncodeThreads) turned[i] = 0;
  gpu::sync_block();
  const X* const from =
      static_cast<const X*>(p.k) + row / p.heads * p.k_stride[0] + head * p.k_stride[1] + first * p.k_stride[2];
  float* const given = reinterpret_cast<float*>(shared);
  for (int i = warp; i < kKeys; i += kEncodeThreads / gpu::kWarp) {
    const X* const of_key = from + i * p.k_stride[2];
#pragma unroll 4
    for (int d = lane; d < (p.chol ? at.pitch : dim); d += gpu::kWarp) {
      const float v = i < count && d < dim ? to_float(of_key[d]) : 0;
      if (p.chol)
        given[i * at.pitch + d] = v;
      else
        turned[i * at.turned_pitch + place(d)] = v;
    }
  }

  float sums[kPer][kGroups];
  const auto clear = [&] {
#pragma unroll
    for (int i = 0; i < kPer * kGroups; ++i) sums[i / kGroups][i % kGroups] = 0;
  };
  if (p.chol) {
    const float* const chol = p.chol + head * p.dim * p.dim;
#pragma unroll 1
    for (int e0 = 0; e0 < dim; e0 += kStaged) {
      clear();
#pragma unroll 1
      for (int d0 = 0; d0 < dim; d0 += kDepth) {
        gpu::sync_block();
#pragma unroll 1
        for (int i = threadIdx.x; i < kStaged * kDepth; i += kEncodeThreads) {
          const int e = i % kStaged, d = i / kStaged;
          staged[e * kStagePitch + d] = e0 + e < dim && d0 + d < dim ? chol[int64_t{d0 + d} * dim + e0 + e] : 0;
        }
        gpu::sync_block();
        const int depth = dim - d0 < kDepth ? dim - d0 : kDepth;
        multiply_staged<kPer, true>(sums, given, at.pitch, staged, depth, [&](int) { return d0; });
      }
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        const int e = e0 + n * kLanes + word_lane;
        if (e >= dim) continue;
        const int to = place(e);
#pragma unroll
        for (int i = 0; i < kPer; ++i) turned[(key + i * kKeyLanes) * at.turned_pitch + to] = sums[i][n];
      }
    }
  }

  const int groups = (words + kLanes - 1) / kLanes, all_groups = subspaces * groups;
  const float* const codebook = p.codebook + head * p.dim * p.words;
  float best[kPer];
  int code[kPer];
  const auto forget = [&] {
#pragma unroll
    for (int i = 0; i < kPer; ++i) best[i] = INFINITY, code[i] = INT32_MAX;
  };
  forget();
#pragma unroll 1
  for (int g0 = 0; g0 < all_groups; g0 += kGroups) {
    const int j0 = g0 / groups, local = g0 - j0 * groups;  // the first sub-vector, and the group's number in it
    const bool is_one = local + kGroups <= groups;
    clear();
    float norm = 0;
#pragma unroll 1
    for (int d0 = 0; d0 < sub; d0 += kDepth) {
      gpu::sync_block();
      if (threadIdx.x < kGroups) {
        const int j = j0 + (local + static_cast<int>(threadIdx.x)) / groups;
        begins[threadIdx.x] = (j < subspaces ? j : 0) * at.sub_pitch + d0;
      }
#pragma unroll 1
      for (int w = warp; w < kStaged; w += kEncodeThreads / gpu::kWarp) {
        const int group = local + w / kLanes, j = j0 + group / groups, c = group % groups * kLanes + w % kLanes;
        const int d = d0 + lane;
        const bool is_there = j < subspaces && c < words && d < sub;
        staged[w * kStagePitch + lane] = is_there ? codebook[(int64_t{j} * words + c) * sub + d] : 0;
      }
      gpu::sync_block();
      const int depth = sub - d0 < kDepth ? sub - d0 : kDepth;
      if (threadIdx.x < kStaged)
#pragma unroll 4
        for (int d = 0; d < depth; ++d) {
          const float v = staged[threadIdx.x * kStagePitch + d];
          norm = fmaf(v, v, norm);
        }
      if (is_one) {
        const int begin = j0 * at.sub_pitch + d0;
        multiply_staged<kPer, true>(sums, turned, at.turned_pitch, staged, depth, [&](int) { return begin; });
      } else {
        multiply_staged<kPer, false>(sums, turned, at.turned_pitch, staged, depth, [&](int n) { return begins[n]; });
      }
    }
    if (threadIdx.x < kStaged) norms[threadIdx.x] = norm;
    gpu::sync_block();
    int group = local, j = j0;
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      if (j >= subspaces) break;
      if (group >= groups) group -= groups;
      const int c = group * kLanes + word_lane;
      const float square = norms[n * kLanes + word_lane];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const float distance = fmaf(-2, sums[i][n], square);  // less |k L|^2
        if (c < words && distance < best[i]) best[i] = distance, code[i] = c;
      }
      if (++group < groups) continue;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
#pragma unroll
        for (int by = 1; by < kLanes; by *= 2) {
          const float other = gpu::shuffle_xor(best[i], by);
          const int other_code = static_cast<int>(bits_of(gpu::shuffle_xor(float_of(code[i]), by)));
          const bool is_less = other < best[i] || (other == best[i] && other_code < code[i]);
          best[i] = is_less ? other : best[i];
          code[i] = is_less ? other_code : code[i];
        }
        if (word_lane == 0)
          codes[(key + i * kKeyLanes) * subspaces + j] = static_cast<uint16_t>(code[i] == INT32_MAX ? 0 : code[i]);
      }
      forget();
      ++j;
    }
  }

  gpu::sync_block();
  const int64_t begin = (row * p.keys + first) * subspaces;
  const int total = count * subspaces;
  if (p.codes == Codes::packed4) {
    auto* const to = static_cast<uint8_t*>(p.out) + begin / 2;
    for (int i = threadIdx.x; i < total / 2; i += kEncodeThreads)
      to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  } else if (p.codes == Codes::u8) {
    auto* const to = static_cast<uint8_t*>(p.out) + begin;
    for (int i = threadIdx.x; i < total; i += kEncodeThreads) to[i] = static_cast<uint8_t>(codes[i]);
  } else {
    auto* const to = static_cast<uint16_t*>(p.out) + begin;
    for (int i = threadIdx.x; i < total; i += kEncodeThreads) to[i] = codes[i];
  }
}

inline gpu::Error launch_encode(const Encode& p, gpu::Stream stream) {
  const int64_t rows = p.batch * p.heads;
  if (rows == 0 || p.keys == 0) return nullptr;
  constexpr int kShared = 160 << 10;
  const auto launch = [&](auto* kernel, int keys, int bytes) {
    return gpu::launch(kernel, dim3(static_cast<unsigned>(rows * ceil_div(p.keys, keys))), kEncodeThreads, bytes,
                       stream, p);
  };
  return by_type(p.type, [&](auto* x) {
    using X = std::remove_pointer_t<decltype(x)>;
    const gpu::Error too_large = "a key's dimension is more than shared memory holds";
    if (p.dim > 4096) return too_large;
    if (const int bytes = EncodeLayout(p, 64).bytes; bytes <= kShared) return launch(encode_kernel<X, 4>, 64, bytes);
    if (const int bytes = EncodeLayout(p, 16).bytes; bytes <= kShared) return launch(encode_kernel<X, 1>, 16, bytes);
    return too_large;
  });
}

}  // namespace effk::vq
