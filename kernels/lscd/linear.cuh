// lscd_linear on CUDA for few tokens: y = activation(scale * (x W^T) + bias).
//
// What limits it, by count. Bytes: W is read once, which at 16 bits is 1.125, 0.725 and 0.325 bytes a weight at 50, 70
// and 90% sparsity, against 2 of a dense one: at most 1.8, 2.8 and 6.2 times dense. x comes from L1 or L2, 512 bytes a
// token and tile: at 8 tokens and 70% as much as W, but warps of a block that work on different strips share it in L1.
// Instructions: 256 weights take a warp about 55 up to 8 tokens (sm_90's machine code). Shared memory: their loads take
// 20, 12 and 8 cycles of a multiprocessor at 50, 70 and 90% (bank conflicts of random weights, simulated). On an H200
// each of the three takes 6 to 8 us for 4096x8192 weights at 70%, and only other warps make them overlap. Tensor cores
// idle.
#pragma once

#include <cmath>

#include "expand.cuh"

namespace effk::lscd {

// How the work is shared out. A block has `warps` warps: as many strips as fit when `strip_warps` of them share one.
// Strips are cut along their tiles among these warps and among `splits` blocks; sums of the parts are added in a fixed
// order, those of blocks by a second kernel.
struct LinearPlan {
  int pass_tokens;  // of a block
  int passes;
  int warps;
  int strip_warps;
  int splits;
  bool copy_x;  // to a layout of 16-byte pieces first

  int block_strips() const { return warps / strip_warps; }
};

struct XView {
  const void* data;
  int64_t token_stride;
  uint32_t cols;  // a multiple of 8
  int64_t tokens;
};

// A lane's 8 columns of x in a step, for `token` and every `every`-th one after it.
template <class X>
class XLane {
 public:
  EFFK_DEVICE XLane(const XView& x, int64_t token, int every, uint32_t first_col)
      : from_(static_cast<const X*>(x.data) + token * x.token_stride + first_col),
        stride_(x.token_stride * every),
        tokens_(token < x.tokens ? static_cast<int>((x.tokens - token + every - 1) / every) : 0),
        cols_(tokens_ > 0 && x.cols > first_col ? x.cols - first_col : 0) {}

  // 16 bytes of the n-th token; zeros outside of x.
  EFFK_DEVICE uint4 load(int n, int piece = 0) const {
    return gpu::load_reused_if(from_ + n * stride_ + piece * 16 / static_cast<int>(sizeof(X)),
                               (n == 0 || n < tokens_) && cols_ > 0);
  }

  EFFK_DEVICE void step() {
    from_ += kStepCols;
    cols_ -= cols_ < kStepCols ? cols_ : kStepCols;
  }

