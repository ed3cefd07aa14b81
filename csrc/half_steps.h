// What half-steps and passes are told, on every backend. Pointers are to memory of the device on which the plan's
// tensors are, but for `climbs` and `groups`, which lie on the host.
#pragma once
#include "plan.h"

namespace samkern {

// Groups that a launch on a GPU carries with it; of more, a copy lies on the device.
constexpr int32_t kCarriedGroups = 64;

struct ReduceOptions {
  const Operand* a = nullptr;
  const Operand* b = nullptr;          // null: no sums with b
  const ClimbGroup* climbs = nullptr;  // [n_groups] whose T weighs a in kTT; null: no kTT
  bool weights = false;                // sum w^2 of every tensor, whether or not its group's climb needs it
};

struct PerturbOptions {
  const ClimbGroup* climbs = nullptr;  // [n_groups]
  int32_t n_groups = 0;
  const ClimbGroup* climb_table = nullptr;  // a copy on the device, where a launch cannot carry that many
  Scaling scaling;                          // of plan.first
  double* report = nullptr;                 // [kNReport], written
};

struct UpdateOptions {
  Base base = Base::kNone;
  const BaseGroup* groups = nullptr;  // [n_groups]
  int32_t n_groups = 0;
  const BaseGroup* group_table = nullptr;  // a copy on the device, where a launch cannot carry that many
  MixOptions mix;
  Scaling scaling;           // of plan.grad and plan.first
  bool looked = false;       // plan.grad was taken at w + eps
  bool restores = true;      // plan.saved holds the weights where it has an address; else it is not read
  bool hands_over = false;   // u goes to plan.out
  bool check = true;         // skip the step if plan.grad is not finite
  double max_grad_norm = 0;  // 0: no clipping
  double* report = nullptr;  // [kNReport], as perturb left it if the step looked; else written
  int64_t* skips = nullptr;  // counts skipped steps

  // Whether sums over the gradients are needed before the update may begin.
  bool reduces() const { return check || max_grad_norm > 0 || mix.mix != Mix::kGradient; }
};

// What a caller who has his own scalars tells the apply phase of an update. Null: does not skip, factor 1.
struct Applied {
  const bool* skip = nullptr;
  const double* clip = nullptr;
};

// What samkern._cuda hands to samkern._C: cuda/launchers.h. The functions set the device, take its current stream,
// launch, and throw if that fails.
struct DeviceFunctions {
  void (*perturb)(const PlanView& plan, const PerturbOptions& options, int device);
  void (*restore)(const PlanView& plan, int device);
  void (*update)(const PlanView& plan, const UpdateOptions& options, int device);
  void (*reduce)(const PlanView& plan, const ReduceOptions& options, int device);
  void (*perturb_apply)(const PlanView& plan, const PerturbOptions& options, int device);
  void (*update_apply)(const PlanView& plan, const UpdateOptions& options, const Applied& applied, int device);
  int (*n_blocks)(int device);       // that are resident at the same time
  bool (*is_capturing)(int device);  // whether the current stream records a graph
  bool on_host;                      // compiled for the CPU, for tests: they work on the host's memory
};

}  // namespace samkern
