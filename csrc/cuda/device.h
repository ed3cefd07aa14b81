// The few features of a device that kernels use. Nothing below csrc/cuda calls CUDA in any other way, so that the tests
// can compile the same kernels for the CPU, run every thread as a fiber, and shuffle who runs when (SAMKERN_ON_CPU).
#pragma once
#include <cstdint>

#include "grid.h"

namespace samkern::device {

struct alignas(16) Bits16 {
  uint32_t words[4];
};
struct alignas(8) Bits8 {
  uint32_t words[2];
};

}  // namespace samkern::device

#if defined(SAMKERN_ON_CPU)
#include "cuda_on_cpu.h"
#else
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SAMKERN_DEVICE __device__ __forceinline__
// For what runs once a launch: its registers do not count against those of the loops over elements.
#define SAMKERN_COLD __device__ __noinline__
#define SAMKERN_KERNEL \
  __global__ void __launch_bounds__(samkern::device::kThreads, samkern::device::kBlocksPerProcessor)
#define SAMKERN_ARGUMENT const __grid_constant__

namespace samkern::device {

SAMKERN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
SAMKERN_DEVICE int block() { return static_cast<int>(blockIdx.x); }
SAMKERN_DEVICE int n_blocks() { return static_cast<int>(gridDim.x); }

// Every thread of the block must come; writes before it are seen by all of the block after it.
SAMKERN_DEVICE void block_sync() { __syncthreads(); }

// Every thread of a grid that was launched as one must come; writes before it are seen by all after it.
SAMKERN_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

// All 32 lanes must come. A lane beyond the last gives the caller's own x.
SAMKERN_DEVICE double shuffle_down(double x, int by) { return __shfl_down_sync(0xffffffffU, x, by); }
SAMKERN_DEVICE uint64_t shuffle_down(uint64_t x, int by) { return __shfl_down_sync(0xffffffffU, x, by); }

// N values that the block shares; one array for every type, size and id.
template <typename T, int N, int id>
SAMKERN_DEVICE T* shared() {
  __shared__ T values[N];
  return values;
}

// Adds to a counter of the block, in its shared memory, as one access. Orders nothing else.
SAMKERN_DEVICE void add_in_block(uint32_t* counter, uint32_t x) { atomicAdd(counter, x); }

// The same to one of the grid, in global memory.
SAMKERN_DEVICE void add_in_grid(uint64_t* counter, uint64_t x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(x));
}

// Counts up to `last` and then starts at 0 again. Returns the count before. Orders the caller's earlier writes before
// it.
SAMKERN_DEVICE uint32_t arrive(uint32_t* counter, uint32_t last) {
  __threadfence();
  return atomicInc(counter, last);
}

// After the last arrival: what the others wrote before theirs is seen.
SAMKERN_DEVICE void acquire() { __threadfence(); }

// Reads what another block of this grid may have written: past the first-level cache.
SAMKERN_DEVICE double read_shared(const double* x) { return __ldcg(x); }
SAMKERN_DEVICE uint64_t read_shared(const uint64_t* x) {
  return __ldcg(reinterpret_cast<const unsigned long long*>(x));
}

// Addresses in a table are generic to the compiler; these lie in global memory.
template <typename T>
SAMKERN_DEVICE T* in_global(T* x) {
  __builtin_assume(__isGlobal(x));
  return x;
}

SAMKERN_DEVICE Bits16 load(const Bits16* from) {
  const uint4 x = *in_global(reinterpret_cast<const uint4*>(from));
  return {{x.x, x.y, x.z, x.w}};
}
SAMKERN_DEVICE Bits8 load(const Bits8* from) {
  const uint2 x = *in_global(reinterpret_cast<const uint2*>(from));
  return {{x.x, x.y}};
}

// `streamed`: not needed soon, evicted first.
SAMKERN_DEVICE void store(Bits16* to, const Bits16& x, bool streamed) {
  const uint4 bits = make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]);
  auto* target = in_global(reinterpret_cast<uint4*>(to));
  streamed ? __stcs(target, bits) : static_cast<void>(*target = bits);
}
SAMKERN_DEVICE void store(Bits8* to, const Bits8& x, bool streamed) {
  const uint2 bits = make_uint2(x.words[0], x.words[1]);
  auto* target = in_global(reinterpret_cast<uint2*>(to));
  streamed ? __stcs(target, bits) : static_cast<void>(*target = bits);
}

SAMKERN_DEVICE int count_ones(uint32_t x) { return __popc(x); }

SAMKERN_DEVICE float half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }
SAMKERN_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
SAMKERN_DEVICE float as_float(uint32_t x) { return __uint_as_float(x); }
SAMKERN_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }

// Starts `kernel` on the stream; `together`: as one grid whose blocks may wait for each other. Returns an error text or
// null.
template <typename Args>
const char* launch(void (*kernel)(Args), const Args& args, int n_blocks, bool together, const Stream& stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(n_blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  config.attrs = &attribute;
  config.numAttrs = together ? 1 : 0;
  cudaError_t status = cudaLaunchKernelEx(&config, kernel, args);
  const cudaError_t last = cudaGetLastError();  // taken away: torch would blame its own next launch for it
  if (status == cudaSuccess) status = last;
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace samkern::device
#endif