 private:
  const X* from_;
  int64_t stride_;
  int tokens_;
  uint32_t cols_;  // from there on; 0 where there is no token
};

// What hides the latency of expanding is other warps: as many as registers and shared memory (two blocks on sm_90 and
// sm_100) allow.
EFFK_HD constexpr int block_warps(bool is_float, int pass_tokens) { return !is_float && pass_tokens == 8 ? 16 : 8; }
constexpr int blocks_per_sm(bool is_float, int pass_tokens) { return pass_tokens <= (is_float ? 1 : 32) ? 2 : 1; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline LinearPlan plan_linear(const Linear& a, int num_sms) {
  LinearPlan plan{};
  const bool is_float = a.x_type == Type::f32;
  plan.pass_tokens = is_float ? 1 : 8;
  const int most = is_float ? 8 : 64;
  // Only these are compiled: 1 and 8; 8, 16, 32 and 64.
  while (plan.pass_tokens < most && plan.pass_tokens < a.tokens) plan.pass_tokens *= is_float ? 8 : 2;
  plan.passes = static_cast<int>(ceil_div(a.tokens, plan.pass_tokens));
  plan.warps = block_warps(is_float, plan.pass_tokens);
  plan.copy_x = a.x_col_stride != 1 || a.x_token_stride % kSub != 0 || a.w.shape.cols % kSub != 0 ||
                reinterpret_cast<uintptr_t>(a.x) % 16 != 0;

  // Time in tiles: those of a warp and one to start, for each wave of blocks, and four for a second kernel.
  const int64_t strips = a.w.shape.strips(), tiles = a.w.shape.tiles(),
                at_once = int64_t{num_sms} * blocks_per_sm(is_float, plan.pass_tokens);
  int64_t best = INT64_MAX;
  for (int splits = 1; splits <= 16; splits *= 2) {
    for (int strip_warps = 1; strip_warps <= plan.warps; strip_warps *= 2) {
      if (splits > 1 && (strip_warps < plan.warps || splits * plan.warps > tiles)) continue;
      const int64_t blocks = ceil_div(strips, plan.warps / strip_warps) * splits * plan.passes;
      const int64_t time =
          ceil_div(blocks, at_once) * (ceil_div(tiles, splits * strip_warps) + 1) + (splits > 1 ? 4 : 0);
      if (time >= best) continue;
      best = time;
      plan.strip_warps = strip_warps;
      plan.splits = splits;
    }
  }
  return plan;
}

inline int64_t copied_x_bytes(const Linear& a, const LinearPlan& plan) {
  return plan.copy_x ? ceil_div(a.tokens * a.w.shape.padded_cols() * type_size(a.x_type), 16) * 16 : 0;
}

// Size of a.prepared, which wants 16-byte alignment.
inline int64_t linear_workspace(const Linear& a, const LinearPlan& plan) {
  const int64_t sums = plan.splits > 1 ? plan.splits * a.tokens * a.w.shape.rows * int64_t{sizeof(float)} : 0;
  return copied_x_bytes(a, plan) + sums;
}

EFFK_DEVICE float activate(float v, Activation a) {
  switch (a) {
    case Activation::none: return v;
    case Activation::relu: return v < 0 ? 0 : v;  // NaN stays
    case Activation::gelu: return 0.5f * v * (1 + erff(v * 0.70710678118654752f));
    case Activation::gelu_tanh: return 0.5f * v * (1 + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case Activation::silu: return v / (1 + expf(-v));
  }
  return v;
}

template <class X>
EFFK_DEVICE void finish(const Linear& a, int64_t token, int64_t row, float sum) {
  if (a.scale) sum *= a.scale[row];
  if (a.bias) sum += to_float(static_cast<const X*>(a.bias)[row]);
  from_float(activate(sum, a.activation), static_cast<X*>(a.y) + token * a.w.shape.rows + row);
}

// Two expanded weights of type V as a register of two X. 8 bits of mantissa hold -128 to 128, so it is exact.
template <class V, class X>
EFFK_DEVICE uint32_t pair_of(uint32_t low, uint32_t high) {
  if constexpr (std::is_same_v<V, X>)
    return gpu::join_halves(low, high);
  else
    return gpu::pack_pair<X>(static_cast<int32_t>(low), static_cast<int32_t>(high));
}

template <class V>
EFFK_DEVICE float float_weight(uint32_t bits) {
  if constexpr (std::is_same_v<V, float>)
    return float_of(bits);
  else
    return static_cast<int32_t>(bits);
}

// The sums of a strip and kTokens tokens in a warp, by tensor cores.
template <class V, class X, int kTokens>
class TensorSums {
  static constexpr int kGroups = kTokens / 8;

 public:
  EFFK_DEVICE TensorSums(const XView& x, int64_t token0, uint32_t first_col)
      : x_(x, token0 + threadIdx.x % gpu::kWarp / 4, 8, first_col + threadIdx.x % 4 * kSub) {
#pragma unroll
    for (int n = 0; n < kGroups; ++n) next_[n] = x_.load(n);
  }

  EFFK_DEVICE void operator()(uint32_t, const Octet& upper, const Octet& lower) {
    uint32_t a[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[2 * i] = pair_of<V, X>(upper.v[2 * i], upper.v[2 * i + 1]);
      a[2 * i + 1] = pair_of<V, X>(lower.v[2 * i], lower.v[2 * i + 1]);
    }
    x_.step();
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
      gpu::mma<X>(sums_[n], a[0], a[1], a[2], a[3], next_[n].x, next_[n].y);
      gpu::mma<X>(sums_[n], a[4], a[5], a[6], a[7], next_[n].z, next_[n].w);
      next_[n] = x_.load(n);  // in time for the next step
    }
  }

  // out[token][row of the strip]
  EFFK_DEVICE void store(float* out) const {
    const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[(8 * n + 2 * t + i % 2) * kStripRows + g + i / 2 * 8] = sums_[n][i];
  }

 private:
  XLane<X> x_;
  float sums_[kGroups][4] = {};
  uint4 next_[kGroups];
};

// The same in float32: a lane sums its 8 columns of two rows, and the four lanes of a row are added in the end.
template <class V, int kTokens>
class FloatSums {
 public:
  EFFK_DEVICE FloatSums(const XView& x, int64_t token0, uint32_t first_col)
      : x_(x, token0, 1, first_col + threadIdx.x % 4 * kSub) {}

  EFFK_DEVICE void operator()(uint32_t, const Octet& upper, const Octet& lower) {
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const uint4 low = x_.load(n), high = x_.load(n, 1);
      const uint32_t words[kSub] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kSub; ++i) {
        sums_[n][0] += float_weight<V>(upper.v[i]) * float_of(words[i]);
        sums_[n][1] += float_weight<V>(lower.v[i]) * float_of(words[i]);
      }
    }
    x_.step();
  }

