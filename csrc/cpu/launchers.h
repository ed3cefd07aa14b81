// The CPU kernels. Each works on the host view of a plan, needs its operands set there, and returns when it is done.
#pragma once
#include "../half_steps.h"
#include "harness.h"

namespace samkern::cpu {

// Fills plan.sums, and the tables of filters for groups that climb by filters. An operand without address counts as
// zero.
void reduce(const PlanView& plan, const ReduceOptions& options, const Pool& pool);

// Multiplies a row of plan.sums: sums over scaled gradients become those of the gradients.
void scale_sums(const PlanView& plan, Sum which, double factor);

// Half-step: norms of plan.first, saved = w, w = w + eps for every tensor with an address in plan.saved. A gradient
// that is not finite leaves w as it is; saved is written all the same, so that the update need not know.
void perturb(const PlanView& plan, const PerturbOptions& options, const Pool& pool);

// The apply phase of perturb alone, with plan.coeffs[kScale] as the caller set it; a climb by filters needs the tables
// of an earlier reduce. A scale that is not finite leaves w as it is. `report` may be null.
void perturb_apply(const PlanView& plan, const PerturbOptions& options, const Pool& pool);

// saved = w, w = w + std n z for every tensor with an address in plan.saved. A norm that is not finite leaves all w.
void perturb_by_noise(const PlanView& plan, const NoiseOptions& options, const Pool& pool);

// w = saved, for every tensor with an address in plan.saved.
void restore(const PlanView& plan, const Pool& pool);

// Half-step: norms of plan.grad, restore, mix, write the cache, clip, base update. Tensors without a gradient are only
// restored; so are all when the step is skipped.
void update(const PlanView& plan, const UpdateOptions& options, const Pool& pool);

// The apply phase of update alone: coefficients kProject, kMixA, kMixB in plan.coeffs are the caller's. A written cache
// leaves its sum of squares in plan.sums[kCC].
void update_apply(const PlanView& plan, const UpdateOptions& options, const Applied& applied, const Pool& pool);

// Writes plan.mask. plan.grad is in the order of the mask's bits.
void select_mask(const PlanView& plan, const SelectOptions& options, const Pool& pool);

// Fills plan.sums[kAA] with the sums of (plan.grad - plan.first) (plan.cache - plan.state1).
void difference_dot(const PlanView& plan, const Pool& pool);

void fisher_accumulate(const PlanView& plan, const FisherOptions& options, const Pool& pool);

}  // namespace samkern::cpu
