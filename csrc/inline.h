// Functions that host and device share.
#pragma once

#if defined(__CUDACC__)
#define SAMKERN_INLINE __host__ __device__ __forceinline__
#else
#define SAMKERN_INLINE inline __attribute__((always_inline))
#endif