  EFFK_DEVICE void store(float* out) const {
    const int g = threadIdx.x % gpu::kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < kTokens; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = sums_[n][h];
        sum += gpu::shuffle_xor(sum, 1);
        sum += gpu::shuffle_xor(sum, 2);
        if (t == 0) out[n * kStripRows + g + h * 8] = sum;
      }
  }

 private:
  XLane<float> x_;
  float sums_[kTokens][2] = {};
};

template <class V, class X, int kTokens>
struct SumsOf {
  using type = TensorSums<V, X, kTokens>;
  static constexpr int kUnroll = kTokens == 16 ? 2 : 1;  // as registers allow
};
template <class V, int kTokens>
struct SumsOf<V, float, kTokens> {
  using type = FloatSums<V, kTokens>;
  static constexpr int kUnroll = kTokens == 1 ? 2 : 1;
};

// Blocks are (strips, split, pass).
template <class V, class X, int kTokens>
EFFK_KERNEL(block_warps(sizeof(X) == 4, kTokens) * gpu::kWarp, blocks_per_sm(sizeof(X) == 4, kTokens))
linear_kernel(Linear a, XView x, int strip_warps, int block_strips, int splits, float* split_sums) {
  constexpr int kSums = kTokens * kStripRows, kBlockWarps = block_warps(sizeof(X) == 4, kTokens);
  static_assert(kSums * sizeof(float) <= kRingBytes);
  const int warp = threadIdx.x / gpu::kWarp;
  const int64_t strip0 = int64_t{blockIdx.x} * block_strips, token0 = int64_t{blockIdx.z} * kTokens;
  char* const shared = gpu::shared_memory();

  if (const int64_t strip = strip0 + warp / strip_warps; strip < a.w.shape.strips()) {
    const int part = static_cast<int>(blockIdx.y) * strip_warps + warp % strip_warps, parts = splits * strip_warps;
    const int64_t tiles = a.w.shape.tiles();
    const int t0 = static_cast<int>(tiles * part / parts), t1 = static_cast<int>(tiles * (part + 1) / parts);
    typename SumsOf<V, X, kTokens>::type sums(x, token0, static_cast<uint32_t>(t0) * kTileCols);
    for_each_step<V, SumsOf<V, X, kTokens>::kUnroll>(a.w, strip, t0, t1, shared + warp * kWarpBytes, sums);
    sums.store(reinterpret_cast<float*>(shared + warp * kWarpBytes));
  }
  gpu::sync_block();

  for (int i = threadIdx.x; i < block_strips * kSums; i += kBlockWarps * gpu::kWarp) {
    const int64_t row = (strip0 + i / kSums) * kStripRows + i % kStripRows;
    const int64_t token = token0 + i % kSums / kStripRows;
    if (row >= a.w.shape.rows || token >= a.tokens) continue;
    float sum = 0;
    for (int w = 0; w < strip_warps; ++w)
      sum += reinterpret_cast<const float*>(shared + (i / kSums * strip_warps + w) * kWarpBytes)[i % kSums];
    if (splits > 1)
      split_sums[(blockIdx.y * a.tokens + token) * a.w.shape.rows + row] = sum;
    else
      finish<X>(a, token, row, sum);
  }
}

// y from sums [splits, tokens, rows]. Blocks are (rows, tokens).
template <class X>
EFFK_KERNEL(kThreads, 1)
finish_kernel(Linear a, const float* sums, int splits) {
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x, rows = a.w.shape.rows;
  if (row >= rows) return;
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    float sum = 0;
    for (int s = 0; s < splits; ++s) sum += sums[(s * a.tokens + token) * rows + row];
    finish<X>(a, token, row, sum);
  }
}

