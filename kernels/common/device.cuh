// Everything that device code may ask of the machine, in one file of thin wrappers: warps, barriers, asynchronous
// copies, tensor cores, launches. Kernels use these and threadIdx, blockIdx, blockDim and gridDim, and no other
// CUDA function, so that giving this file another meaning runs them elsewhere.
#pragma once

#include <cstdint>
#include <type_traits>

#include "float_bits.h"

#if defined(EFFK_SIMT)
#include "simt/device.h"  // on the CPU, under a checker: docs/simt.md
#else
#include <cuda_runtime.h>

#define EFFK_DEVICE __device__ __forceinline__
// At least `blocks` blocks of `threads` threads share a multiprocessor, which bounds the registers of a thread.
#define EFFK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A parameter that threads read where the launch has put it, at any index, without a copy of their own.
#define EFFK_GRID_CONSTANT(type) const __grid_constant__ type
// A variable in static shared memory, such as EFFK_SHARED(int[32], sums).
#define EFFK_SHARED(type, name) __shared__ std::type_identity_t<type> name

namespace effk::gpu {

constexpr int kWarp = 32;

// --- Threads of a block ---

EFFK_DEVICE void sync_block() { __syncthreads(); }
// Waits for `threads` threads, whole warps, at a barrier from 1 to 15.
EFFK_DEVICE void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Also orders the memory accesses of the warp's threads.
EFFK_DEVICE void sync_warp() { __syncwarp(); }

EFFK_DEVICE uint32_t shuffle(uint32_t v, int lane) { return __shfl_sync(~0u, v, lane); }
EFFK_DEVICE uint32_t shuffle_up(uint32_t v, int by) { return __shfl_up_sync(~0u, v, by); }
EFFK_DEVICE float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
// Bit i: v of lane i.
EFFK_DEVICE uint32_t vote(bool v) { return __ballot_sync(~0u, v); }

EFFK_DEVICE uint32_t popcount(uint32_t v) { return __popc(v); }

// Dynamic shared memory, aligned to 16 bytes.
EFFK_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char effk_shared[];
  return effk_shared;
}

// An address in shared memory for take_shared().
EFFK_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// If `present` isn't 0, reads a V at the address into the low bits of v (an int8_t with its sign extended) and steps
// over it. Two predicated instructions; in C++ it takes more.
template <class V>
EFFK_DEVICE void take_shared(uint32_t& v, uint32_t& address, uint32_t present) {
#define EFFK_TAKE(type)                                                  \
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p ld.shared." type \
               " %0, [%1];\n"                                            \
               "@p add.u32 %1, %1, %3;}"                                 \
               : "+r"(v), "+r"(address)                                  \
               : "r"(present), "n"(sizeof(V))                            \
               : "memory")
  if constexpr (sizeof(V) == 1)
    EFFK_TAKE("s8");
  else if constexpr (sizeof(V) == 2)
    EFFK_TAKE("u16");
  else
    EFFK_TAKE("b32");
#undef EFFK_TAKE
}

// --- Memory ---

