#include "runtime.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <regex>
#include <sstream>
#include <string_view>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace effk::simt {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kMostShared = 227 << 10;  // of a block, on sm_90 and sm_100
constexpr int kBarriers = 16;
constexpr size_t kStack = 256 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN, or -1
// A 32-bit address of shared memory: which variable, and its byte in the low bits.
constexpr int kOffsetBits = 20;

struct Copy {
  char* to;
  const char* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  bool returned;
  const char* waits_at;  // an operation, or null
  Site site;
  std::vector<Copy> open;                 // asynchronous copies, not committed yet
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
};

struct Warp {
  uint32_t alive;
  const char* op;  // where the lanes that are gathering wait
  Site site;
  Lanes gathering, done;
};

struct Barrier {
  int threads;
  std::vector<int> waiting;
};

uint32_t seed_of_environment() {
  const char* seed = std::getenv("EFFK_SIMT_SEED");
  return seed ? static_cast<uint32_t>(std::strtoul(seed, nullptr, 10)) : 0;
}

struct Machine {
  std::vector<Memory*> memories;
  uint32_t seed = seed_of_environment();
  bool uninitialised_allowed = false;
  std::string report;
  std::string suspicion;  // a read of what wasn't written: a race, if it is written later in no order with the read

  // The launch.
  const void* kernel = nullptr;
  void (*body)(const void*) = nullptr;
  const void* body_context = nullptr;
  char* stacks = nullptr;
  std::mt19937 random;
  ucontext_t scheduler;
  std::unique_ptr<Memory> dynamic_shared;
  std::map<const void*, std::unique_ptr<Memory>> static_shared;

  // The block.
  uint32_t block = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Barrier> barriers;
  std::vector<int> ready;
  int current = -1;                           // thread that runs, or -1
  std::vector<std::vector<uint32_t>> clocks;  // [t][u]: what of thread u is ordered before thread t's next access
} m;

Fiber& self() { return m.fibers[m.current]; }

// --- Reports ---

template <class... Parts>
std::string str(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

std::string index(dim3 i) { return str("(", i.x, ", ", i.y, ", ", i.z, ")"); }

std::string thread_name(int t) { return str("thread ", t, " (warp ", t / kLanes, ", lane ", t % kLanes, ")"); }

dim3 block_index(uint32_t b) { return {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y}; }

std::string block_name(uint32_t b) { return "block " + index(block_index(b)); }

// The last folder and the name.
std::string shorten(const std::string& path) {
  const size_t name = path.rfind('/');
  if (name == std::string::npos || name == 0) return path;
  const size_t folder = path.rfind('/', name - 1);
  return folder == std::string::npos ? path : path.substr(folder + 1);
}

std::string place(const Site& s) { return str(shorten(s.file_name()), ":", s.line()); }

struct Frame {
  std::string function, place;
};

// Of an address, from the innermost inlined function outwards.
const std::vector<Frame>& frames_of(const void* address) {
  static std::map<const void*, std::vector<Frame>> known;
  const auto [at, is_new] = known.try_emplace(address);
  Dl_info info;
  if (!is_new || !dladdr(address, &info)) return at->second;
  const size_t offset = static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase);
  FILE* const pipe = popen(str("addr2line -Cfi -e '", info.dli_fname, "' 0x", std::hex, offset).c_str(), "r");
  if (!pipe) return at->second;
  char function[4096], where[4096];
  while (std::fgets(function, sizeof(function), pipe) && std::fgets(where, sizeof(where), pipe))
    at->second.push_back(
        {std::string(function, std::strcspn(function, "\n")), shorten(std::string(where, std::strcspn(where, " \n")))});
  pclose(pipe);
  return at->second;
}

// Of the instruction that a call returns behind: the kernel's lines, not those of the wrappers.
std::string place(const void* return_address) {
  std::string out;
  for (const Frame& f : frames_of(static_cast<const char*>(return_address) - 1))
    if (!f.place.starts_with("simt/device.h")) out += (out.empty() ? "" : ", called at ") + f.place;
  return out;
}