// x [tokens, cols] as [tokens, padded], zeros behind. Blocks are (columns, tokens).
template <class Bits>
EFFK_KERNEL(kThreads, 1)
copy_x_kernel(Linear a, int64_t padded) {
  const int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (col >= padded) return;
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y)
    static_cast<Bits*>(a.prepared)[token * padded + col] =
        col < a.w.shape.cols ? static_cast<const Bits*>(a.x)[token * a.x_token_stride + col * a.x_col_stride] : Bits{};
}

inline dim3 grid_of(int64_t across, int64_t tokens) {
  constexpr int64_t kMostY = 65535;
  return dim3(static_cast<unsigned>(ceil_div(across, kThreads)),
              static_cast<unsigned>(tokens < kMostY ? tokens : kMostY));
}

// y = activation(scale * sum over splits of sums + bias), sums float32 [splits, tokens, rows]; splits may be 0.
inline gpu::Error launch_finish(const Linear& a, const float* sums, int splits, gpu::Stream stream) {
  if (a.tokens == 0 || a.w.shape.rows == 0) return nullptr;
  const auto kernel = a.x_type == Type::f32   ? finish_kernel<float>
                      : a.x_type == Type::f16 ? finish_kernel<Half>
                                              : finish_kernel<BFloat16>;
  return gpu::launch(kernel, grid_of(a.w.shape.rows, a.tokens), kThreads, 0, stream, a, sums, splits);
}

using LinearKernel = void (*)(Linear, XView, int, int, int, float*);

template <class V, class X>
LinearKernel linear_kernel_of(int pass_tokens) {
  if constexpr (sizeof(X) == 4)
    return pass_tokens == 1 ? linear_kernel<V, X, 1> : linear_kernel<V, X, 8>;
  else
    switch (pass_tokens) {
      case 8: return linear_kernel<V, X, 8>;
      case 16: return linear_kernel<V, X, 16>;
      case 32: return linear_kernel<V, X, 32>;
      default: return linear_kernel<V, X, 64>;
    }
}

// The type of a.w is that of x, or i8. a.prepared has linear_workspace() bytes. cols > 0, and few tokens: the passes
// are a dimension of the grid.
inline gpu::Error launch_linear(const Linear& a, const LinearPlan& plan, gpu::Stream stream) {
  if (a.tokens == 0 || a.w.shape.rows == 0) return nullptr;
  XView x{a.x, a.x_token_stride, static_cast<uint32_t>(a.w.shape.cols), a.tokens};
  if (plan.copy_x) {
    const int64_t padded = a.w.shape.padded_cols();
    x = {a.prepared, padded, static_cast<uint32_t>(padded), a.tokens};
    const auto copy = type_size(a.x_type) == 4 ? copy_x_kernel<uint32_t> : copy_x_kernel<uint16_t>;
    if (gpu::Error e = gpu::launch(copy, grid_of(padded, a.tokens), kThreads, 0, stream, a, padded)) return e;
  }
  auto* split_sums = reinterpret_cast<float*>(static_cast<char*>(a.prepared) + copied_x_bytes(a, plan));

  const bool i8 = a.w.type == Type::i8;
  LinearKernel kernel;
  switch (a.x_type) {
    case Type::f32:
      kernel = (i8 ? linear_kernel_of<int8_t, float> : linear_kernel_of<float, float>)(plan.pass_tokens);
      break;
    case Type::f16:
      kernel = (i8 ? linear_kernel_of<int8_t, Half> : linear_kernel_of<Half, Half>)(plan.pass_tokens);
      break;
    default:
      kernel = (i8 ? linear_kernel_of<int8_t, BFloat16> : linear_kernel_of<BFloat16, BFloat16>)(plan.pass_tokens);
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(a.w.shape.strips(), plan.block_strips())),
                  static_cast<unsigned>(plan.splits), static_cast<unsigned>(plan.passes));
  const gpu::Error e = gpu::launch(kernel, grid, plan.warps * gpu::kWarp, plan.warps * kWarpBytes, stream, a, x,
                                   plan.strip_warps, plan.block_strips(), plan.splits, split_sums);
  return e || plan.splits == 1 ? e : launch_finish(a, split_sums, plan.splits, stream);
}

}  // namespace effk::lscd
