// Between storage and math types: conversions with round-to-nearest-even, and copies that bypass the caches.
#pragma once
#include <cstdint>

#include "../plan.h"

namespace samkern::cpu {

// Reads n values of x from element `at`. fp64 read as float is rounded.
void load(const Operand& x, int64_t at, int64_t n, float* to);
void load(const Operand& x, int64_t at, int64_t n, double* to);

// Writes n values to x from element `at`. double becomes a half type by way of float, as in torch.
void store(const Operand& x, int64_t at, int64_t n, const float* from);
void store(const Operand& x, int64_t at, int64_t n, const double* from);

// memcpy, or with `streamed` stores that neither read nor keep the target's cache lines: for targets that are larger
// than the cache and not needed soon. Streamed stores become visible to other threads at stream_fence().
void copy_bytes(void* to, const void* from, int64_t n_bytes, bool streamed);
void stream_fence();

// Size of the last-level cache in bytes, as the system reports it; 32 MB where it does not.
int64_t last_level_cache();

}  // namespace samkern::cpu
