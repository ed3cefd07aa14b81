// What half-steps and passes are told, on every backend. Pointers are to memory of the device on which the plan's
// tensors are, but for `climbs` and `groups`, which lie on the host.
#pragma once
#include <functional>

#include "plan.h"

namespace samkern {

// Called when the sums over gradients are in plan.sums, one per tensor, and before anybody reads them: adds what other
// processes have of the same tensors. Null: the tensors are whole. Then a half-step is several launches on a GPU.
using AfterSums = std::function<void()>;

// Groups that a launch on a GPU carries with it; of more, a copy lies on the device.
constexpr int32_t kCarriedGroups = 64;

struct ReduceOptions {
  const Operand* a = nullptr;
  const Operand* b = nullptr;          // null: no sums with b
  const ClimbGroup* climbs = nullptr;  // [n_groups] whose T weighs a in kTT; null: no kTT
  bool weights = false;                // sum w^2 of every tensor, whether or not its group's climb needs it
  bool masked = false;                 // kTT sums over the entries that plan.mask lets through
};

struct PerturbOptions {
  const ClimbGroup* climbs = nullptr;  // [n_groups]
  int32_t n_groups = 0;
  const ClimbGroup* climb_table = nullptr;  // a copy on the device, where a launch cannot carry that many
  Scaling scaling;                          // of plan.first
  double* report = nullptr;                 // [kNReport], written
  bool renormalise = false;                 // the norm that eps is divided by is that of the masked gradient
  // plan.first are first moments, against which w moves. `scaling` has nothing to undo then.
  bool along_momentum = false;
  const double* momentum_sq = nullptr;  // [n_tensors] their sums of squares, if known: then nothing is reduced
  const AfterSums* after_sums = nullptr;
};

// w = w + std n z, std being rho of the group and z normal numbers.
struct NoiseOptions {
  const ClimbGroup* climbs = nullptr;  // [n_groups]
  int32_t n_groups = 0;
  const ClimbGroup* climb_table = nullptr;  // a copy on the device, where a launch cannot carry that many
  uint64_t seed = 0;
  uint32_t t = 0, draw = 0;       // of the noise
  int64_t first = 0;              // place of the list's first entry in the list that the noise is of
  const double* norms = nullptr;  // [n_norms] n of every dim-0 slice; null: by the climbs
  int64_t n_norms = 0;
  bool from_saved = false;   // w = saved + std n z, with norms of saved
  bool norms_known = false;  // plan.sums and the tables of filters have them
  double* report = nullptr;  // [kNReport], written; null: not wanted
};

struct UpdateOptions {
  Base base = Base::kNone;
  const BaseGroup* groups = nullptr;  // [n_groups]
  int32_t n_groups = 0;
  const BaseGroup* group_table = nullptr;  // a copy on the device, where a launch cannot carry that many
  MixOptions mix;
  Scaling scaling;                // of plan.grad and plan.first
  bool looked = false;            // plan.grad was taken at w + eps
  bool restores = true;           // plan.saved holds the weights where it has an address; else it is not read
  bool hands_over = false;        // u goes to plan.out
  bool check = true;              // skip the step if plan.grad is not finite
  double max_grad_norm = 0;       // 0: no clipping
  double* report = nullptr;       // [kNReport], as perturb left it if the step looked; else written
  int64_t* skips = nullptr;       // counts skipped steps
  double* momentum_sq = nullptr;  // [n_tensors] the sum of squares of every state1 that is written; null: not wanted
  AverageOptions average;         // of plan.average; not with Base::kNone
  const AfterSums* after_sums = nullptr;

  // Whether sums over the gradients are needed before the update may begin.
  bool reduces() const { return check || max_grad_norm > 0 || mix.mix == Mix::kDecompose || mix.mix == Mix::kReuse; }
};

// What a caller who has his own scalars tells the apply phase of an update. Null: does not skip, factor 1.
struct Applied {
  const bool* skip = nullptr;
  const double* clip = nullptr;
};

// What a selection does to plan.mask. Ties go to the lowest place in the list.
enum class Select : int32_t {
  kTop,       // ones are the n largest of plan.grad
  kGrow,      // the n zeros with the largest random keys become ones
  kDropGrow,  // the n ones with the smallest |plan.grad| become zeros, and then as many zeros become ones as by kGrow
};

struct SelectOptions {
  Select what = Select::kTop;
  int64_t n = 0;       // of kTop: at most all entries; kGrow and kDropGrow take no more than there are
  uint64_t seed = 0;   // of the random keys, with
  uint32_t t = 0;      // the step
  bool regrow = true;  // kDropGrow: what has just been dropped may grow again; else plan.saved is the mask before
  const bool* skip = nullptr;    // kDropGrow: if true, nothing changes
  int64_t* n_nan = nullptr;      // kTop: written, the number of NaNs, which rank last
  bool wide = false;             // some entry of plan.grad is fp64
  uint64_t* counters = nullptr;  // [n_select_counters()] zeros; only on a GPU
};

// F = keep F + gain (scale g)^2, F in plan.w and g in plan.grad.
struct FisherOptions {
  double keep = 1, gain = 1;
  const double* scale = nullptr;  // null: 1
  const bool* skip = nullptr;     // if true, nothing changes
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
  void (*select_mask)(const PlanView& plan, const SelectOptions& options, int device);
  int64_t (*n_select_counters)(const PlanView& plan, const SelectOptions& options);
  void (*fisher_accumulate)(const PlanView& plan, const FisherOptions& options, int device);
  void (*difference_dot)(const PlanView& plan, int device);
  void (*perturb_by_noise)(const PlanView& plan, const NoiseOptions& options, int device);
  int (*n_blocks)(int device);       // that are resident at the same time
  bool (*is_capturing)(int device);  // whether the current stream records a graph
  bool on_host;                      // compiled for the CPU, for tests: they work on the host's memory
};

}  // namespace samkern