// The name of the kernel, with its template arguments: "void a::f<b::c>(d)" -> "f<c>".
std::string kernel_name() {
  const std::vector<Frame>& frames = frames_of(m.kernel);
  std::string name = frames.empty() ? "?" : frames.back().function;
  name = std::regex_replace(name, std::regex(R"(\(anonymous namespace\)::|\w+::|\bvoid )"), "");
  return name.substr(0, name.find('('));
}

std::string headed(const std::string& what, const std::string& details) {
  return str("simt: ", what, "\n  in ", kernel_name(), ", ", block_name(m.block), " of ", index(gridDim), ", seed ",
             m.seed, details);
}

// Ends the launch with a report, when in a kernel by leaving it for good.
void fail(const std::string& report) {
  m.report = report;
  if (m.current >= 0) setcontext(&m.scheduler);
}

// The same, unless something read before it was written, which is then the cause.
void fail(const std::string& what, const std::string& details) {
  fail(m.suspicion.empty() ? headed(what, details) : m.suspicion);
}

std::string line(const std::string& text) { return "\n  " + text; }

// Threads by what they do, such as "threads 0-15, 32: at sync_block, a.cuh:7".
std::string where_threads_are() {
  constexpr int kMostRanges = 8;
  std::map<std::string, std::vector<std::pair<size_t, size_t>>> states;
  for (size_t t = 0; t < m.fibers.size(); ++t) {
    const Fiber& f = m.fibers[t];
    auto& ranges = states[f.returned ? "returned" : str("at ", f.waits_at, ", ", place(f.site))];
    if (!ranges.empty() && ranges.back().second + 1 == t)
      ranges.back().second = t;
    else
      ranges.emplace_back(t, t);
  }
  std::string out;
  for (const auto& [state, ranges] : states) {
    std::string list;
    for (size_t i = 0; i < ranges.size() && i < kMostRanges; ++i) {
      const auto [first, last] = ranges[i];
      list += str(i ? ", " : "", first);
      if (last > first) list += str("-", last);
    }
    out += line(str("threads ", list, ranges.size() > kMostRanges ? ", ..." : "", ": ", state));
  }
  return out;
}

// --- Memory ---

enum class Op { read, write, atomic, atomic_store };
constexpr const char* kVerbs[] = {"reads", "writes", "updates", "updates"};
bool is_atomic(Op op) { return op == Op::atomic || op == Op::atomic_store; }

std::string accessor(Op op, const void* pc) {
  return line(str(thread_name(m.current), " ", kVerbs[static_cast<int>(op)], " at ", place(pc)));
}

std::string bytes_of(const Memory& memory, ptrdiff_t offset, size_t bytes) {
  const auto size = static_cast<ptrdiff_t>(memory.size());
  const std::string beyond = offset < 0 ? str(", ", -offset, " before its beginning")
                             : offset + static_cast<ptrdiff_t>(bytes) > size ? str(", which has ", size)
                                                                             : "";
  const ptrdiff_t last = offset + static_cast<ptrdiff_t>(bytes) - 1;
  return line(
      str(bytes == 1 ? "byte " : "bytes ", offset, bytes == 1 ? "" : str(" to ", last), " of ", memory.name(), beyond));
}

std::string kind_name(const Memory& memory) {
  return memory.kind() == Memory::Kind::shared ? "shared memory" : "global memory";
}

Memory* find(const void* p) {
  for (Memory* memory : m.memories)
    if (p >= memory->data() - Memory::kGuard && p < memory->data() + memory->size() + Memory::kGuard) return memory;
  return nullptr;
}

bool ordered(const Access& a) { return a.block == m.block && a.clock <= m.clocks[m.current][a.thread]; }

void check_order(const Memory& memory, ptrdiff_t offset, Op op, const void* pc, const Access& other, bool wrote) {
  if (other.clock == 0 || ordered(other) || (is_atomic(op) && other.atomic)) return;
  const std::string block = other.block == m.block ? "" : ", " + block_name(other.block) + ",";
  fail(headed(str("race on ", kind_name(memory)), bytes_of(memory, offset, 1) + accessor(op, pc) +
                                                      line(str(thread_name(other.thread), block,
                                                               other.atomic ? " updated"
                                                               : wrote      ? " wrote"
                                                                            : " read",
                                                               " at ", place(other.pc)))));
}

