// perturb_by_noise: saved = w;  w = w + std n z, z standard normal and never stored, with the norms n of the weights in
// front. One launch.
#include "../normals.h"
#include "../philox.h"
#include "launchers.h"
#include "realised.cuh"
#include "start.cuh"

namespace samkern::cuda {
namespace {

struct NoiseArgs {
  PlanView plan;
  Groups<ClimbGroup> climbs;
  NoiseOptions options;
  int32_t phases;
  bool together;  // in one launch
};

// How a tensor moves; kEuclidean: not at all.
SAMKERN_DEVICE Climb noise_of(const NoiseArgs& args, int32_t t) {
  if (args.plan.saved[t].address == nullptr) return Climb::kEuclidean;
  return climb_of(group_of(args.climbs, args.plan, t), args.plan.filters[t]);
}

// The weights that noise is added to, and whose norms count.
SAMKERN_DEVICE Operand clean(const NoiseArgs& args, int32_t t) {
  return args.options.from_saved ? args.plan.saved[t] : args.plan.w[t];
}

// ---- norms. Squares are added in double.

template <Kind kind, typename T>
SAMKERN_DEVICE void sum_chunk(const NoiseArgs& args, const Chunk& chunk) {
  const Operand w = clean(args, chunk.tensor);
  double sum[1] = {};
  for_block<kPack<kind, T>, 2>(chunk.n, aligned(w), [&](auto width, int32_t i) {
    T values[decltype(width)::value];
    load<kind>(w, chunk.at + i, values);
    for (const T x : values) sum[0] += static_cast<double>(x) * static_cast<double>(x);
  });
  block_sum(sum);
  if (device::thread() == 0) args.plan.partials[static_cast<int64_t>(chunk.index) * kNSums + kWW] = sum[0];
}

// One filter, by the lanes of one warp.
template <Kind kind, typename T>
SAMKERN_DEVICE void sum_filter(const NoiseArgs& args, int32_t tensor, int64_t filter) {
  const PlanView& plan = args.plan;
  const Operand w = clean(args, tensor);
  const Filters filters = plan.filters[tensor];
  const int64_t per_filter = plan.numel[tensor] / filters.count;
  double sum = 0;
  for (int64_t q = device::thread() % device::kWarp; q < per_filter; q += device::kWarp) {
    const int64_t run = per_filter == filters.stride ? 0 : q / filters.stride;
    T x[1];
    load<kind>(w, (run * filters.count + filter) * filters.stride + (q - run * filters.stride), x);
    sum += static_cast<double>(x[0]) * static_cast<double>(x[0]);
  }
  sum = warp_sum(sum);
  if (device::thread() % device::kWarp == 0) plan.filter_ww[filters.first + filter] = sum;
}

template <Kind kind>
SAMKERN_DEVICE void sum_phase(const NoiseArgs& args) {
  const PlanView& plan = args.plan;
  for (int32_t index = device::block(); index < plan.n_filter_runs; index += device::n_blocks()) {
    const FilterRun run = plan.filter_runs[index];
    if (noise_of(args, run.tensor) != Climb::kNoiseFilter) continue;
    with_math_type<kind>(clean(args, run.tensor), [&](auto zero) {
      for (int64_t f = device::thread() / device::kWarp; f < run.count; f += device::kWarps) {
        sum_filter<kind, decltype(zero)>(args, run.tensor, run.first + f);
      }
    });
  }
  for (int32_t c = plan.block_begin[device::block()]; c < plan.block_begin[device::block() + 1]; ++c) {
    const Chunk chunk = chunk_at(plan, c);
    if (noise_of(args, chunk.tensor) != Climb::kNoiseTensor) continue;
    with_math_type<kind>(clean(args, chunk.tensor), [&](auto zero) { sum_chunk<kind, decltype(zero)>(args, chunk); });
  }
}

SAMKERN_COLD void fold_phase(const NoiseArgs& args) {
  const PlanView& plan = args.plan;
  auto add = [&](int32_t t, int lane, int n_lanes, double (&sums)[kCC]) {
    if (noise_of(args, t) == Climb::kNoiseFilter) {
      const Filters filters = plan.filters[t];
      for (int64_t f = lane; f < filters.count; f += n_lanes) {
        sums[kWW] += device::read_shared(plan.filter_ww + filters.first + f);
      }
    }
    if (noise_of(args, t) == Climb::kNoiseTensor) {
      for (int32_t c = plan.first_chunk[t] + lane; c < plan.first_chunk[t + 1]; c += n_lanes) {
        sums[kWW] += device::read_shared(plan.partials + int64_t{c} * kNSums + kWW);
      }
    }
  };
  fold_tensors(plan, add, [&](int32_t t, const double (&sums)[kCC]) { plan.sums_of(kWW)[t] = sums[kWW]; });
}

// Whether all norms are finite: those given, or those of the weights that move.
SAMKERN_COLD bool norms_are_finite(const NoiseArgs& args) {
  const PlanView& plan = args.plan;
  double bad[1] = {};
  if (args.options.norms != nullptr) {
    for (int64_t i = device::thread(); i < args.options.n_norms; i += device::kThreads) {
      bad[0] += std::isfinite(args.options.norms[i]) ? 0 : 1;
    }
  } else {
    for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
      if (plan.saved[t].address == nullptr) continue;
      const Dtype dtype = args.options.report != nullptr ? plan.w[t].dtype : Dtype::kFloat64;
      bad[0] += scalars::finite(device::read_shared(plan.sums_of(kWW) + t), dtype) ? 0 : 1;
    }
  }
  block_sum(bad);
  return bad[0] == 0;
}

// ---- numbers

// The four of block q.
SAMKERN_DEVICE void normals_of(const NoiseOptions& noise, int64_t q, float& z0, float& z1, float& z2, float& z3) {
  const philox::Words words = philox::noise_words(q, noise.t, noise.draw, noise.seed);
  const float length = normals::length(words.x[0]), other_length = normals::length(words.x[2]);
  const normals::Turn turn = normals::turn(words.x[1]), other_turn = normals::turn(words.x[3]);
  z0 = length * turn.cosine;
  z1 = length * turn.sine;
  z2 = other_length * other_turn.cosine;
  z3 = other_length * other_turn.sine;
}

// That of one place in the list.
SAMKERN_COLD float normal_at(const NoiseOptions& noise, int64_t place) {
  const philox::Words words = philox::noise_words(place / 4, noise.t, noise.draw, noise.seed);
  const bool second = (place & 2) != 0;
  const float length = normals::length(second ? words.x[2] : words.x[0]);
  const normals::Turn turn = normals::turn(second ? words.x[3] : words.x[1]);
  return length * ((place & 1) != 0 ? turn.sine : turn.cosine);
}

// Those of N neighbours from `place` on: of as many blocks as they lie in, shifted to where they begin.
template <int N>
SAMKERN_DEVICE void normals_from(const NoiseOptions& noise, int64_t place, float (&z)[N]) {
  constexpr int kBlocks = (N + 6) / 4;
  const int offset = static_cast<int>(place & 3);
  float all[4 * kBlocks] = {};
  for (int b = 0; b < kBlocks; ++b) {
    if (4 * b < N || 4 * b < offset + N) {
      normals_of(noise, place / 4 + b, all[4 * b], all[4 * b + 1], all[4 * b + 2], all[4 * b + 3]);
    }
  }
  for (int by = 1; by < 4; by *= 2) {
    for (int k = 0; k + by < 4 * kBlocks; ++k) all[k] = (offset & by) != 0 ? all[k + by] : all[k];
  }
  for (int k = 0; k < N; ++k) z[k] = all[k];
}

template <typename T, int N>
SAMKERN_DEVICE void fill_normals(const NoiseArgs& args, int32_t tensor, int64_t at, T (&z)[N]) {
  const PlanView& plan = args.plan;
  const int64_t flat = args.options.first + plan.flat[tensor];
  float normals[N];
  if (plan.first_dim[tensor] == plan.first_dim[tensor + 1]) {
    normals_from(args.options, flat + at, normals);
  } else {
    for (int k = 0; k < N; ++k) normals[k] = normal_at(args.options, flat + row_major(plan, tensor, at + k));
  }
  for (int k = 0; k < N; ++k) z[k] = static_cast<T>(normals[k]);
}

// ---- apply

// z *= std n, where n changes with every run of `stride` entries.
template <typename T, int N>
SAMKERN_DEVICE void multiply_by_filters(const NoiseArgs& args, int32_t tensor, int64_t at, double std, T (&z)[N]) {
  const PlanView& plan = args.plan;
  const double* norms = args.options.norms;
  const Filters filters = norms != nullptr ? slices_of(plan, tensor) : plan.filters[tensor];
  const int64_t run = at / filters.stride;
  int64_t filter = run % filters.count, in_run = at - run * filters.stride;
  auto factor_of = [&] {
    const int64_t f = filters.first + filter;
    return static_cast<T>(std * (norms != nullptr ? norms[f] : sqrt(device::read_shared(plan.filter_ww + f))));
  };
  T factor = factor_of();
  for (int k = 0; k < N; ++k) {
    if (in_run == filters.stride) {
      in_run = 0;
      filter = filter + 1 == filters.count ? 0 : filter + 1;
      factor = factor_of();
    }
    z[k] *= factor;
    ++in_run;
  }
}

template <Kind kind, typename T>
SAMKERN_DEVICE void add_noise(const NoiseArgs& args, bool finite, const Chunk& chunk) {
  const PlanView& plan = args.plan;
  const Operand w = plan.w[chunk.tensor], saved = plan.saved[chunk.tensor], mask = plan.mask[chunk.tensor];
  const bool from_saved = args.options.from_saved, half = args.options.report != nullptr && size_of(w.dtype) == 2;
  const bool by_filters = args.options.norms != nullptr || noise_of(args, chunk.tensor) == Climb::kNoiseFilter;
  double std = value(group_of(args.climbs, plan, chunk.tensor).rho);
  if (!by_filters) std *= sqrt(device::read_shared(plan.sums_of(kWW) + chunk.tensor));
  RealisedSums<T> realised;
  for_block<kPack<kind, T>>(chunk.n, aligned(w) && aligned(saved), [&](auto width, int32_t i) {
    constexpr int N = decltype(width)::value;
    const int64_t at = chunk.at + i;
    T values[N], z[N], climbed[N];
    const uint32_t bits = load_bits<N>(mask, at);
    if (!finite && from_saved && w.dtype == saved.dtype) return copy<kind, N>(w, saved, at);
    if (from_saved) {
      load<kind>(saved, at, values);
    } else {
      load_and_save<kind>(w, saved, at, values);
    }
    if (!finite) return from_saved ? store<kind>(w, at, values) : void();
    fill_normals(args, chunk.tensor, at, z);
    if (by_filters) {
      multiply_by_filters(args, chunk.tensor, at, std, z);
    } else {
      for (int k = 0; k < N; ++k) z[k] *= static_cast<T>(std);
    }
    for (int k = 0; k < N; ++k) climbed[k] = (bits >> k & 1) != 0 ? math::climb(values[k], z[k], T{1}) : values[k];
    if (mask.address == nullptr || from_saved) {
      store<kind>(w, at, climbed);
    } else {
      store_some<kind>(w, at, climbed, bits);
    }
    if (!half) return;
    round_to<kind>(w, climbed, z);  // z is not needed any more
    for (int k = 0; k < N; ++k) realised.add(z[k] - values[k], climbed[k] - values[k]);
  });
  if (half) leave_realised(plan, chunk.index, realised);
}

template <Kind kind>
SAMKERN_DEVICE void apply_phase(const NoiseArgs& args) {
  const PlanView& plan = args.plan;
  double* const report = args.options.report;
  const bool finite = norms_are_finite(args);
  if (report != nullptr && device::block() == 0 && device::thread() == 0) {
    for (int i = 0; i < kNReport; ++i) {
      const bool later = kind != Kind::kFloat32 && (i == kRealisedNorm || i == kRealisedShare);
      if (!later) report[i] = i == kSkippedFirst && !finite ? 1 : i == kRealisedShare ? NAN : 0;
    }
  }
  for (int32_t c = plan.block_begin[device::block() + 1] - 1; c >= plan.block_begin[device::block()]; --c) {
    const Chunk chunk = chunk_at(plan, c);
    if (plan.saved[chunk.tensor].address == nullptr) continue;
    with_math_type<kind>(plan.w[chunk.tensor],
                         [&](auto zero) { add_noise<kind, decltype(zero)>(args, finite, chunk); });
  }
  if constexpr (kind != Kind::kFloat32) {  // there, block 0 has reported that there are no half types
    if (report != nullptr && is_last_block(plan)) report_realised(plan, report);
  }
}

template <Kind kind>
SAMKERN_KERNEL noise_kernel(SAMKERN_ARGUMENT NoiseArgs args) {
  if ((args.phases & kReducePhase) != 0) {
    sum_phase<kind>(args);
    end_phase(args.together);
  }
  if ((args.phases & kFoldPhase) != 0) {
    fold_phase(args);
    end_phase(args.together);
  }
  if ((args.phases & kApplyPhase) != 0) apply_phase<kind>(args);
}

}  // namespace

const char* perturb_by_noise(const PlanView& plan, const NoiseOptions& options, const device::Stream& stream) {
  const bool reduces = options.norms == nullptr && !options.norms_known;
  NoiseArgs args{plan, {}, options, reduces ? kAllPhases : kApplyPhase, false};
  set_groups(args.climbs, options.climbs, options.climb_table, options.n_groups);
  switch (kind_of(plan)) {
    case Kind::kFloat32: return start(noise_kernel<Kind::kFloat32>, args, stream);
    case Kind::kBFloat16: return start(noise_kernel<Kind::kBFloat16>, args, stream);
    case Kind::kFloat16: return start(noise_kernel<Kind::kFloat16>, args, stream);
    default: return start(noise_kernel<Kind::kAny>, args, stream);
  }
}

}  // namespace samkern::cuda
