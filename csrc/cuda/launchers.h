// The GPU kernels: half-steps on a view in device memory, started on a stream. They return null, or why a launch
// failed.
#pragma once
#include "../half_steps.h"
#include "grid.h"

namespace samkern::cuda {

const char* perturb(const PlanView& plan, const PerturbOptions& options, const device::Stream& stream);
const char* perturb_by_noise(const PlanView& plan, const NoiseOptions& options, const device::Stream& stream);
const char* restore(const PlanView& plan, const device::Stream& stream);
const char* update(const PlanView& plan, const UpdateOptions& options, const device::Stream& stream);

// The passes alone, with the caller's scalars: csrc/cpu/launchers.h. All tensors are in the first group.
const char* reduce(const PlanView& plan, const ReduceOptions& options, const device::Stream& stream);
const char* difference_dot(const PlanView& plan, const device::Stream& stream);
const char* perturb_apply(const PlanView& plan, const PerturbOptions& options, const device::Stream& stream);
const char* update_apply(const PlanView& plan, const UpdateOptions& options, const Applied& applied,
                         const device::Stream& stream);

const char* select_mask(const PlanView& plan, const SelectOptions& options, const device::Stream& stream);
int64_t n_select_counters(const PlanView& plan, const SelectOptions& options);
const char* fisher_accumulate(const PlanView& plan, const FisherOptions& options, const device::Stream& stream);

}  // namespace samkern::cuda