void access(Memory& memory, const void* p, size_t bytes, Op op, const void* pc) {
  const ptrdiff_t offset = static_cast<const char*>(p) - memory.data();
  if (offset < 0 || offset + bytes > memory.size())
    return fail(str("out of bounds of ", kind_name(memory)), bytes_of(memory, offset, bytes) + accessor(op, pc));
  if (memory.kind() == Memory::Kind::input) {
    if (op != Op::read) fail("write to an input", bytes_of(memory, offset, bytes) + accessor(op, pc));
    return;
  }
  const Access now{pc, m.block, m.clocks[m.current][m.current], static_cast<uint16_t>(m.current), is_atomic(op)};
  for (size_t i = offset; i < offset + bytes; ++i) {
    Cell& cell = memory.cells()[i];
    if (cell.in_flight)
      return fail("asynchronous copy not waited for",
                  bytes_of(memory, i, 1) + accessor(op, pc) +
                      line(str(thread_name(cell.write.thread), " started the copy at ", place(cell.write.pc))));
    check_order(memory, i, op, pc, cell.write, true);
    if (op != Op::read)
      for (const Access& read : cell.reads) check_order(memory, i, op, pc, read, false);
    if ((op == Op::read || op == Op::atomic) && !cell.written && !m.uninitialised_allowed && m.suspicion.empty())
      m.suspicion = headed(str("read of uninitialised ", kind_name(memory)), bytes_of(memory, i, 1) + accessor(op, pc));
    if (op == Op::read) {
      // What is ordered after this read is ordered after those before it.
      std::erase_if(cell.reads, ordered);
      cell.reads.push_back(now);
    } else {
      cell.reads.clear();
      cell.write = now;
      cell.written = true;
    }
  }
}

struct Range {
  const char* begin;
  const char* end;
  bool has(const void* p) const { return p >= begin && p < end; }
};

Range stack_of(int thread) { return {m.stacks + thread * kStack, m.stacks + (thread + 1) * kStack}; }

// This library: constants of the kernels, threadIdx and the like.
bool is_static(const void* p) {
  static const Range image = [] {
    Range r{};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          Range segments{reinterpret_cast<const char*>(UINTPTR_MAX), nullptr};
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const char* const begin = reinterpret_cast<const char*>(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
            segments.begin = std::min(segments.begin, begin);
            segments.end = std::max(segments.end, begin + info->dlpi_phdr[i].p_memsz);
          }
          if (!segments.has(&threadIdx)) return 0;
          *static_cast<Range*>(out) = segments;
          return 1;
        },
        &r);
    return r;
  }();
  return image.has(p);
}

// Each load and store of the kernels comes here.
void touch(const void* p, size_t bytes, Op op, const void* pc) {
  if (m.current < 0 || stack_of(m.current).has(p)) return;
  if (Memory* const memory = find(p)) return access(*memory, p, bytes, op, pc);
  if (op != Op::read || !is_static(p))
    fail("out of bounds of global memory", line(str("address ", p, ", far from all tensors")) + accessor(op, pc));
}

void misaligned(const void* p, const void* pc) {
  if (m.current >= 0)
    fail("misaligned access", line(str(thread_name(m.current), " accesses address ", p, " at ", place(pc))));
}

Memory* find_shared(const void* p, const char* op) {
  Memory* const memory = find(p);
  if (memory && memory->kind() == Memory::Kind::shared) return memory;
  fail(str(op, " of an address that isn't in shared memory"), line(str("address ", p)) + line(thread_name(m.current)));
  return nullptr;
}

// --- Threads ---

void yield() { swapcontext(&self().context, &m.scheduler); }

void arrive(const char* op, Site site) {
  self().waits_at = op;
  self().site = site;
}

void wake(const std::vector<int>& threads) {
  for (int t : threads) {
    m.fibers[t].waits_at = nullptr;
    m.ready.push_back(t);
  }
}

// All that any of them did so far is ordered before all that any of them does from now on.
void order(const std::vector<int>& threads) {
  std::vector<uint32_t> latest = m.clocks[threads[0]];
  for (int t : threads)
    for (size_t u = 0; u < latest.size(); ++u) latest[u] = std::max(latest[u], m.clocks[t][u]);
  for (int t : threads) {
    m.clocks[t] = latest;
    ++m.clocks[t][t];
  }
}

