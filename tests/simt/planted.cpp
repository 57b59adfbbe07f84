// Small kernels, most of them with one bug, for test_planted.py. Blocks have 64 threads.
// Each reads `in` and writes `out`, 64 ints.
#include "../../kernels/common/device.cuh"
#include "kernels.h"

namespace effk::simt {
namespace {

using gpu::kWarp;

constexpr int kThreads = 64;

struct Args {
  const int* in;
  int* out;
};

EFFK_DEVICE int* shared_ints() { return reinterpret_cast<int*>(gpu::shared_memory()); }

// --- Races ---

EFFK_KERNEL(kThreads, 1) no_sync_block(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t] = a.in[t];
  a.out[t] = shared_ints()[kThreads - 1 - t];
}

EFFK_KERNEL(kThreads, 1) sync_warp_for_block(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t] = a.in[t];
  gpu::sync_warp();
  a.out[t] = shared_ints()[kThreads - 1 - t];
}

EFFK_KERNEL(kThreads, 1) no_sync_warp(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t] = a.in[t];
  a.out[t] = shared_ints()[t ^ 1];
}

// A shuffle makes lanes wait for each other, but orders no memory accesses.
EFFK_KERNEL(kThreads, 1) shuffle_for_sync_warp(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t] = a.in[t];
  const uint32_t zero = gpu::shuffle(0, 0);
  a.out[t] = shared_ints()[t ^ 1] + zero;
}

EFFK_KERNEL(kThreads, 1) overwritten_too_early(Args a) {
  const int t = threadIdx.x;
  int sum = 0;
  for (int i = 0; i < 2; ++i) {
    shared_ints()[t] = a.in[t] + i;
    gpu::sync_block();
    sum += shared_ints()[kThreads - 1 - t];
  }
  a.out[t] = sum;
}

EFFK_KERNEL(kThreads, 1) two_writers(Args a) {
  const int t = threadIdx.x;
  reinterpret_cast<char*>(shared_ints())[t / 2] = 1;
  gpu::sync_block();
  a.out[t] = gpu::shared_memory()[t / 2];
}

EFFK_KERNEL(kThreads, 1) no_atomic(Args a) {
  const int t = threadIdx.x;
  if (t == 0) *shared_ints() = 0;
  gpu::sync_block();
  *shared_ints() += a.in[t];
  gpu::sync_block();
  a.out[t] = *shared_ints();
}

EFFK_KERNEL(kThreads, 1) blocks_write_the_same(Args a) { a.out[threadIdx.x] = a.in[threadIdx.x]; }

EFFK_KERNEL(kThreads, 1) named_barrier_of_others(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t] = a.in[t];
  gpu::sync_threads(1 + t / kWarp, kWarp);
  a.out[t] = shared_ints()[t ^ kWarp];
}

// --- Never written ---

EFFK_KERNEL(kThreads, 1) uninitialised_shared(Args a) {
  const int t = threadIdx.x;
  if (t != 5) shared_ints()[t] = a.in[t];
  gpu::sync_block();
  a.out[t] = shared_ints()[kThreads - 1 - t];
}

EFFK_KERNEL(kThreads, 1) uninitialised_output(Args a) { a.out[threadIdx.x] += a.in[threadIdx.x]; }

// --- Out of bounds ---

EFFK_KERNEL(kThreads, 1) past_shared(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t + 1] = a.in[t];
  a.out[t] = 0;
}

EFFK_KERNEL(kThreads, 1) past_static_shared(Args a) {
  const int t = threadIdx.x;
  EFFK_SHARED(int[kThreads / 2], tile);
  tile[t] = a.in[t];
  a.out[t] = 0;
}

EFFK_KERNEL(kThreads, 1) past_address(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t] = a.in[t];
  gpu::sync_block();
  uint32_t v = 0, address = gpu::shared_address(shared_ints() + t + 1);
  gpu::take_shared<float>(v, address, 1);
  a.out[t] = v;
}

EFFK_KERNEL(kThreads, 1) past_global(Args a) { a.out[threadIdx.x] = a.in[threadIdx.x + 1]; }

EFFK_KERNEL(kThreads, 1) before_global(Args a) { a.out[static_cast<int>(threadIdx.x) - 1] = a.in[threadIdx.x]; }

EFFK_KERNEL(kThreads, 1) null_pointer(Args a) {
  a.out[threadIdx.x] = static_cast<const volatile int*>(nullptr)[threadIdx.x];
}

EFFK_KERNEL(kThreads, 1) writes_input(Args a) { const_cast<int*>(a.in)[threadIdx.x] = 0; }

