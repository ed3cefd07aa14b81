// From a launcher's arguments to launches.
#pragma once
#include "harness.cuh"

namespace samkern::cuda {

template <typename Group>
void set_groups(Groups<Group>& groups, const Group* host, const Group* table, int32_t n) {
  groups.table = n > kCarriedGroups ? table : nullptr;
  for (int32_t i = 0; i < n && n <= kCarriedGroups; ++i) groups.carried[i] = host[i];
}

inline Kind kind_of(const PlanView& plan) {
  switch (plan.common_dtype) {
    case static_cast<int32_t>(Dtype::kFloat32): return Kind::kFloat32;
    case static_cast<int32_t>(Dtype::kBFloat16): return Kind::kBFloat16;
    case static_cast<int32_t>(Dtype::kFloat16): return Kind::kFloat16;
    default: return Kind::kAny;
  }
}

// One launch of all phases where blocks may wait for each other, else one launch a phase. Returns an error text or
// null. `after_sums` is called between two of them.
template <typename Args>
const char* start(void (*kernel)(Args), Args args, const device::Stream& stream,
                  const AfterSums* after_sums = nullptr) {
  const int32_t wanted = args.phases;
  args.together = stream.one_launch && wanted != kApplyPhase && after_sums == nullptr;
  if (args.together || wanted == kApplyPhase) {
    return device::launch(kernel, args, args.plan.n_blocks, args.together, stream);
  }
  for (const Phase phase : {kReducePhase, kFoldPhase, kApplyPhase}) {
    if ((wanted & phase) == 0) continue;
    args.phases = phase;
    if (const char* error = device::launch(kernel, args, args.plan.n_blocks, false, stream)) return error;
    if (phase == kFoldPhase && after_sums != nullptr) (*after_sums)();
  }
  return nullptr;
}

}  // namespace samkern::cuda
