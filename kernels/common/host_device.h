// Lets one header serve the host compiler, nvcc and the host-side emulation of CUDA.
#pragma once

#if defined(__CUDACC__)
#define EFFK_HD __host__ __device__ __forceinline__
#define EFFK_UNROLL _Pragma("unroll")
#else
// Always inlined, since an out-of-line copy could be the one that a file for another CPU level compiled.
#define EFFK_HD __attribute__((always_inline)) inline
#define EFFK_UNROLL _Pragma("GCC unroll 16")
#endif
