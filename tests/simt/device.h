// The meaning of kernels/common/device.cuh on the host: the same names, by the rules of the PTX manual.
// Wrappers are inlined, so that a report finds the kernel's line at the address it has.
#pragma once

#include <cmath>
#include <type_traits>

#include "runtime.h"

#define EFFK_DEVICE __attribute__((always_inline)) inline
#define EFFK_KERNEL(threads, blocks) void
#define EFFK_GRID_CONSTANT(type) const type
#define EFFK_SHARED(type, name)     \
  static const char name##_key = 0; \
  auto& name = *static_cast<std::type_identity_t<type>*>(effk::simt::static_shared(&name##_key, #name, sizeof(type)))

namespace effk::gpu {

using simt::Site;

constexpr int kWarp = simt::kLanes;

EFFK_DEVICE int lane() { return static_cast<int>(threadIdx.x % kWarp); }

// --- Threads of a block ---

EFFK_DEVICE void sync_block(Site site = Site::current()) { simt::barrier(0, 0, site); }
EFFK_DEVICE void sync_threads(int barrier, int threads, Site site = Site::current()) {
  simt::barrier(barrier, threads, site);
}
EFFK_DEVICE void sync_warp(Site site = Site::current()) { simt::sync_warp(site); }

EFFK_DEVICE uint32_t shuffle(uint32_t v, int from, Site site = Site::current()) {
  return simt::value_of(simt::exchange("shuffle", {v}, site), from % kWarp, 0, "shuffle", site);
}
EFFK_DEVICE uint32_t shuffle_up(uint32_t v, int by, Site site = Site::current()) {
  const simt::Lanes& lanes = simt::exchange("shuffle_up", {v}, site);
  return lane() >= by ? simt::value_of(lanes, lane() - by, 0, "shuffle_up", site) : v;
}
EFFK_DEVICE float shuffle_xor(float v, int mask, Site site = Site::current()) {
  const simt::Lanes& lanes = simt::exchange("shuffle_xor", {bits_of(v)}, site);
  return float_of(simt::value_of(lanes, (lane() ^ mask) % kWarp, 0, "shuffle_xor", site));
}
EFFK_DEVICE uint32_t vote(bool v, Site site = Site::current()) {
  return simt::votes(simt::exchange("vote", {v}, site));
}

EFFK_DEVICE uint32_t popcount(uint32_t v) { return static_cast<uint32_t>(__builtin_popcount(v)); }

EFFK_DEVICE char* shared_memory() { return simt::shared_memory(); }
EFFK_DEVICE uint32_t shared_address(const void* p) { return simt::shared_address(p); }

template <class V>
EFFK_DEVICE void take_shared(uint32_t& v, uint32_t& address, uint32_t present) {
  if (!present) return;
  const char* p = simt::shared_pointer(address);
  if constexpr (sizeof(V) == 1)
    v = static_cast<uint32_t>(*reinterpret_cast<const int8_t*>(p));
  else if constexpr (sizeof(V) == 2)
    v = *reinterpret_cast<const uint16_t*>(p);
  else
    v = *reinterpret_cast<const uint32_t*>(p);
  address += sizeof(V);
}

// --- Memory ---

EFFK_DEVICE uint4 load_reused(const void* p, Site site = Site::current()) {
  simt::check_aligned(p, 16, "load_reused", site);
  return *static_cast<const uint4*>(p);
}
EFFK_DEVICE uint4 load_reused_if(const void* p, bool present, Site site = Site::current()) {
  return present ? load_reused(p, site) : uint4{0, 0, 0, 0};
}
EFFK_DEVICE uint4 load_once(const void* p, Site site = Site::current()) {
  simt::check_aligned(p, 16, "load_once", site);
  return *static_cast<const uint4*>(p);
}
EFFK_DEVICE void store_once(void* p, const uint4& v, Site site = Site::current()) {
  simt::check_aligned(p, 16, "store_once", site);
  *static_cast<uint4*>(p) = v;
}

template <int kBytes = 16>
EFFK_DEVICE void async_copy(void* to_shared, const void* from, Site site = Site::current()) {
  static_assert(kBytes == 16 || kBytes == 4);
  simt::check_aligned(to_shared, kBytes, "async_copy", site);
  simt::check_aligned(from, kBytes, "async_copy", site);
  simt::async_copy(to_shared, from, kBytes);
}
EFFK_DEVICE void async_commit() { simt::async_commit(); }
template <int kGroups>
EFFK_DEVICE void async_wait() {
  simt::async_wait(kGroups);
}

// In no order with anything, as with relaxed memory order.
template <class T>
__attribute__((no_sanitize_thread, noinline)) T atomic_add(T* p, T v) {
  simt::touch_atomically(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
__attribute__((no_sanitize_thread, noinline)) void atomic_store(T* p, T v) {
  simt::touch_atomically(p, sizeof(T), __builtin_return_address(0), false);
  *p = v;
}

EFFK_DEVICE void load_matrices(uint32_t (&m)[4], const void* row, Site site = Site::current()) {
  simt::check_aligned(row, 16, "load_matrices", site);
  const simt::Lanes& lanes = simt::exchange("load_matrices", {simt::shared_address(row)}, site);
  for (int i = 0; i < 4; ++i) {
    const uint32_t address = simt::value_of(lanes, 8 * i + lane() / 4, 0, "load_matrices", site);
    m[i] = *reinterpret_cast<const uint32_t*>(simt::shared_pointer(address + lane() % 4 * 4));
  }
}

// --- Arithmetic ---

EFFK_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> 4 * i & 15;
    uint32_t byte = bytes >> (select & 7) * 8 & 0xff;
    if (select & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << 8 * i;
  }
  return out;
}

EFFK_DEVICE uint32_t join_halves(uint32_t low, uint32_t high) { return permute_bytes(low, high, 0x5410); }

EFFK_DEVICE float product(float a, float b) { return a * b; }  // compiled without FMA
EFFK_DEVICE float sum(float a, float b) { return a + b; }

template <class X>
EFFK_DEVICE uint32_t pack_pair(float low, float high) {
  X a, b;
  from_float(low, &a);
  from_float(high, &b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

template <class X>
EFFK_DEVICE void unpack_pair(uint32_t pair, float& low, float& high) {
  low = to_float(X{static_cast<uint16_t>(pair)});
  high = to_float(X{static_cast<uint16_t>(pair >> 16)});
}

// A fragment of a matrix: where its element (i, k) is, i along the rows of a or the columns of b.
struct Place {
  int lane, value;
  int shift;  // bits
};

// kBits is the size of an element; k is cut into pieces of 32 bits that the four lanes of a row hold in turn, twice.
template <int kBits>
constexpr Place place(int i, int k, int row_values) {
  constexpr int kPerValue = 32 / kBits;
  const int piece = k / kPerValue;
  return {i % 8 * 4 + piece % 4, i / 8 + piece / 4 * row_values, k % kPerValue * kBits};
}

// As tensor cores are allowed to: a sum that is cut off rather than rounded.
EFFK_DEVICE float cut(double sum) {
  const float f = static_cast<float>(sum);
  return std::isfinite(f) && std::fabs(static_cast<double>(f)) > std::fabs(sum) ? std::nextafterf(f, 0) : f;
}

// c += a b with a [16, kDepth], b [kDepth, 8] in elements of kBits bits. `element` turns bits into a number.
template <int kBits, int kDepth, class C, class Wide, class Element>
EFFK_DEVICE void multiply(C (&c)[4], const simt::Lanes& lanes, const char* op, Site site, Element element) {
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, col = lane() % 4 * 2 + i % 2;
    Wide sum = c[i];
    for (int k = 0; k < kDepth; ++k) {
      const Place a = place<kBits>(row, k, 2), b = place<kBits>(col, k, 1);
      sum += static_cast<Wide>(element(simt::value_of(lanes, a.lane, a.value, op, site) >> a.shift)) *
             static_cast<Wide>(element(simt::value_of(lanes, b.lane, 4 + b.value, op, site) >> b.shift));
    }
    if constexpr (sizeof(Wide) == sizeof(double))
      c[i] = cut(sum);
    else
      c[i] = static_cast<C>(sum);
  }
}

template <class X>
EFFK_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                     Site site = Site::current()) {
  const simt::Lanes& lanes = simt::exchange("mma", {a0, a1, a2, a3, b0, b1}, site);
  multiply<16, 16, float, double>(c, lanes, "mma", site,
                                  [](uint32_t v) { return to_float(X{static_cast<uint16_t>(v)}); });
}

EFFK_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  const simt::Lanes& lanes = simt::exchange("mma_tf32", {a[0], a[1], a[2], a[3], b[0], b[1]}, site);
  multiply<32, 8, float, double>(c, lanes, "mma_tf32", site, [](uint32_t v) { return float_of(v & 0xffffe000); });
}

EFFK_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  const simt::Lanes& lanes = simt::exchange("mma_s8", {a[0], a[1], a[2], a[3], b[0], b[1]}, site);
  multiply<8, 32, int32_t, uint32_t>(c, lanes, "mma_s8", site, [](uint32_t v) { return static_cast<int8_t>(v); });
}

// --- Host side ---

using Stream = int;
using Error = const char*;

// Runs a kernel's closure. Its own loads, of the arguments that the host holds, aren't the kernel's.
template <class Body>
__attribute__((no_sanitize_thread)) void call(const void* body) {
  (*static_cast<const Body*>(body))();
}

template <class... Params, class... Args>
Error launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, Stream, const Args&... args) {
  const auto body = [&]() __attribute__((no_sanitize_thread)) { kernel(args...); };
  return simt::run(reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes, call<decltype(body)>, &body);
}

inline Error zero(void* p, size_t bytes, Stream) { return simt::fill_zero(p, bytes); }

}  // namespace effk::gpu