constexpr std::string_view kSyncWarp = "sync_warp";

// When all lanes that haven't returned are here, they go on.
void complete(Warp& warp) {
  if (warp.gathering.active == 0 || warp.gathering.active != warp.alive) return;
  warp.done = warp.gathering;
  warp.gathering.active = 0;
  std::vector<int> threads;
  const int first = static_cast<int>(&warp - m.warps.data()) * kLanes;
  for (int i = 0; i < kLanes; ++i)
    if (warp.done.active >> i & 1) threads.push_back(first + i);
  if (warp.op == kSyncWarp) order(threads);
  wake(threads);
}

void thread_returns() {
  Fiber& f = self();
  f.returned = true;
  Warp& warp = m.warps[m.current / kLanes];
  warp.alive &= ~(1u << m.current % kLanes);
  complete(warp);
}

void fiber_main() {
  m.body(m.body_context);
  thread_returns();
  setcontext(&m.scheduler);
}

void start_block(uint32_t block, int threads) {
  m.block = block;
  blockIdx = block_index(block);
  m.fibers.assign(threads, Fiber{});
  m.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  m.barriers.assign(kBarriers, Barrier{});
  m.clocks.assign(threads, std::vector<uint32_t>(threads, 0));
  m.ready.clear();
  m.dynamic_shared->forget_everything();
  for (auto& [key, variable] : m.static_shared) variable->forget_everything();
  for (int t = 0; t < threads; ++t) {
    m.warps[t / kLanes].alive |= 1u << t % kLanes;
    m.clocks[t][t] = 1;
    m.ready.push_back(t);
    ucontext_t& context = m.fibers[t].context;
    getcontext(&context);
    context.uc_stack.ss_sp = m.stacks + t * kStack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, fiber_main, 0);
  }
}

// Reported last: had another thread read what the copy writes, that would say more.
void check_copies() {
  for (size_t t = 0; t < m.fibers.size() && m.report.empty(); ++t) {
    std::vector<Copy> copies = m.fibers[t].open;
    for (const auto& group : m.fibers[t].groups) copies.insert(copies.end(), group.begin(), group.end());
    if (copies.empty()) continue;
    Memory& memory = *find(copies[0].to);
    const ptrdiff_t offset = copies[0].to - memory.data();
    fail("asynchronous copy not waited for",
         bytes_of(memory, offset, 16) + line(str(thread_name(static_cast<int>(t)), " started the copy at ",
                                                 place(memory.cells()[offset].write.pc), ", and returned")));
  }
}

void run_block() {
  while (!m.ready.empty() && m.report.empty()) {
    std::swap(m.ready[m.random() % m.ready.size()], m.ready.back());
    m.current = m.ready.back();
    m.ready.pop_back();
    threadIdx = {static_cast<unsigned>(m.current)};
    swapcontext(&m.scheduler, &self().context);
    m.current = -1;
  }
  if (m.report.empty() && !m.suspicion.empty()) fail(m.suspicion);
  if (m.report.empty() && std::any_of(m.fibers.begin(), m.fibers.end(), [](const Fiber& f) { return !f.returned; }))
    fail("barrier not reached by all threads", where_threads_are());
  check_copies();
}

}  // namespace

// --- For the host ---

Memory::Memory(std::string name, const void* from, size_t bytes, Kind kind)
    : name_(std::move(name)), allocation_(new char[2 * kGuard + kAlign + bytes + 64]), size_(bytes), kind_(kind) {
  // A tensor's storage begins at a multiple of 512 bytes on the device and of 64 here.
  const auto begin = (reinterpret_cast<uintptr_t>(allocation_) + kGuard + kAlign - 1) / kAlign * kAlign;
  data_ = reinterpret_cast<char*>(begin + reinterpret_cast<uintptr_t>(from) % 64);
  if (kind != Kind::input) cells_.resize(bytes);
  forget_everything();
  if (kind == Kind::input || kind == Kind::inout) {
    if (bytes) std::memcpy(data_, from, bytes);
    for (Cell& cell : cells_) cell.written = true;
  }
  m.memories.push_back(this);
}