// 16 aligned bytes that nothing writes during the kernel, to be read again soon or only once.
EFFK_DEVICE uint4 load_reused(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
EFFK_DEVICE uint4 load_once(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
// Stores 16 aligned bytes that nobody needs soon.
EFFK_DEVICE void store_once(void* p, const uint4& v) { __stcs(static_cast<uint4*>(p), v); }
// load_reused() if `present`, else zeros. In C++ the compiler copies a part of the result, and so waits for it.
EFFK_DEVICE uint4 load_reused_if(const void* p, bool present) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "@p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<uint32_t>(present)));
  return v;
}

// Copies 16 (or 4) aligned bytes from global to shared memory. A thread's copies up to async_commit() are a group, and
// async_wait<N>() waits until all but its latest N groups are complete, and only for the thread's own copies.
template <int kBytes = 16>
EFFK_DEVICE void async_copy(void* to_shared, const void* from) {
  static_assert(kBytes == 16 || kBytes == 4);
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
}
EFFK_DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
EFFK_DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Adds in no order with other accesses; the old value comes back.
template <class T>
EFFK_DEVICE T atomic_add(T* p, T v) {
  return atomicAdd(p, v);
}
// Stores whole where other threads may do so too: one of them wins.
template <class T>
EFFK_DEVICE void atomic_store(T* p, T v) {
  static_assert(sizeof(T) == 4);
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Four 8x8 matrices of 16 bits from shared memory: lanes 8i to 8i + 7 give the rows of matrix i, 16 aligned bytes
// each; m[i] is its row lane / 4, columns lane % 4 * 2 and the next.
EFFK_DEVICE void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// --- Arithmetic ---

// Byte i of the result is the byte of (high, low), counted from the lowest, that the i-th nibble of the selector says.
EFFK_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// The low halves of two registers in one.
EFFK_DEVICE uint32_t join_halves(uint32_t low, uint32_t high) { return permute_bytes(low, high, 0x5410); }

// Each rounded on its own: never joined to one multiply-add.
EFFK_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
EFFK_DEVICE float sum(float a, float b) { return __fadd_rn(a, b); }

// Two floats rounded to a register of two 16-bit floats, the first one in the low half.
template <class X>
EFFK_DEVICE uint32_t pack_pair(float low, float high) {
  static_assert(sizeof(X) == 2);
  uint32_t pair;
  if constexpr (std::is_same_v<X, Half>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The two numbers of such a register.
template <class X>
EFFK_DEVICE void unpack_pair(uint32_t pair, float& low, float& high) {
  static_assert(sizeof(X) == 2);
  if constexpr (std::is_same_v<X, Half>) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
  } else {
    low = float_of(pair << 16);
    high = float_of(pair & 0xffff0000);
  }
}

// c += a b with a [16, 16], b [16, 8], c [16, 8]. With g = lane / 4 and t = lane % 4, a lane holds of
//   a: (g, 2t..) (g+8, 2t..) (g, 2t+8..) (g+8, 2t+8..), pairs of columns
//   b: (2t.., g) (2t+8.., g), pairs of rows
//   c: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1)
template <class X>
EFFK_DEVICE void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#define EFFK_MMA(type)                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<X, Half>)
    EFFK_MMA("f16");
  else
    EFFK_MMA("bf16");
#undef EFFK_MMA
}

// c += a b with a [16, 8], b [8, 8] in TF32, float32 cut to its upper 19 bits.
//   a: (g, t) (g+8, t) (g, t+4) (g+8, t+4)
//   b: (t, g) (t+4, g); c as above
EFFK_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b with a [16, 32], b [32, 8] of int8.
//   a: (g, 4t..) (g+8, 4t..) (g, 4t+16..) (g+8, 4t+16..), four columns
//   b: (4t.., g) (4t+16.., g), four rows; c as above
EFFK_DEVICE void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- Host side ---

using Stream = cudaStream_t;
// What went wrong, or null.
using Error = const char*;

inline Error error_of(cudaError_t e) { return e == cudaSuccess ? nullptr : cudaGetErrorString(e); }

// Whether the library has no code of the kernel for the GPU, or only PTX that the driver can't compile.
inline bool has_no_code(const void* kernel) {
  cudaFuncAttributes attributes;
  const cudaError_t e = cudaFuncGetAttributes(&attributes, kernel);
  cudaGetLastError();  // forgets it
  return e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction ||
         e == cudaErrorUnsupportedPtxVersion || e == cudaErrorJitCompilerNotFound ||
         e == cudaErrorJitCompilationDisabled;
}

// Launches the kernel as NVRTC compiles it for the GPU: csrc/common/nvrtc.cu. args are pointers to the arguments.
Error launch_compiled(const void* kernel, dim3 grid, int threads, int shared_bytes, Stream stream, void** args);
extern bool always_compiled;  // even if the library has the code

template <class... Params, class... Args>
Error launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes, Stream stream, const Args&... args) {
  constexpr int kAlwaysAllowed = 32 << 10;  // of 48 KiB, since a kernel's static variables count too
  const auto code = reinterpret_cast<const void*>(kernel);
  if (!always_compiled) {
    cudaError_t e = cudaSuccess;
    if (shared_bytes > kAlwaysAllowed)
      e = cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (e == cudaSuccess) kernel<<<grid, threads, shared_bytes, stream>>>(args...);
    e = cudaGetLastError();  // of either
    if (e == cudaSuccess || !has_no_code(code)) return error_of(e);
  }
  const auto launch_with = [&](Params... params) {  // of the kernel's own types
    void* pointers[] = {&params...};
    return launch_compiled(code, grid, threads, shared_bytes, stream, pointers);
  };
  return launch_with(args...);
}

inline Error zero(void* p, size_t bytes, Stream stream) { return error_of(cudaMemsetAsync(p, 0, bytes, stream)); }

}  // namespace effk::gpu

#endif
