// Normal numbers of the entries of a list, a block at a time.
#pragma once
#include "../half_steps.h"
#include "harness.h"

namespace samkern::cpu {

// Those of entries [at, at + n) of a tensor's memory, n <= kBlock. Returns where in `buffer` they begin.
float* fill_normals(const PlanView& plan, const NoiseOptions& noise, int32_t tensor, int64_t at, int64_t n,
                    float (&buffer)[kBlock + 4]);

}  // namespace samkern::cpu