Memory::~Memory() {
  std::erase(m.memories, this);
  delete[] allocation_;
}

void Memory::copy_to(void* host) const {
  if (size_) std::memcpy(host, data_, size_);
}

void Memory::forget_accesses() {
  for (Cell& cell : cells_) {
    cell.write = {};
    cell.reads.clear();
  }
}

void Memory::forget_everything() {
  forget_accesses();
  for (Cell& cell : cells_) cell.written = cell.in_flight = false;
  std::memset(data_, kPoison, size_);
}

uint32_t seed() { return m.seed; }
void set_seed(uint32_t seed) { m.seed = seed; }
void allow_uninitialised(bool allow) { m.uninitialised_allowed = allow; }

const char* run(const void* kernel, dim3 grid, int threads, int shared_bytes, void (*body)(const void*),
                const void* context) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      threads < 1 || threads > kMostThreads || shared_bytes < 0 || shared_bytes > kMostShared)
    return "simt: invalid configuration of a launch";
  if (!m.stacks)
    m.stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads)};
  m.kernel = kernel;
  m.body = body;
  m.body_context = context;
  m.random.seed(m.seed);
  m.report.clear();
  m.suspicion.clear();
  for (Memory* memory : m.memories) memory->forget_accesses();
  m.dynamic_shared = std::make_unique<Memory>("dynamic shared memory", nullptr, shared_bytes, Memory::Kind::shared);

  std::vector<uint32_t> blocks(grid.x * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<uint32_t>(i);
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (uint32_t block : blocks) {
    start_block(block, threads);
    run_block();
    if (!m.report.empty()) break;
  }
  m.dynamic_shared.reset();
  m.static_shared.clear();
  return m.report.empty() ? nullptr : m.report.c_str();
}

const char* fill_zero(void* p, size_t bytes) {
  if (bytes == 0) return nullptr;
  Memory* const memory = find(p);
  char* const begin = static_cast<char*>(p);
  if (!memory || memory->kind() == Memory::Kind::input || begin < memory->data() ||
      begin + bytes > memory->data() + memory->size())
    return "simt: zeros out of bounds of global memory, or to an input";
  std::memset(p, 0, bytes);
  for (size_t i = 0; i < bytes; ++i) memory->cells()[begin - memory->data() + i].written = true;
  return nullptr;
}

// --- For the wrappers ---

char* shared_memory() { return m.dynamic_shared->data(); }

void* static_shared(const void* key, const char* name, size_t bytes) {
  std::unique_ptr<Memory>& variable = m.static_shared[key];
  if (!variable) variable = std::make_unique<Memory>(name, nullptr, bytes, Memory::Kind::shared);
  return variable->data();
}

uint32_t shared_address(const void* p) {
  Memory* const memory = find_shared(p, "shared_address");
  const size_t number = std::find(m.memories.begin(), m.memories.end(), memory) - m.memories.begin();
  return static_cast<uint32_t>((number << kOffsetBits) + Memory::kGuard +
                               (static_cast<const char*>(p) - memory->data()));
}

char* shared_pointer(uint32_t address) {
  const size_t number = address >> kOffsetBits;
  if (number >= m.memories.size() || m.memories[number]->kind() != Memory::Kind::shared)
    fail("out of bounds of shared memory",
         line(str("address ", address, ", far from all variables")) + line(thread_name(m.current)));
  return m.memories[number]->data() + (address & ((1u << kOffsetBits) - 1)) - Memory::kGuard;
}

const Lanes& exchange(const char* op, std::initializer_list<uint32_t> values, Site site) {
  Warp& warp = m.warps[m.current / kLanes];
  const int lane = m.current % kLanes;
  arrive(op, site);
  if (warp.gathering.active == 0) {
    warp.op = op;
    warp.site = site;
  } else if (std::string_view(op) != warp.op ||
             (op != kSyncWarp && (site.line() != warp.site.line() || site.column() != warp.site.column()))) {
    fail("lanes of a warp at different operations",
         line(str(thread_name(m.current), " is at ", op, ", ", place(site))) +
             line(str("others are at ", warp.op, ", ", place(warp.site))));
  }
  std::copy(values.begin(), values.end(), warp.gathering.values[lane]);
  warp.gathering.active |= 1u << lane;
  complete(warp);
  yield();
  return warp.done;
}

