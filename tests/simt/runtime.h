// A CUDA device in miniature, to check kernels with: one block at a time, one fiber a thread, in random order.
//
// Kernels are compiled with -fsanitize=thread, which calls a function before each of their loads and stores. Here
// these functions are the checker's (runtime.cpp), not those of the sanitizer. For each byte of memory that can be
// written, it knows the last write and the reads since, and by vector clocks which of them are ordered by barriers.
// So a race is found whatever order the threads happened to run in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <source_location>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace effk::simt {

using Site = std::source_location;
constexpr int kLanes = 32;

// --- For the host ---

struct Access {
  const void* pc = nullptr;
  uint32_t block = 0;
  uint32_t clock = 0;  // of the thread; 0: never
  uint16_t thread = 0;
  bool atomic = false;
};

// What is known of one byte.
struct Cell {
  Access write;
  std::vector<Access> reads;  // since the write, the unordered ones
  bool written = false;
  bool in_flight = false;  // of an asynchronous copy; `write` is its start
};

// Memory of the device between guard zones. The checker sees what is alive. Inputs are never written; outputs hold
// nothing before they are.
class Memory {
 public:
  enum class Kind { input, output, inout, shared };

  // A copy of `bytes` bytes of the host, with the same alignment up to kAlign; an output's contents stay there.
  Memory(std::string name, const void* from, size_t bytes, Kind kind);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void copy_to(void* host) const;
  void forget_accesses();    // ordered before all that come
  void forget_everything();  // contents too

  const std::string& name() const { return name_; }
  char* data() const { return data_; }
  size_t size() const { return size_; }
  Kind kind() const { return kind_; }
  std::vector<Cell>& cells() { return cells_; }

  static constexpr size_t kAlign = 1024, kGuard = 1 << 16;

 private:
  std::string name_;
  char* allocation_;
  char* data_;
  size_t size_;
  Kind kind_;
  std::vector<Cell> cells_;  // none for an input
};

// Seed of the order of blocks and threads; EFFK_SIMT_SEED, or 0, at first.
uint32_t seed();
void set_seed(uint32_t seed);

// Reports of reads of what was never written can be turned off, for kernels whose input is corrupt on purpose.
void allow_uninitialised(bool allow);

// --- For the wrappers of kernels/common/device.cuh ---

// Runs body(context) as each thread of each block. Null, or a report.
const char* run(const void* kernel, dim3 grid, int threads, int shared_bytes, void (*body)(const void*),
                const void* context);
const char* fill_zero(void* p, size_t bytes);

char* shared_memory();
// The same memory for all threads of the block; `key` tells variables apart.
void* static_shared(const void* key, const char* name, size_t bytes);
uint32_t shared_address(const void* p);
char* shared_pointer(uint32_t address);

// What the lanes of a warp hand to each other.
struct Lanes {
  uint32_t active = 0;
  uint32_t values[kLanes][8] = {};
};

// Waits for the warp's other lanes; those that have returned are left out. Orders no memory accesses. All lanes must be
// at the same place, the barriers of sync_warp() aside.
const Lanes& exchange(const char* op, std::initializer_list<uint32_t> values, Site site);
// The i-th value of a lane, which must have taken part.
uint32_t value_of(const Lanes& lanes, int lane, int i, const char* op, Site site);
// Bit i: whether lane i took part and handed over 1.
uint32_t votes(const Lanes& lanes);
void sync_warp(Site site);
// Waits for `threads` threads at this barrier; 0: for the block.
void barrier(int id, int threads, Site site);

void async_copy(void* to_shared, const void* from, size_t bytes);
void async_commit();
void async_wait(size_t groups);

void check_aligned(const void* p, size_t bytes, const char* op, Site site);
// To be followed by the operation on memory itself, which reads what is there or only stores.
void touch_atomically(void* p, size_t bytes, const void* pc, bool reads = true);

}  // namespace effk::simt
