// reduce: sums of squares and products of whole tensor lists, per tensor and over all. One launch.
#include "harness.cuh"
#include "launchers.h"
#include "start.cuh"

namespace samkern::cuda {
namespace {

struct ReduceArgs {
  PlanView plan;
  Reduction what;
  ClimbGroup climb;
  int32_t phases;
  bool together;  // in one launch
};

SAMKERN_DEVICE bool is_masked(const ReduceArgs& args, int32_t t) {
  return mask_of(args.plan, args.what.masked, t).address != nullptr;
}

SAMKERN_DEVICE void fold_phase(const ReduceArgs& args) {
  const PlanView& plan = args.plan;
  auto add = [&](int32_t t, int lane, int n_lanes, double (&sums)[kCC]) {
    add_partials(plan, t, lane, n_lanes, sums);
    const bool filters = climb_for(plan, args.what.a, t, &args.climb) == Climb::kFilter;
    if (filters) add_filters(plan, t, is_masked(args, t), args.climb.eta, lane, n_lanes, sums);
  };
  fold_tensors(plan, add, [&](int32_t t, const double (&sums)[kCC]) {
    for (int32_t s = 0; s < kTT; ++s) plan.sums_of(static_cast<Sum>(s))[t] = sums[s];
    plan.sums_of(kTT)[t] =
        scalars::weighted_sq(args.climb, sums[kWW], is_masked(args, t) ? sums[kTT] : sums[kAA], sums[kTT]);
  });
}

// The sums over all tensors, by one block.
SAMKERN_DEVICE void add_tensors(const PlanView& plan) {
  double total[kCC] = {};
  for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
    for (int32_t s = 0; s < kCC; ++s) total[s] += device::read_shared(plan.sums_of(static_cast<Sum>(s)) + t);
  }
  block_sum(total);
  if (device::thread() != 0) return;
  for (int32_t s = 0; s < kCC; ++s) plan.sums_of(static_cast<Sum>(s))[plan.n_tensors] = total[s];
}

template <Kind kind>
SAMKERN_KERNEL reduce_kernel(SAMKERN_ARGUMENT ReduceArgs args) {
  if ((args.phases & kReducePhase) != 0) {
    reduce_phase<kind, kind, kind>(args.plan, args.what, [&](int32_t) { return &args.climb; });
    end_phase(args.together);
  }
  if ((args.phases & kFoldPhase) != 0) {
    fold_phase(args);
    if (is_last_block(args.plan)) add_tensors(args.plan);
  }
}

}  // namespace

const char* reduce(const PlanView& plan, const ReduceOptions& options, const device::Stream& stream) {
  const Reduction what{options.a, options.b, plan.filter_ww != nullptr, options.weights, options.masked};
  const ReduceArgs args{plan, what, *options.climbs, kReducePhase | kFoldPhase, false};
  switch (kind_of(plan)) {
    case Kind::kFloat32: return start(reduce_kernel<Kind::kFloat32>, args, stream);
    case Kind::kBFloat16: return start(reduce_kernel<Kind::kBFloat16>, args, stream);
    case Kind::kFloat16: return start(reduce_kernel<Kind::kFloat16>, args, stream);
    default: return start(reduce_kernel<Kind::kAny>, args, stream);
  }
}

}  // namespace samkern::cuda
