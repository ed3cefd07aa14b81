// What half-precision weights made of their perturbation: eps vanishes where it is below half a unit in the last place.
#pragma once
#include "harness.cuh"

namespace samkern::cuda {

enum Realised { kMovedSq, kMovedEps, kEpsSq, kNRealised };

// What a thread has seen of it.
template <typename T>
struct RealisedSums {
  T moved_sq = 0, moved_eps = 0, eps_sq = 0;

  SAMKERN_DEVICE void add(T moved, T eps) {
    moved_sq += moved * moved;
    moved_eps += moved * eps;
    eps_sq += eps * eps;
  }
};

// Leaves the sums of a chunk in its place. Every thread of the block must come.
template <typename T>
SAMKERN_DEVICE void leave_realised(const PlanView& plan, int32_t chunk, const RealisedSums<T>& seen) {
  double realised[kNRealised] = {static_cast<double>(seen.moved_sq), static_cast<double>(seen.moved_eps),
                                 static_cast<double>(seen.eps_sq)};
  block_sum(realised);
  if (device::thread() != 0) return;
  for (int s = 0; s < kNRealised; ++s) plan.partials[static_cast<int64_t>(chunk) * kNSums + s] = realised[s];
}

// By one block, when all chunks are done.
static SAMKERN_COLD void report_realised(const PlanView& plan, double* report) {
  double sums[kNRealised] = {};
  for (int32_t c = device::thread(); c < plan.n_chunks; c += device::kThreads) {
    const int32_t t = plan.chunk_tensor[c];
    if (plan.saved[t].address == nullptr || size_of(plan.w[t].dtype) != 2) continue;
    for (int s = 0; s < kNRealised; ++s) sums[s] += device::read_shared(plan.partials + int64_t{c} * kNSums + s);
  }
  block_sum(sums);
  if (device::thread() != 0) return;
  report[kRealisedNorm] = sqrt(sums[kMovedSq]);
  report[kRealisedShare] = sums[kMovedEps] / sums[kEpsSq];  // NaN: nothing was measured
}

}  // namespace samkern::cuda
