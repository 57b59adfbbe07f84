// Kernels of one warp around the wrappers of device.cuh, for test_wrappers.py.
#include "../../kernels/common/device.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

struct Args {
  const void* a;  // [16, depth], row-major
  const void* b;  // [8, depth]: b of the product, column by column
  void* c;        // [16, 8]
};

EFFK_DEVICE void store(Args p, const auto (&c)[4]) {
  using C = std::remove_cvref_t<decltype(c[0])>;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  C* const out = static_cast<C*>(p.c);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

// a by load_matrices from shared memory, b from global memory.
template <class X>
EFFK_KERNEL(gpu::kWarp, 1)
product(Args p) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  EFFK_SHARED(uint4[32], tile);  // two 16-byte pieces a row
  tile[lane] = gpu::load_once(static_cast<const uint4*>(p.a) + lane);
  gpu::sync_warp();
  uint32_t a[4];
  // Upper left, lower left, upper right, lower right.
  gpu::load_matrices(a, &tile[(lane % 16) * 2 + lane / 16]);
  const uint32_t* b = static_cast<const uint32_t*>(p.b) + g * 8;
  float c[4] = {};
  gpu::mma<X>(c, a[0], a[1], a[2], a[3], b[t], b[t + 4]);
  store(p, c);
}

EFFK_KERNEL(gpu::kWarp, 1) product_tf32(Args p) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const uint32_t *a = static_cast<const uint32_t*>(p.a) + g * 8, *b = static_cast<const uint32_t*>(p.b) + g * 8;
  float c[4] = {};
  gpu::mma_tf32(c, {a[t], a[t + 64], a[t + 4], a[t + 68]}, {b[t], b[t + 4]});
  store(p, c);
}

EFFK_KERNEL(gpu::kWarp, 1) product_s8(Args p) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  // Registers of four bytes.
  const uint32_t *a = static_cast<const uint32_t*>(p.a) + g * 8, *b = static_cast<const uint32_t*>(p.b) + g * 8;
  int32_t c[4] = {};
  gpu::mma_s8(c, {a[t], a[t + 64], a[t + 4], a[t + 68]}, {b[t], b[t + 4]});
  store(p, c);
}

// What each lane gets by each of the operations that move words: [operation, lane] int32.
EFFK_KERNEL(gpu::kWarp, 1) moves(Args p) {
  const int lane = threadIdx.x;
  const uint32_t v = static_cast<const uint32_t*>(p.a)[lane], w = static_cast<const uint32_t*>(p.b)[lane];
  EFFK_SHARED(uint32_t, sum);
  if (lane == 0) sum = 0;
  gpu::sync_warp();
  const uint32_t before = gpu::atomic_add(&sum, v);
  gpu::sync_warp();
  const uint32_t results[] = {
      gpu::shuffle(v, lane * 7),
      gpu::shuffle_up(v, 3),
      bits_of(gpu::shuffle_xor(float_of(v), 5)),
      gpu::vote(v & 1),
      gpu::popcount(v),
      gpu::permute_bytes(v, w, 0x3715),
      gpu::join_halves(v, w),
      sum,
      static_cast<uint32_t>(before <= sum),
  };
  for (int i = 0; i < 9; ++i) static_cast<uint32_t*>(p.c)[i * gpu::kWarp + lane] = results[i];
}

// Words that lanes copy in reverse order to shared memory, beside 16 bytes that one of them copies; then who stored
// last.
EFFK_KERNEL(gpu::kWarp, 1) copies(Args p) {
  const int lane = threadIdx.x, reverse = gpu::kWarp - 1 - lane;
  EFFK_SHARED(uint32_t[gpu::kWarp], words);
  EFFK_SHARED(uint4, four);
  gpu::async_copy<4>(&words[lane], static_cast<const uint32_t*>(p.a) + reverse);
  if (lane == 0) gpu::async_copy(&four, p.b);
  gpu::async_commit();
  gpu::async_wait<0>();
  gpu::sync_warp();
  uint32_t* const out = static_cast<uint32_t*>(p.c);
  out[lane] = words[lane];
  out[gpu::kWarp + lane] = lane % 2 ? four.x : four.w;
  gpu::atomic_store(out + 2 * gpu::kWarp, static_cast<uint32_t>(lane));
}

struct Kernel {
  const char* name;
  void (*kernel)(Args);
};
constexpr Kernel kKernels[] = {{"float16", product<Half>}, {"bfloat16", product<BFloat16>},
                               {"tf32", product_tf32},     {"int8", product_s8},
                               {"moves", moves},           {"copies", copies}};

}  // namespace

const char* wrappers(const std::string& name, Address a, Address b, Address c) {
  for (const Kernel& k : kKernels)
    if (name == k.name)
      return gpu::launch(
          k.kernel, 1, gpu::kWarp, 0, 0,
          Args{reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), reinterpret_cast<void*>(c)});
  return "no such kernel";
}

}  // namespace effk::simt
