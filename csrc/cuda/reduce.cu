// reduce and difference_dot: sums of squares and products of whole tensor lists, per tensor and over all. One launch.
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

// The first n sums over all tensors, by one block.
template <int n>
SAMKERN_DEVICE void add_tensors(const PlanView& plan) {
  double total[n] = {};
  for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
    for (int32_t s = 0; s < n; ++s) total[s] += device::read_shared(plan.sums_of(static_cast<Sum>(s)) + t);
  }
  block_sum(total);
  if (device::thread() != 0) return;
  for (int32_t s = 0; s < n; ++s) plan.sums_of(static_cast<Sum>(s))[plan.n_tensors] = total[s];
}

template <Kind kind>
SAMKERN_KERNEL reduce_kernel(SAMKERN_ARGUMENT ReduceArgs args) {
  if ((args.phases & kReducePhase) != 0) {
    reduce_phase<kind, kind, kind>(args.plan, args.what, [&](int32_t) { return &args.climb; });
    end_phase(args.together);
  }
  if ((args.phases & kFoldPhase) != 0) {
    fold_phase(args);
    if (is_last_block(args.plan)) add_tensors<kCC>(args.plan);
  }
}

struct DifferenceArgs {
  PlanView plan;
  int32_t phases;
  bool together;  // in one launch
};

// The partial sum of one chunk, added like those of reduce_chunk.
template <Kind kind, typename T>
SAMKERN_DEVICE void multiply_differences(const PlanView& plan, const Chunk& chunk) {
  const Operand a = plan.grad[chunk.tensor], b = plan.first[chunk.tensor];
  const Operand c = plan.cache[chunk.tensor], d = plan.state1[chunk.tensor];
  const bool packed = aligned(a) && aligned(b) && aligned(c) && aligned(d);
  T sum = 0;
  for_block<kPack<kind, T>, 2>(chunk.n, packed, [&](auto width, int32_t i) {
    constexpr int N = decltype(width)::value;
    T va[N], vb[N], vc[N], vd[N];
    load<kind>(a, chunk.at + i, va);
    load<kind>(b, chunk.at + i, vb);
    load<kind>(c, chunk.at + i, vc);
    load<kind>(d, chunk.at + i, vd);
    for (int k = 0; k < N; ++k) sum += (va[k] - vb[k]) * (vc[k] - vd[k]);
  });
  double total[1] = {static_cast<double>(sum)};
  block_sum(total);
  if (device::thread() == 0) plan.partials[static_cast<int64_t>(chunk.index) * kNSums + kAA] = total[0];
}

SAMKERN_DEVICE void fold_differences(const PlanView& plan) {
  auto add = [&](int32_t t, int lane, int n_lanes, double (&sums)[kCC]) {
    for (int32_t c = plan.first_chunk[t] + lane; c < plan.first_chunk[t + 1]; c += n_lanes) {
      sums[kAA] += device::read_shared(plan.partials + static_cast<int64_t>(c) * kNSums + kAA);
    }
  };
  fold_tensors(plan, add, [&](int32_t t, const double (&sums)[kCC]) { plan.sums_of(kAA)[t] = sums[kAA]; });
}

template <Kind kind>
SAMKERN_KERNEL difference_kernel(SAMKERN_ARGUMENT DifferenceArgs args) {
  const PlanView& plan = args.plan;
  if ((args.phases & kReducePhase) != 0) {
    for (int32_t c = plan.block_begin[device::block()]; c < plan.block_begin[device::block() + 1]; ++c) {
      const Chunk chunk = chunk_at(plan, c);
      with_math_type<kind>(plan.w[chunk.tensor],
                           [&](auto zero) { multiply_differences<kind, decltype(zero)>(plan, chunk); });
    }
    end_phase(args.together);
  }
  if ((args.phases & kFoldPhase) != 0) {
    fold_differences(plan);
    if (is_last_block(plan)) add_tensors<1>(plan);
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

const char* difference_dot(const PlanView& plan, const device::Stream& stream) {
  const DifferenceArgs args{plan, kReducePhase | kFoldPhase, false};
  switch (kind_of(plan)) {
    case Kind::kFloat32: return start(difference_kernel<Kind::kFloat32>, args, stream);
    case Kind::kBFloat16: return start(difference_kernel<Kind::kBFloat16>, args, stream);
    case Kind::kFloat16: return start(difference_kernel<Kind::kFloat16>, args, stream);
    default: return start(difference_kernel<Kind::kAny>, args, stream);
  }
}

}  // namespace samkern::cuda
