// perturb: saved = w;  w = w + scale * direction, with the norms of the gradient in front. One launch.
#include "launchers.h"
#include "realised.cuh"
#include "start.cuh"

namespace samkern::cuda {
namespace {

struct PerturbArgs {
  PlanView plan;
  Groups<ClimbGroup> climbs;
  Scaling scaling;
  double* report;    // null: the scales are the caller's, in plan.coeffs
  bool renormalise;  // by the norm of the masked gradient
  bool along_momentum;
  const double* momentum_sq;  // null: sums have been folded
  int32_t phases;
  bool together;  // in one launch
};

SAMKERN_DEVICE bool is_masked(const PerturbArgs& args, int32_t t) {
  return mask_of(args.plan, args.renormalise, t).address != nullptr;
}

// Norms of one tensor, and its share in the norm that eps is divided by.
SAMKERN_COLD void fold_phase(const PerturbArgs& args) {
  const PlanView& plan = args.plan;
  const double inverse_sq = unscale(args.scaling) * unscale(args.scaling);
  auto add = [&](int32_t t, int lane, int n_lanes, double (&sums)[kCC]) {
    const ClimbGroup& group = group_of(args.climbs, plan, t);
    add_partials(plan, t, lane, n_lanes, sums);
    const bool filters = climb_for(plan, plan.first, t, &group) == Climb::kFilter;
    if (filters) add_filters(plan, t, is_masked(args, t), group.eta, lane, n_lanes, sums);
  };
  fold_tensors(plan, add, [&](int32_t t, const double (&sums)[kCC]) {
    const ClimbGroup& group = group_of(args.climbs, plan, t);
    const double tt = scalars::weighted_sq(group, sums[kWW], is_masked(args, t) ? sums[kTT] : sums[kAA], sums[kTT]);
    plan.sums_of(kAA)[t] = sums[kAA] * inverse_sq;
    plan.sums_of(kWW)[t] = sums[kWW];
    plan.sums_of(kTT)[t] = value(group.rho) > 0 ? tt * inverse_sq : 0;
  });
}

struct Norms {
  double gg, ww, tt;
};

// Of one tensor, squared. Moments come with theirs, and then nothing was reduced.
SAMKERN_DEVICE Norms norms_of(const PerturbArgs& args, int32_t t) {
  const PlanView& plan = args.plan;
  if (args.momentum_sq != nullptr) {
    const double gg = plan.first[t].address != nullptr ? args.momentum_sq[t] : 0;
    return {gg, 0, value(group_of(args.climbs, plan, t).rho) > 0 ? gg : 0};
  }
  return {device::read_shared(plan.sums_of(kAA) + t), device::read_shared(plan.sums_of(kWW) + t),
          device::read_shared(plan.sums_of(kTT) + t)};
}

struct Decided {
  bool finite;
  double grad_norm, norm;
};

SAMKERN_COLD Decided decide(const PerturbArgs& args) {
  const PlanView& plan = args.plan;
  double x[3] = {};
  for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
    const Dtype dtype = plan.w[t].dtype;
    const auto [gg, ww, tt] = norms_of(args, t);
    x[0] += gg;
    x[1] += tt;
    const bool finite = scalars::finite(gg, dtype) && scalars::finite(ww, dtype) && scalars::finite(tt, dtype);
    x[2] += finite ? 0 : 1;
  }
  block_sum(x);
  return {x[2] == 0 && !found_inf(args.scaling), args.along_momentum ? 0 : sqrt(x[0]), sqrt(x[1])};
}

// Filter-wise: T_f^2 is applied in double and rounded once.
template <typename T, int N>
SAMKERN_DEVICE void climb_filters(const PlanView& plan, int32_t tensor, int64_t at, double scale, double eta,
                                  const T (&w)[N], const T (&g)[N], T (&climbed)[N]) {
  const Filters filters = plan.filters[tensor];
  const int64_t run = at / filters.stride;
  int64_t filter = run % filters.count, in_run = at - run * filters.stride;
  auto scale_of = [&] {
    const double t = sqrt(device::read_shared(plan.filter_ww + filters.first + filter)) + eta;
    return static_cast<T>(scale * (t * t));
  };
  T s = scale_of();
  for (int k = 0; k < N; ++k) {
    if (in_run == filters.stride) {
      in_run = 0;
      filter = filter + 1 == filters.count ? 0 : filter + 1;
      s = scale_of();
    }
    climbed[k] = math::climb(w[k], g[k], s);
    ++in_run;
  }
}

template <typename T, int N>
SAMKERN_DEVICE void climb(const PlanView& plan, Climb how, const ClimbGroup& group, double scale, int32_t tensor,
                          int64_t at, const T (&w)[N], const T (&g)[N], T (&climbed)[N]) {
  const T s = static_cast<T>(scale), eta = static_cast<T>(group.eta);
  switch (how) {
    case Climb::kFilter: return climb_filters(plan, tensor, at, scale, group.eta, w, g, climbed);
    case Climb::kElement:
      for (int k = 0; k < N; ++k) climbed[k] = math::climb_element(w[k], g[k], s, eta);
      return;
    case Climb::kSign:
    case Climb::kLayerSign:
      for (int k = 0; k < N; ++k) climbed[k] = math::climb_sign(w[k], g[k], s);
      return;
    default:
      for (int k = 0; k < N; ++k) climbed[k] = math::climb(w[k], g[k], s);
  }
}

template <Kind kind_w, Kind kind_g, typename T>
SAMKERN_DEVICE void perturb_chunk(const PerturbArgs& args, const ClimbGroup& group, double scale, const Chunk& chunk) {
  const PlanView& plan = args.plan;
  const Operand w = plan.w[chunk.tensor], saved = plan.saved[chunk.tensor], first = plan.first[chunk.tensor];
  const Operand mask = plan.mask[chunk.tensor];
  const Climb how = climb_of(group, plan.filters[chunk.tensor]);
  const bool half = size_of(w.dtype) == 2, climbs = std::isfinite(scale);
  RealisedSums<T> realised;
  for_block<kPack<kind_w, T>>(chunk.n, aligned(w) && aligned(saved) && aligned(first), [&](auto width, int32_t i) {
    constexpr int N = decltype(width)::value;
    T values[N], g[N] = {}, climbed[N];
    // In front: no load passes the store of what is saved.
    const uint32_t bits = load_bits<N>(mask, chunk.at + i);
    if (climbs) load<kind_g>(first, chunk.at + i, g);
    load_and_save<kind_w>(w, saved, chunk.at + i, values);
    if (!climbs) return;
    climb(plan, how, group, scale, chunk.tensor, chunk.at + i, values, g, climbed);
    if (mask.address != nullptr) {
      for (int k = 0; k < N; ++k) climbed[k] = (bits >> k & 1) != 0 ? climbed[k] : values[k];
      store_some<kind_w>(w, chunk.at + i, climbed, bits);
    } else {
      store<kind_w>(w, chunk.at + i, climbed);
    }
    if (!half) return;
    round_to<kind_w>(w, climbed, g);  // g is not needed any more
    for (int k = 0; k < N; ++k) realised.add(g[k] - values[k], climbed[k] - values[k]);
  });
  if (half) leave_realised(plan, chunk.index, realised);
}

SAMKERN_DEVICE double scale_of(const PerturbArgs& args, const Decided& decided, int32_t t) {
  const PlanView& plan = args.plan;
  if (args.report == nullptr) return plan.coeffs_of(kScale)[t];
  if (!decided.finite) return NAN;
  // kTT is the sum of g^2 that the norm is made of, where the scale of a tensor depends on its gradient.
  const Norms of = norms_of(args, t);
  const ClimbGroup& group = group_of(args.climbs, plan, t);
  const double scale = scalars::climb_scale(group, of.ww, of.tt, decided.norm, unscale(args.scaling));
  return args.along_momentum ? -scale : scale;
}

template <Kind kind_w, Kind kind_g>
SAMKERN_DEVICE void apply_phase(const PerturbArgs& args) {
  const PlanView& plan = args.plan;
  const bool reports = args.report != nullptr;
  const Decided decided = reports ? decide(args) : Decided{};
  if (reports && device::block() == 0 && device::thread() == 0) {
    args.report[kGradNorm] = decided.grad_norm;
    args.report[kSecondNorm] = args.report[kUpdateNorm] = 0;
    args.report[kPerturbNorm] = decided.norm;
    args.report[kSkippedFirst] = decided.finite ? 0 : 1;
    args.report[kSkippedSecond] = 0;
    if constexpr (kind_w == Kind::kFloat32) {
      args.report[kRealisedNorm] = 0;
      args.report[kRealisedShare] = NAN;
    }
  }
  for (int32_t c = plan.block_begin[device::block() + 1] - 1; c >= plan.block_begin[device::block()]; --c) {
    const Chunk chunk = chunk_at(plan, c);
    if (plan.saved[chunk.tensor].address == nullptr) continue;
    const ClimbGroup& group = group_of(args.climbs, plan, chunk.tensor);
    const double scale = scale_of(args, decided, chunk.tensor);
    with_math_type<kind_w>(plan.w[chunk.tensor], [&](auto zero) {
      perturb_chunk<kind_w, kind_g, decltype(zero)>(args, group, scale, chunk);
    });
  }
  if constexpr (kind_w != Kind::kFloat32) {  // there, block 0 has reported that there are no half types
    if (reports && is_last_block(plan)) report_realised(plan, args.report);
  }
}

template <Kind kind_w, Kind kind_g>
SAMKERN_KERNEL perturb_kernel(SAMKERN_ARGUMENT PerturbArgs args) {
  const PlanView& plan = args.plan;
  if ((args.phases & kReducePhase) != 0) {
    auto climb_group = [&](int32_t t) { return &group_of(args.climbs, plan, t); };
    const bool filters = plan.filter_ww != nullptr;
    reduce_phase<kind_g, kind_g, kind_w>(plan, {plan.first, nullptr, filters, false, args.renormalise}, climb_group);
    end_phase(args.together);
  }
  if ((args.phases & kFoldPhase) != 0) {
    fold_phase(args);
    end_phase(args.together);
  }
  if ((args.phases & kApplyPhase) != 0) apply_phase<kind_w, kind_g>(args);
}

const char* start_perturb(const PlanView& plan, const PerturbOptions& options, int32_t phases,
                          const device::Stream& stream) {
  PerturbArgs args{.plan = plan,
                   .climbs = {},
                   .scaling = options.scaling,
                   .report = options.report,
                   .renormalise = options.renormalise,
                   .along_momentum = options.along_momentum,
                   .momentum_sq = options.momentum_sq,
                   .phases = phases,
                   .together = false};
  set_groups(args.climbs, options.climbs, options.climb_table, options.n_groups);
  switch (kind_of(plan)) {
    case Kind::kFloat32: return start(perturb_kernel<Kind::kFloat32, Kind::kFloat32>, args, stream, options.after_sums);
    case Kind::kBFloat16:
      return start(perturb_kernel<Kind::kBFloat16, Kind::kBFloat16>, args, stream, options.after_sums);
    case Kind::kFloat16: return start(perturb_kernel<Kind::kFloat16, Kind::kFloat16>, args, stream, options.after_sums);
    default: return start(perturb_kernel<Kind::kAny, Kind::kAny>, args, stream, options.after_sums);
  }
}

}  // namespace

const char* perturb(const PlanView& plan, const PerturbOptions& options, const device::Stream& stream) {
  return start_perturb(plan, options, options.momentum_sq != nullptr ? kApplyPhase : kAllPhases, stream);
}

const char* perturb_apply(const PlanView& plan, const PerturbOptions& options, const device::Stream& stream) {
  return start_perturb(plan, options, kApplyPhase, stream);
}

}  // namespace samkern::cuda
