// Launches kernels that NVRTC compiles at first use, for a GPU that the library has no code for: docs/nvrtc.md.
// python_api/_nvrtc.py compiles and loads them.
#include <cuda.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "../../kernels/common/device.cuh"

namespace effk::gpu {
namespace {

// Gives a kernel for a device, ready to be launched with all the shared memory that a block may have; or null, and why
// in `error`, of `size` bytes.
using Loader = CUfunction (*)(const char* name, int device, char* error, size_t size);
Loader loader = nullptr;

// The mangled names of all kernels. The runtime tells those of kernels that it could load, and so of none here.
std::map<const void*, const char*>& names() {
  static std::map<const void*, const char*> all;  // first used before this file's own variables are there
  return all;
}

// A kernel of a device, kept forever; or null, and why.
CUfunction load(const void* kernel, int device, std::string& error) {
  static std::map<std::pair<const void*, int>, CUfunction> all;
  static std::mutex mutex;
  const std::pair key{kernel, device};
  {
    const std::lock_guard lock(mutex);
    if (const auto found = all.find(key); found != all.end()) return found->second;
  }
  // Not under the lock: Python has one of its own, and another thread may wait here while it holds that.
  char text[2048] = "the library has no code for this GPU";
  const auto name = names().find(kernel);
  CUfunction const function =
      loader && name != names().end() ? loader(name->second, device, text, sizeof(text)) : nullptr;
  if (!function) return error = text, nullptr;
  const std::lock_guard lock(mutex);
  return all.try_emplace(key, function).first->second;
}

}  // namespace

bool always_compiled = false;

Error launch_compiled(const void* kernel, dim3 grid, int threads, int shared_bytes, Stream stream, void** args) {
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device); e != cudaSuccess) return error_of(e);
  thread_local std::string error;  // there until the thread's next one
  CUfunction const function = load(kernel, device, error);
  if (!function) return error.c_str();

  // Of the driver, which isn't linked to: the library also loads where there is none.
  void* launch = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t e = cudaGetDriverEntryPointByVersion("cuLaunchKernel", &launch, 12000, cudaEnableDefault, &result);
  if (e != cudaSuccess) return error_of(e);
  if (result != cudaDriverEntryPointSuccess) return "the driver has no cuLaunchKernel";
  const CUresult done = reinterpret_cast<decltype(&cuLaunchKernel)>(launch)(
      function, grid.x, grid.y, grid.z, static_cast<unsigned>(threads), 1, 1, static_cast<unsigned>(shared_bytes),
      stream, args, nullptr);
  return error_of(static_cast<cudaError_t>(done));  // the same numbers
}

}  // namespace effk::gpu

extern "C" {

// In place of the runtime's function (-Wl,--wrap), which initializers call with every kernel of the library.
void __real___cudaRegisterFunction(void** code, const char* kernel, char* name, const char* device_name, int, uint3*,
                                   uint3*, dim3*, dim3*, int*);
void __wrap___cudaRegisterFunction(void** code, const char* kernel, char* name, const char* device_name, int threads,
                                   uint3* tid, uint3* bid, dim3* block, dim3* grid, int* warp) {
  effk::gpu::names()[kernel] = device_name;
  __real___cudaRegisterFunction(code, kernel, name, device_name, threads, tid, bid, block, grid, warp);
}

// For bindings. `always` compiles even what the library has code for.
void effk_set_kernel_loader(effk::gpu::Loader loader, int always) {
  effk::gpu::loader = loader;
  effk::gpu::always_compiled = always && !effk::gpu::names().empty();
}

// Gives every kernel's mangled name to a function.
void effk_each_kernel(void (*call)(const char* name)) {
  for (const auto& [_, name] : effk::gpu::names()) call(name);
}
}
