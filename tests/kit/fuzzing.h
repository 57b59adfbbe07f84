// What the fuzzers of all families share: random numbers, and memory of exact sizes.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>
#include <string>

#include "../../kernels/common/cpu_level.h"

namespace effk::fuzz {

using Random = std::mt19937_64;

inline int64_t below(Random& random, int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

template <class T, size_t N>
T pick(Random& random, const T (&options)[N]) {
  return options[below(random, N)];
}

// A fuzzer's command line: LEVEL CASES SEED. Where it is wrong, the process ends.
template <class Cpu>
struct Arguments {
  const Cpu* cpu = nullptr;
  int64_t cases = 0;
  Random random;
};

template <class Cpu>
Arguments<Cpu> arguments(const char* family, int argc, char** argv, const Cpu* const (&levels)[3]) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s LEVEL CASES SEED\n", argv[0]);
    std::exit(2);
  }
  Arguments<Cpu> found{nullptr, std::strtoll(argv[2], nullptr, 10), Random(std::strtoull(argv[3], nullptr, 10))};
  for (int i = 0; i <= static_cast<int>(supported_cpu_level(family)); ++i)
    if (std::string(argv[1]) == cpu_level_name(static_cast<CpuLevel>(i))) found.cpu = levels[i];
  if (!found.cpu) {
    std::fprintf(stderr, "this machine has no level %s of %s\n", argv[1], family);
    std::exit(2);
  }
  return found;
}

// Memory of exactly `size` bytes, on the heap or right before an unmapped page.
class Buffer {
 public:
  Buffer(int64_t size, int64_t alignment, bool guarded) : size_(size), alignment_(alignment), guarded_(guarded) {
    if (guarded) {
      const int64_t page = sysconf(_SC_PAGESIZE);
      // A multiple of the alignment may be left over between the end and the page.
      const int64_t used = (size + alignment - 1) / alignment * alignment;
      mapped_ = (used + page - 1) / page * page + page;
      base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (base_ == MAP_FAILED) std::abort();
      if (mprotect(static_cast<char*>(base_) + mapped_ - page, page, PROT_NONE) != 0) std::abort();
      data_ = static_cast<char*>(base_) + mapped_ - page - used;
    } else {
      data_ = ::operator new(size, std::align_val_t(alignment));
    }
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() {
    if (guarded_)
      munmap(base_, mapped_);
    else
      ::operator delete(data_, std::align_val_t(alignment_));
  }

  template <class T>
  T* as() {
    return static_cast<T*>(data_);
  }

  void fill(Random& random) {
    int64_t i = 0;
    for (; i + 8 <= size_; i += 8) {
      const uint64_t word = random();
      std::memcpy(as<char>() + i, &word, 8);
    }
    for (; i < size_; ++i) as<char>()[i] = static_cast<char>(random());
  }

 private:
  int64_t size_, alignment_, mapped_ = 0;
  bool guarded_;
  void *base_ = nullptr, *data_ = nullptr;
};

}  // namespace effk::fuzz