EFFK_KERNEL(kThreads, 1) misaligned(Args a) {
  const int t = threadIdx.x;
  a.out[t] = t < 60 ? gpu::load_once(a.in + t).x : 0;
}

EFFK_KERNEL(kThreads, 1) misaligned_pointer(Args a) {
  const int t = threadIdx.x;
  a.out[t] = t < 60 ? reinterpret_cast<const uint2*>(a.in + t)->x : 0;
}

// --- Barriers and warps ---

EFFK_KERNEL(kThreads, 1) barrier_in_a_branch(Args a) {
  const int t = threadIdx.x;
  if (t < kWarp) gpu::sync_block();
  a.out[t] = a.in[t];
}

EFFK_KERNEL(kThreads, 1) returns_before_barrier(Args a) {
  const int t = threadIdx.x;
  if (t == 63) return;
  a.out[t] = a.in[t];
  gpu::sync_block();
}

EFFK_KERNEL(kThreads, 1) barriers_crossed(Args a) {
  const int t = threadIdx.x;
  gpu::sync_threads(1 + t / kWarp, kThreads);
  a.out[t] = a.in[t];
}

EFFK_KERNEL(kThreads, 1) half_a_warp_at_the_barrier(Args a) {
  const int t = threadIdx.x;
  if (t % 2)
    gpu::sync_block();
  else
    gpu::sync_warp();
  a.out[t] = a.in[t];
}

EFFK_KERNEL(kThreads, 1) shuffle_from_returned_lane(Args a) {
  const int t = threadIdx.x;
  if (t % kWarp >= 16) return;
  a.out[t] = gpu::shuffle(a.in[t], t % kWarp + 16);
}

EFFK_KERNEL(kThreads, 1) shuffle_in_a_branch(Args a) {
  const int t = threadIdx.x;
  if (t % kWarp < 16)
    a.out[t] = gpu::shuffle_up(a.in[t], 1);
  else
    a.out[t] = gpu::shuffle(a.in[t], 0);
}

EFFK_KERNEL(kThreads, 1) shuffle_of_some(Args a) {
  const int t = threadIdx.x;
  uint32_t v = a.in[t];
  if (t % kWarp < 16) v = gpu::shuffle(v, 3);
  a.out[t] = gpu::shuffle(v, 4);
}

// --- Asynchronous copies ---

EFFK_KERNEL(kThreads, 1) copy_without_wait(Args a) {
  const int t = threadIdx.x;
  if (t < 16) gpu::async_copy(shared_ints() + 4 * t, a.in + 4 * t);
  gpu::async_commit();
  gpu::sync_block();
  a.out[t] = shared_ints()[t];
}

EFFK_KERNEL(kThreads, 1) copy_waited_for_too_few(Args a) {
  const int t = threadIdx.x;
  for (int i = 0; i < 2; ++i) {
    if (t < 8) gpu::async_copy(shared_ints() + 32 * i + 4 * t, a.in + 32 * i + 4 * t);
    gpu::async_commit();
  }
  gpu::async_wait<1>();
  gpu::sync_block();
  a.out[t] = shared_ints()[t];
}

EFFK_KERNEL(kThreads, 1) copy_without_commit(Args a) {
  const int t = threadIdx.x;
  if (t < 16) gpu::async_copy(shared_ints() + 4 * t, a.in + 4 * t);
  gpu::async_wait<0>();
  gpu::sync_block();
  a.out[t] = shared_ints()[t];
}

EFFK_KERNEL(kThreads, 1) copy_without_barrier(Args a) {
  const int t = threadIdx.x;
  if (t < 16) gpu::async_copy(shared_ints() + 4 * t, a.in + 4 * t);
  gpu::async_commit();
  gpu::async_wait<0>();
  a.out[t] = shared_ints()[t];
}

EFFK_KERNEL(kThreads, 1) copy_over_what_is_read(Args a) {
  const int t = threadIdx.x;
  shared_ints()[t] = a.in[t];
  gpu::sync_block();
  const int v = shared_ints()[kThreads - 1 - t];
  if (t < 16) gpu::async_copy(shared_ints() + 4 * t, a.in + 4 * t);
  gpu::async_commit();
  gpu::async_wait<0>();
  a.out[t] = v;
}

EFFK_KERNEL(kThreads, 1) copy_never_waited_for(Args a) {
  const int t = threadIdx.x;
  if (t < 16) gpu::async_copy(shared_ints() + 4 * t, a.in + 4 * t);
  gpu::async_commit();
  a.out[t] = a.in[t];
}

// --- Without a bug: all of the above done right ---