uint32_t value_of(const Lanes& lanes, int lane, int i, const char* op, Site site) {
  if (!(lanes.active >> lane & 1))
    fail(str(op, " from an inactive lane"),
         line(str(thread_name(m.current), " wants the value of lane ", lane, " at ", place(site))));
  return lanes.values[lane][i];
}

uint32_t votes(const Lanes& lanes) {
  uint32_t out = 0;
  for (int i = 0; i < kLanes; ++i)
    if (lanes.active >> i & lanes.values[i][0] & 1) out |= 1u << i;
  return out;
}

void sync_warp(Site site) { exchange(kSyncWarp.data(), {}, site); }

void barrier(int id, int threads, Site site) {
  if (id < 0 || id >= kBarriers) fail("no such barrier", line(str("number ", id, " at ", place(site))));
  Barrier& b = m.barriers[id];
  const int wanted = id == 0 ? static_cast<int>(m.fibers.size()) : threads;
  if (!b.waiting.empty() && b.threads != wanted)
    fail("barrier with different numbers of threads",
         line(str(b.threads, " so far; ", wanted, " at ", place(site), " in ", thread_name(m.current))));
  b.threads = wanted;
  b.waiting.push_back(m.current);
  arrive(id == 0 ? "sync_block" : "sync_threads", site);
  if (static_cast<int>(b.waiting.size()) == b.threads) {
    order(b.waiting);
    wake(b.waiting);
    b.waiting.clear();
  }
  yield();
}

void async_copy(void* to_shared, const void* from, size_t bytes) {
  const void* const pc = __builtin_return_address(0);
  Memory* const memory = find_shared(to_shared, "async_copy");
  touch(from, bytes, Op::read, pc);
  access(*memory, to_shared, bytes, Op::write, pc);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = memory->cells()[static_cast<char*>(to_shared) - memory->data() + i];
    cell.in_flight = true;
    cell.written = false;
  }
  self().open.push_back({static_cast<char*>(to_shared), static_cast<const char*>(from), bytes});
}

void async_commit() {
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

void async_wait(size_t groups) {
  auto& pending = self().groups;
  for (; pending.size() > groups; pending.erase(pending.begin()))
    for (const Copy& copy : pending.front()) {
      Memory* const memory = find(copy.to);
      std::memcpy(copy.to, copy.from, copy.bytes);
      for (size_t i = 0; i < copy.bytes; ++i) {
        Cell& cell = memory->cells()[copy.to - memory->data() + i];
        cell.in_flight = false;
        cell.written = true;
        cell.write.clock = m.clocks[m.current][m.current];
      }
    }
}

void check_aligned(const void* p, size_t bytes, const char* op, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail("misaligned access",
         line(str(op, " wants ", bytes, " aligned bytes at ", place(site), ", ", thread_name(m.current))));
}

void touch_atomically(void* p, size_t bytes, const void* pc, bool reads) {
  touch(p, bytes, reads ? Op::atomic : Op::atomic_store, pc);
}

}  // namespace effk::simt

// --- What the compiler calls ---

using effk::simt::misaligned;
using effk::simt::Op;
using effk::simt::touch;

extern "C" {

#define EFFK_HOOKS(n)                                                                            \
  void __tsan_read##n(void* p) { touch(p, n, Op::read, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { touch(p, n, Op::write, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##n(void* p) { touch(p, n, Op::read, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { touch(p, n, Op::write, __builtin_return_address(0)); }
EFFK_HOOKS(1)
EFFK_HOOKS(2)
EFFK_HOOKS(4)
EFFK_HOOKS(8)
EFFK_HOOKS(16)
#undef EFFK_HOOKS
void __tsan_read_range(void* p, size_t n) { touch(p, n, Op::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { touch(p, n, Op::write, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// -fsanitize=alignment
void __ubsan_handle_type_mismatch_v1(void*, void* p) { misaligned(p, __builtin_return_address(0)); }
}
