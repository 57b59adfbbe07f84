// A kernel, launched: launch.cpp.
#include "../../kernels/common/device.cuh"

namespace {

template <class T>
__global__ void kernel(T* p, long n) {
  p[n] = 1;
}

}  // namespace

const char* launch(float* p, int n, int shared_bytes) {
  return effk::gpu::launch(kernel<float>, dim3(3, 4, 5), 64, shared_bytes, reinterpret_cast<cudaStream_t>(7), p, n);
}