EFFK_KERNEL(kThreads, 1) clean(Args a) {
  const int t = threadIdx.x, lane = t % kWarp;
  EFFK_SHARED(int[kThreads], copy);
  EFFK_SHARED(int, sum);
  if (t < 16) gpu::async_copy(copy + 4 * t, a.in + 4 * t);
  gpu::async_commit();
  if (t == 0) sum = 0;
  shared_ints()[t] = a.in[t];
  gpu::sync_warp();
  int v = shared_ints()[t ^ 1];
  gpu::sync_threads(1 + t / kWarp, kWarp);
  shared_ints()[t] = v;
  gpu::async_wait<0>();
  gpu::sync_block();

  gpu::atomic_add(&sum, shared_ints()[kThreads - 1 - t] - copy[t ^ 3]);
  v = static_cast<int>(gpu::shuffle(static_cast<uint32_t>(copy[t]), lane ^ 1));
  uint32_t address = gpu::shared_address(shared_ints() + t), mine = 0;
  gpu::take_shared<float>(mine, address, 1);
  v += gpu::vote(lane < 3) == 7u ? 0 : 1000;
  gpu::sync_block();
  if (t >= 48) {  // and the other lanes of its warp don't wait for any more
    a.out[t] = static_cast<int>(mine) - v + sum + a.in[t];
    return;
  }
  gpu::sync_warp();
  a.out[t] = static_cast<int>(mine) - v + sum + a.in[t];
}

EFFK_KERNEL(kThreads, 1) clean_pipeline(Args a) {
  const int t = threadIdx.x, pieces = 4;
  int* const ring = shared_ints();
  const auto start = [&](int piece) {
    if (piece < pieces && t < 4) gpu::async_copy(ring + piece % 2 * 16 + 4 * t, a.in + 16 * piece + 4 * t);
    gpu::async_commit();
  };
  start(0);
  for (int piece = 0; piece < pieces; ++piece) {
    start(piece + 1);
    gpu::async_wait<1>();
    gpu::sync_block();
    if (t / 16 == piece) a.out[t] = ring[piece % 2 * 16 + 15 - t % 16];
    gpu::sync_block();
  }
  gpu::async_wait<0>();
}

struct Case {
  const char* name;
  void (*kernel)(Args);
  dim3 grid;
};

#define EFFK_CASE(name) {#name, name, 1}
const Case kCases[] = {
    EFFK_CASE(no_sync_block),
    EFFK_CASE(sync_warp_for_block),
    EFFK_CASE(no_sync_warp),
    EFFK_CASE(shuffle_for_sync_warp),
    EFFK_CASE(overwritten_too_early),
    EFFK_CASE(two_writers),
    EFFK_CASE(no_atomic),
    {"blocks_write_the_same", blocks_write_the_same, 2},
    EFFK_CASE(named_barrier_of_others),
    EFFK_CASE(uninitialised_shared),
    EFFK_CASE(uninitialised_output),
    EFFK_CASE(past_shared),
    EFFK_CASE(past_static_shared),
    EFFK_CASE(past_address),
    EFFK_CASE(past_global),
    EFFK_CASE(before_global),
    EFFK_CASE(null_pointer),
    EFFK_CASE(writes_input),
    EFFK_CASE(misaligned),
    EFFK_CASE(misaligned_pointer),
    EFFK_CASE(barrier_in_a_branch),
    EFFK_CASE(returns_before_barrier),
    EFFK_CASE(barriers_crossed),
    EFFK_CASE(half_a_warp_at_the_barrier),
    EFFK_CASE(shuffle_from_returned_lane),
    EFFK_CASE(shuffle_in_a_branch),
    EFFK_CASE(shuffle_of_some),
    EFFK_CASE(copy_without_wait),
    EFFK_CASE(copy_waited_for_too_few),
    EFFK_CASE(copy_without_commit),
    EFFK_CASE(copy_without_barrier),
    EFFK_CASE(copy_over_what_is_read),
    EFFK_CASE(copy_never_waited_for),
    EFFK_CASE(clean),
    EFFK_CASE(clean_pipeline),
};
#undef EFFK_CASE

}  // namespace

const char* planted(const std::string& name, Address in, Address out) {
  for (const Case& c : kCases)
    if (name == c.name)
      return gpu::launch(c.kernel, c.grid, kThreads, kThreads * int{sizeof(int)}, 0,
                         Args{reinterpret_cast<const int*>(in), reinterpret_cast<int*>(out)});
  return "no such kernel";
}

std::vector<std::string> planted_names() {
  std::vector<std::string> names;
  for (const Case& c : kCases) names.emplace_back(c.name);
  return names;
}

}  // namespace effk::simt
