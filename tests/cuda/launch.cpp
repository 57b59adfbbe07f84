// gpu::launch on a GPU that the program has no code for. Runtime and driver are those below, which note what is asked
// of them; nothing runs. Built and run by test_nvrtc.py.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

// launch.cu
const char* launch(float* p, int n, int shared_bytes);

namespace {

thread_local int device = 0;
cudaError_t answer = cudaSuccess;  // of an ordinary launch
thread_local cudaError_t last = cudaSuccess;
std::atomic<int> launches, compiled_launches, loads;
std::string loaded_name, launched;
CUfunction const kFunction = reinterpret_cast<CUfunction>(0x1234);

cudaError_t note(cudaError_t e) { return last = e; }

CUresult launch_kernel(CUfunction f, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                       unsigned shared, CUstream stream, void** args, void**) {
  if (f != kFunction) return CUDA_ERROR_INVALID_HANDLE;
  if (compiled_launches++ == 0)
    launched = std::to_string(x) + ' ' + std::to_string(y) + ' ' + std::to_string(z) + ' ' + std::to_string(threads) +
               ' ' + std::to_string(shared) + ' ' + std::to_string(reinterpret_cast<intptr_t>(stream)) + " (" +
               std::to_string(**static_cast<float**>(args[0])) + ' ' + std::to_string(*static_cast<long*>(args[1])) +
               ')';
  return CUDA_SUCCESS;
}

CUfunction load(const char* name, int on, char* error, size_t size) {
  ++loads;
  loaded_name = name;
  if (on == 9) std::snprintf(error, size, "no luck with device %d", on);
  return on == 9 ? nullptr : kFunction;
}

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("not so: %s\n", what);
  std::exit(1);
}

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
char __cudaInitModule(void**) { return 0; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  ++launches;
  return note(answer == cudaSuccess ? cudaSuccess : cudaErrorLaunchFailure);  // whatever it was
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return note(answer); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return note(answer); }
cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorLaunchFailure ? "launch failure" : "other"; }
cudaError_t cudaGetDevice(int* d) { return *d = device, cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  check(!std::strcmp(name, "cuLaunchKernel"), "the driver is asked for cuLaunchKernel");
  *f = reinterpret_cast<void*>(launch_kernel);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

void effk_set_kernel_loader(CUfunction (*)(const char*, int, char*, size_t), int always);
void effk_each_kernel(void (*)(const char*));
}

int main() {
  float x = 2.5f;
  const auto launch = [&](int shared_bytes = 0) { return ::launch(&x, 6, shared_bytes); };
  const auto says = [](const char* error, const char* text) { return error && !std::strcmp(error, text); };
  constexpr int kMuch = 100 << 10;  // of shared memory

  effk_set_kernel_loader(load, 0);
  check(!launch() && !launch(kMuch) && launches == 2, "a launch that works is left alone");
  answer = cudaErrorLaunchFailure;
  check(says(launch(), "launch failure") && says(launch(kMuch), "launch failure"), "other errors come back");
  check(loads == 0 && last == cudaSuccess, "nothing was compiled, and the error is forgotten");

  answer = cudaErrorNoKernelImageForDevice;
  check(!launch() && !launch() && !launch(kMuch) && loads == 1 && compiled_launches == 3, "compiled once");
  effk_each_kernel([](const char* name) { check(loaded_name == name, "by the kernel's name"); });
  check(loaded_name.find("kernel") != std::string::npos, "which is there");
  check(launched == "3 4 5 64 0 7 (2.500000 6)", launched.c_str());

  for (device = 1; const cudaError_t e :
                   {cudaErrorInvalidDeviceFunction, cudaErrorUnsupportedPtxVersion, cudaErrorJitCompilerNotFound}) {
    answer = e;
    check(!launch() && loads == ++device, "and once for each device");
  }

  device = 9;
  for (int i = 0; i < 2; ++i) check(says(launch(), "no luck with device 9"), "why there is none");
  check(loads == 6, "it is asked for again");

  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] {
      device = 10;
      for (int j = 0; j < 100; ++j) check(!launch(), "from several threads");
    });
  for (std::thread& t : threads) t.join();
  check(loads > 6 && loads <= 6 + 8, "which ask for it once each at most");

  device = 11;
  effk_set_kernel_loader(nullptr, 0);
  check(says(launch(), "the library has no code for this GPU"), "without a loader");

  answer = cudaSuccess;
  device = 0;
  launches = compiled_launches = 0;
  effk_set_kernel_loader(load, 1);
  check(!launch(kMuch) && launches == 0 && compiled_launches == 1, "always, if wanted");
  std::puts("all so");
}
