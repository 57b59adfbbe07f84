// What the CUDA sides of all families need of torch: the current stream, beyond the stable ABI of libtorch_cpu.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "../../kernels/common/indices.cuh"
#include "check.h"

namespace effk::cuda {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

// A function of libtorch_cuda, which is loaded when a CUDA tensor exists. It can't be linked to: libraries that name
// its symbols don't load with a CPU-only torch.
template <class F>
F* torch_function(const char* name) {
  void* const library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
  void* const function = library ? dlsym(library, name) : nullptr;
  STD_TORCH_CHECK(function, "effk: ", name, " was not found in libtorch_cuda.so");
  return reinterpret_cast<F*>(function);
}

// Calls an op of torch that the stable ABI has no function for; gives its first result.
template <class... Args>
Tensor call_torch(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline cudaStream_t current_stream(const Tensor& t) {
  static auto* const get = torch_function<AOTITorchError(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int attribute(const char* op, cudaDeviceAttr which, const Tensor& t) {
  int n = 0;
  const cudaError_t e = cudaDeviceGetAttribute(&n, which, t.get_device_index());
  EFFK_CHECK(e == cudaSuccess, op, "CUDA: ", cudaGetErrorString(e));
  return n;
}

inline int num_sms(const char* op, const Tensor& t) { return attribute(op, cudaDevAttrMultiProcessorCount, t); }

// Of shared memory, that a block may have.
inline int most_shared_bytes(const char* op, const Tensor& t) {
  return attribute(op, cudaDevAttrMaxSharedMemoryPerBlockOptin, t);
}

// Of a launcher: null or what went wrong.
inline void check(const char* op, const char* error) { EFFK_CHECK(!error, op, "CUDA: ", error); }

// A contiguous tensor of indices, and what keeps it alive.
struct IndexTensor {
  OptTensor tensor;
  Indices args;
};

inline IndexTensor indices(const OptTensor& t) {
  if (!t) return {std::nullopt, {nullptr, false}};
  const Tensor contiguous = as_contiguous(*t);
  return {contiguous, {contiguous.const_data_ptr(), t->scalar_type() == ScalarType::Long}};
}

inline Tensor workspace(const Tensor& like, int64_t bytes) {
  return empty_like_device(like, {bytes}, ScalarType::Byte);
}

// The tensor, or a copy of it where a view begins in between: kernels load 16 bytes at a time.
inline Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

}  // namespace effk::cuda
