// update: puts w back, mixes what the base optimizer receives, keeps the cache, clips, and steps. One launch.
#include "harness.cuh"
#include "launchers.h"
#include "start.cuh"

namespace samkern::cuda {
namespace {

struct UpdateArgs {
  PlanView plan;
  Groups<BaseGroup> groups;
  MixOptions mix;
  Scaling scaling;
  double max_grad_norm;
  double* report;  // null: skip, clip and coefficients are the caller's
  int64_t* skips;
  double* momentum_sq;  // null: not wanted
  AverageOptions average;
  Applied applied;
  bool looked, check, restores, hands_over, reduces;
  int32_t phases;
  bool together;  // in one launch
};

// Whether u = A grad + B added.
SAMKERN_DEVICE bool adds(Mix mix) { return adds_cache(mix) || mix == Mix::kBlend; }

SAMKERN_DEVICE const Operand* added_list(const UpdateArgs& args) {
  return args.mix.mix == Mix::kBlend ? args.plan.first : args.plan.cache;
}

SAMKERN_DEVICE const Operand* second_list(const UpdateArgs& args) {
  if (args.mix.mix == Mix::kDecompose) return args.plan.grad;
  return adds(args.mix.mix) && args.max_grad_norm > 0 ? added_list(args) : nullptr;
}

template <Kind kind_g>
SAMKERN_DEVICE void reduce_gradients(const UpdateArgs& args) {
  const PlanView& plan = args.plan;
  auto no_climb = [](int32_t) -> const ClimbGroup* { return nullptr; };
  const Operand* b = second_list(args);
  if (args.mix.mix == Mix::kDecompose) {
    reduce_phase<kind_g, kind_g, Kind::kAny>(plan, {plan.first, b, false}, no_climb);
  } else {
    reduce_phase<kind_g, Kind::kAny, Kind::kAny>(plan, {plan.grad, b, false}, no_climb);
  }
}

SAMKERN_DEVICE double step_after(const Operand& step) {
  double now[1];
  load<Kind::kAny>(step, 0, now);
  return now[0] + 1;
}

// Adam's scalars of a tensor from its own step, which may lag where a gradient was missing.
SAMKERN_DEVICE void adam_coeffs(const UpdateArgs& args, int32_t t) {
  const PlanView& plan = args.plan;
  if (plan.grad[t].address == nullptr || plan.step[t].address == nullptr) return;
  const BaseGroup& group = group_of(args.groups, plan, t);
  const double step = step_after(plan.step[t]);
  plan.coeffs_of(kStepSize)[t] = value(group.lr) / (1 - pow(group.beta1, step));
  plan.coeffs_of(kBias2)[t] = sqrt(1 - pow(group.beta2, step));
}

// Sums of one tensor. Those over gradients with a loss scale become those of the gradients.
template <Base base>
SAMKERN_COLD void fold_phase(const UpdateArgs& args) {
  const PlanView& plan = args.plan;
  const double inverse = unscale(args.scaling), of_b = adds_cache(args.mix.mix) ? 1 : inverse;
  auto add = [&](int32_t t, int lane, int n_lanes, double (&sums)[kCC]) {
    if (args.reduces) add_partials(plan, t, lane, n_lanes, sums);
  };
  fold_tensors(plan, add, [&](int32_t t, const double (&sums)[kCC]) {
    plan.sums_of(kAA)[t] = sums[kAA] * (inverse * inverse);
    plan.sums_of(kAB)[t] = sums[kAB] * (inverse * of_b);
    plan.sums_of(kBB)[t] = sums[kBB] * (of_b * of_b);
    if constexpr (base == Base::kAdam || base == Base::kAdamW) adam_coeffs(args, t);
  });
}

struct Decided {
  bool skip;
  double clip;
  double aa, ab;  // over all tensors
};

// Coefficients of the mix of tensor t, A a + B b or A g_s - B g. They undo a loss scale.
SAMKERN_DEVICE double mix_a(const UpdateArgs& args, int32_t t) {
  const Mix mix = args.mix.mix;
  if (args.report == nullptr && adds(mix)) return args.plan.coeffs_of(kMixA)[t];
  const double inverse = unscale(args.scaling);
  return mix == Mix::kBlend ? group_of(args.groups, args.plan, t).alpha * inverse : inverse;
}

SAMKERN_DEVICE double mix_b(const UpdateArgs& args, const Decided& decided, int32_t t) {
  const PlanView& plan = args.plan;
  const MixOptions& mix = args.mix;
  if (mix.mix == Mix::kGradient) return 0;
  if (args.report == nullptr) return plan.coeffs_of(fills_cache(mix.mix) ? kProject : kMixB)[t];
  if (mix.mix == Mix::kDifference) return unscale(args.scaling);
  const double alpha = group_of(args.groups, plan, t).alpha;
  if (mix.mix == Mix::kAdd) return mix.weights != nullptr ? alpha * mix.weights[t] : alpha;
  if (mix.mix == Mix::kBlend) return (1 - alpha) * unscale(args.scaling);
  const bool global = mix.scope == Scope::kGlobal;
  const double aa = global ? decided.aa : device::read_shared(plan.sums_of(kAA) + t);
  if (mix.mix == Mix::kReuse) return scalars::reuse_coeff(alpha, aa, mix.cache_norm[global ? plan.n_tensors : t]);
  const double ab = global ? decided.ab : device::read_shared(plan.sums_of(kAB) + t);
  return scalars::over_squared(ab, aa) * unscale(args.scaling);
}

// Share of tensor t in norm(A grad + B added)^2, from the sums of unscaled gradients.
SAMKERN_DEVICE double update_sq_of(const UpdateArgs& args, const Decided& decided, int32_t t) {
  const PlanView& plan = args.plan;
  const bool blends = args.mix.mix == Mix::kBlend;
  const double alpha = group_of(args.groups, plan, t).alpha;
  const double a = blends ? alpha : 1, b = blends ? 1 - alpha : mix_b(args, decided, t);
  const double aa = device::read_shared(plan.sums_of(kAA) + t), ab = device::read_shared(plan.sums_of(kAB) + t);
  return a * a * aa + b * (2 * a * ab + b * device::read_shared(plan.sums_of(kBB) + t));
}

// Whether the step is skipped. `bad`: for what this half-step has found; told once.
SAMKERN_DEVICE bool judge(const UpdateArgs& args, bool bad) {
  const bool skipped = args.looked && args.report[kSkippedFirst] != 0;
  if (bad && !skipped && device::block() == 0 && device::thread() == 0) {
    args.report[args.looked ? kSkippedSecond : kSkippedFirst] = 1;
  }
  return skipped || bad;
}

// A step that needs no sums: nothing to clip, and nothing to judge but what the loss scale's owner found.
SAMKERN_DEVICE Decided decide_without_sums(const UpdateArgs& args) {
  return {judge(args, found_inf(args.scaling)), 1, 0, 0};
}

SAMKERN_DEVICE Decided as_told(const Applied& applied) {
  return {applied.skip != nullptr && *applied.skip, applied.clip != nullptr ? *applied.clip : 1, 0, 0};
}

SAMKERN_DEVICE void clear_report(const UpdateArgs& args) {
  if (args.looked || args.report == nullptr || device::block() != 0 || device::thread() != 0) return;
  for (int32_t i = 0; i < kNReport; ++i) args.report[i] = 0;
}

// Everything that depends on all gradients, by every block for itself.
SAMKERN_COLD Decided decide(const UpdateArgs& args) {
  const PlanView& plan = args.plan;
  const bool decomposes = args.mix.mix == Mix::kDecompose;
  double x[4] = {};  // aa, ab, grad^2, tensors that are not finite
  for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
    const double aa = device::read_shared(plan.sums_of(kAA) + t), ab = device::read_shared(plan.sums_of(kAB) + t);
    const double grad_sq = decomposes ? device::read_shared(plan.sums_of(kBB) + t) : aa;
    x[0] += aa;
    x[1] += ab;
    x[2] += grad_sq;
    x[3] += scalars::finite(grad_sq, plan.w[t].dtype) ? 0 : 1;
  }
  block_sum(x);
  Decided decided{judge(args, (args.check && x[3] != 0) || found_inf(args.scaling)), 1, x[0], x[1]};
  double update_sq[1] = {x[2]};
  if (args.max_grad_norm > 0 && adds(args.mix.mix)) {
    update_sq[0] = 0;
    for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
      if (plan.grad[t].address != nullptr) update_sq[0] += update_sq_of(args, decided, t);
    }
    block_sum(update_sq);
  }
  const double update_norm = sqrt(update_sq[0] < 0 ? 0 : update_sq[0]);  // rounding is cut off, NaN is not
  if (args.max_grad_norm > 0) decided.clip = scalars::clip_factor(args.max_grad_norm, update_norm);
  if (device::block() == 0 && device::thread() == 0) {
    args.report[args.looked ? kSecondNorm : kGradNorm] = sqrt(x[2]);
    if (args.max_grad_norm > 0) args.report[kUpdateNorm] = update_norm;
  }
  return decided;
}

SAMKERN_DEVICE bool is_saved(const UpdateArgs& args, int32_t t) {
  return args.restores && args.plan.saved[t].address != nullptr;
}

template <Kind kind>
SAMKERN_DEVICE void restore_chunk(const PlanView& plan, const Chunk& chunk) {
  const Operand w = plan.w[chunk.tensor], saved = plan.saved[chunk.tensor];
  for_block<8>(chunk.n, aligned(w) && aligned(saved),
               [&](auto width, int32_t i) { copy<kind, decltype(width)::value>(w, saved, chunk.at + i); });
}

// State and averages are in the math type: fp64 for fp64 weights, fp32 for all others.
template <typename T>
constexpr Kind kInMathType = sizeof(T) == 8 ? Kind::kAny : Kind::kFloat32;

// The first moments that the step writes; no address: none.
template <Base base>
SAMKERN_DEVICE Operand state1_of(const UpdateArgs& args, int32_t t) {
  const bool has = base != Base::kNone && (base != Base::kSgd || group_of(args.groups, args.plan, t).momentum != 0);
  return has ? args.plan.state1[t] : Operand{};
}

// Five operands of any dtype: with the cache's in the same loop, or two doubles of each at a time, or a call between
// chunks, registers spill.
template <Kind kind, Base base>
constexpr bool kCrowded = kind == Kind::kAny && (base == Base::kAdam || base == Base::kAdamW);

// The update of one chunk.
template <Kind kind_w, Kind kind_g, Base base, typename T>
struct ChunkUpdate {
  const UpdateArgs& args;
  const PlanView& plan;
  const BaseGroup& group;
  const int32_t t;
  const bool saved;
  // `cache` is written, and `other` is the gradient at w; or `other` is what is added to grad.
  const Operand w, source, grad, cache, other, state1, state2, out;
  const T factor, coeff_a, coeff_b;
  math::Sgd<T> sgd;
  math::Adam<T> adam;
  T cache_sq = 0, momentum_sq = 0;

  static constexpr bool crowded = kCrowded<kind_w, base>;
  static constexpr int pack = crowded ? (sizeof(T) == 8 ? 1 : 2) : kPack<kind_w, T>;

  SAMKERN_DEVICE ChunkUpdate(const UpdateArgs& a, const Decided& decided, int32_t tensor)
      : args(a),
        plan(a.plan),
        group(group_of(a.groups, a.plan, tensor)),
        t(tensor),
        saved(is_saved(a, tensor)),
        w(plan.w[t]),
        source(saved ? plan.saved[t] : w),
        grad(plan.grad[t]),
        cache(fills_cache(a.mix.mix) ? plan.cache[t] : Operand{}),
        other(other_of(a, tensor)),
        state1(state1_of<base>(a, tensor)),
        state2(base == Base::kAdam || base == Base::kAdamW ? plan.state2[t] : Operand{}),
        out(base == Base::kNone && a.hands_over ? plan.out[t] : Operand{}),
        // The coefficients of a mix undo a loss scale.
        factor(static_cast<T>(mixes() ? decided.clip : decided.clip * unscale(a.scaling))),
        coeff_a(static_cast<T>(mix_a(a, tensor))),
        coeff_b(static_cast<T>(mix_b(a, decided, tensor))) {
    const double lr = value(group.lr);
    if constexpr (base == Base::kSgd) {
      const bool fresh = plan.fresh[t] != 0;
      sgd = {.lr = static_cast<T>(lr),
             .weight_decay = static_cast<T>(group.weight_decay),
             .momentum = static_cast<T>(group.momentum),
             .keep = fresh ? T{0} : static_cast<T>(group.momentum),
             .gain = fresh ? T{1} : static_cast<T>(1 - group.dampening),
             .factor = factor,
             .nesterov = group.nesterov};
    }
    if constexpr (base == Base::kAdam || base == Base::kAdamW) {
      constexpr bool decoupled = base == Base::kAdamW;
      adam = {.weight_decay = static_cast<T>(decoupled ? 0 : group.weight_decay),
              .decay = static_cast<T>(decoupled ? 1 - lr * group.weight_decay : 1),
              .gain1 = static_cast<T>(1 - group.beta1),
              .beta2 = static_cast<T>(group.beta2),
              .gain2 = static_cast<T>(1 - group.beta2),
              .step_size = static_cast<T>(device::read_shared(plan.coeffs_of(kStepSize) + t)),
              .bias2 = static_cast<T>(device::read_shared(plan.coeffs_of(kBias2) + t)),
              .eps = static_cast<T>(group.eps),
              .factor = factor};
    }
  }

  static SAMKERN_DEVICE Operand other_of(const UpdateArgs& args, int32_t t) {
    if (adds(args.mix.mix)) return added_list(args)[t];
    return fills_cache(args.mix.mix) ? args.plan.first[t] : Operand{};
  }

  SAMKERN_DEVICE bool fills() const { return cache.address != nullptr; }
  SAMKERN_DEVICE bool mixes() const {
    return args.mix.mix == Mix::kBlend || (adds_cache(args.mix.mix) && other.address != nullptr);
  }

  SAMKERN_DEVICE bool packed() const {
    return aligned(w) && aligned(source) && aligned(grad) && aligned(cache) && aligned(other) && aligned(state1) &&
           aligned(state2) && aligned(out);
  }

  template <int N>
  SAMKERN_DEVICE void run(int64_t at) {
    T u[N];
    load<kind_g>(grad, at, u);
    if (!crowded && fills()) decompose(at, u);
    if (mixes()) mix(at, u);
    if constexpr (base == Base::kNone) {
      if (saved) copy<kind_w, N>(w, source, at);
      if (out.address == nullptr) return;
      for (int k = 0; k < N; ++k) u[k] = factor * u[k];
      store<kind_g>(out, at, u);
    } else {
      step(at, u);
    }
  }

  template <int N>
  SAMKERN_DEVICE void decompose_only(int64_t at) {
    T g_s[N];
    load<kind_g>(grad, at, g_s);
    decompose(at, g_s);
  }

  // cache = a grad - k other, and the sum of squares of what was stored.
  template <int N>
  SAMKERN_DEVICE void decompose(int64_t at, const T (&g_s)[N]) {
    T c[N], g[N] = {};
    if (other.address != nullptr) load<kind_g>(other, at, g);
    for (int k = 0; k < N; ++k) c[k] = math::project(g_s[k], g[k], coeff_a, coeff_b);
    store<Kind::kAny>(cache, at, c);
    round_to<Kind::kAny>(cache, c, g);
    for (int k = 0; k < N; ++k) cache_sq += g[k] * g[k];
  }

  template <int N>
  SAMKERN_DEVICE void mix(int64_t at, T (&u)[N]) {
    T c[N] = {};
    if (other.address != nullptr) load<Kind::kAny>(other, at, c);
    for (int k = 0; k < N; ++k) u[k] = math::combine(u[k], c[k], coeff_a, coeff_b);
  }

  template <int N>
  SAMKERN_DEVICE void step(int64_t at, const T (&u)[N]) {
    T x[N], m[N], v[N];
    load<kind_w>(source, at, x);
    if constexpr (base == Base::kSgd) {
      if (group.momentum == 0) {
        for (int k = 0; k < N; ++k) x[k] = math::sgd(x[k], u[k], sgd);
      } else {
        load<kState>(state1, at, m);
        for (int k = 0; k < N; ++k) x[k] = math::sgd_momentum(x[k], u[k], m[k], sgd);
        keep_momentum(at, m);
      }
    } else {
      load<kState>(state1, at, m);
      load<kState>(state2, at, v);
      for (int k = 0; k < N; ++k) x[k] = math::adam(x[k], u[k], m[k], v[k], adam);
      keep_momentum(at, m);
      store<kState>(state2, at, v);
    }
    store<kind_w>(w, at, x);
  }

  template <int N>
  SAMKERN_DEVICE void keep_momentum(int64_t at, const T (&m)[N]) {
    store<kState>(state1, at, m);
    if (args.momentum_sq == nullptr) return;
    for (int k = 0; k < N; ++k) momentum_sq += m[k] * m[k];
  }

  static constexpr Kind kState = kInMathType<T>;
};

// Takes the weights of a chunk, as they have just been stored, into their average. A walk of its own over what is still
// in the second-level cache: in the update's loop, registers spill in kernels for lists of any dtype, with or without
// averages.
template <Kind kind_w>
SAMKERN_COLD void average_chunk(const UpdateArgs& args, int32_t c) {
  const Chunk chunk = chunk_at(args.plan, c);
  const Operand w = args.plan.w[chunk.tensor], average = args.plan.average[chunk.tensor];
  if (average.address == nullptr) return;
  device::block_sync();  // other threads have written here
  const double gain = scalars::average_gain(args.average);
  with_math_type<kind_w>(w, [&](auto zero) {
    using T = decltype(zero);
    for_block<kPack<kind_w, T>>(chunk.n, aligned(w) && aligned(average), [&](auto width, int32_t i) {
      T avg[decltype(width)::value], x[decltype(width)::value];
      load<kind_w>(w, chunk.at + i, x);
      load<kInMathType<T>>(average, chunk.at + i, avg);
      for (int k = 0; k < decltype(width)::value; ++k) {
        avg[k] = gain == 1 ? x[k] : math::average(avg[k], x[k], static_cast<T>(gain));
      }
      store<kInMathType<T>>(average, chunk.at + i, avg);
    });
  });
}

template <Kind kind_w>
SAMKERN_COLD void average_chunks(const UpdateArgs& args) {
  for (int32_t c = args.plan.block_begin[device::block()]; c < args.plan.block_begin[device::block() + 1]; ++c) {
    average_chunk<kind_w>(args, c);
  }
}

// A tensor whose second gradient is missing leaves nothing to reuse.
SAMKERN_DEVICE void forget_cache(const PlanView& plan, const Chunk& chunk) {
  const Operand cache = plan.cache[chunk.tensor];
  if (cache.address == nullptr || plan.first[chunk.tensor].address == nullptr) return;
  for_block<8>(chunk.n, aligned(cache), [&](auto width, int32_t i) {
    const float zeros[decltype(width)::value] = {};
    store<Kind::kAny>(cache, chunk.at + i, zeros);
  });
}

// A chunk's partial sum from those of its threads.
SAMKERN_DEVICE void leave_sum(const PlanView& plan, Sum which, const Chunk& chunk, double of_thread) {
  double sum[1] = {of_thread};
  block_sum(sum);
  if (device::thread() == 0) plan.partials[static_cast<int64_t>(chunk.index) * kNSums + which] = sum[0];
}

template <Kind kind_w, Kind kind_g, Base base>
SAMKERN_DEVICE void apply_chunk(const UpdateArgs& args, const Decided& decided, const Chunk& chunk) {
  const PlanView& plan = args.plan;
  const int32_t t = chunk.tensor;
  const bool has_grad = plan.grad[t].address != nullptr, fills = fills_cache(args.mix.mix);
  if (fills && !has_grad && !decided.skip) forget_cache(plan, chunk);
  const bool only_restored = base == Base::kNone && !args.hands_over && !fills;
  if (decided.skip || !has_grad || only_restored) {
    if (is_saved(args, t)) restore_chunk<kind_w>(plan, chunk);
    return;
  }
  with_math_type<kind_w>(plan.w[t], [&](auto zero) {
    using T = decltype(zero);
    ChunkUpdate<kind_w, kind_g, base, T> update(args, decided, t);
    const bool packed = update.packed();
    if (update.crowded && update.fills()) {
      for_block<update.pack>(chunk.n, packed, [&](auto width, int32_t i) {
        update.template decompose_only<decltype(width)::value>(chunk.at + i);
      });
    }
    for_block<update.pack>(chunk.n, packed,
                           [&](auto width, int32_t i) { update.template run<decltype(width)::value>(chunk.at + i); });
    if (update.fills()) leave_sum(plan, kCC, chunk, update.cache_sq);
    // In the place of a sum over gradients, which has been folded.
    if (args.momentum_sq != nullptr && update.state1.address != nullptr) {
      leave_sum(plan, kAA, chunk, update.momentum_sq);
    }
  });
}

// sums[t] from the partial sums that apply left, of every tensor for which wanted(t). By one block.
template <typename Wanted>
SAMKERN_DEVICE void fold_left(const PlanView& plan, Sum which, double* sums, const Wanted& wanted) {
  auto sum_of = [&](int32_t t, int lane, int n_lanes) {
    double sum = 0;
    for (int32_t c = plan.first_chunk[t] + lane; c < plan.first_chunk[t + 1]; c += n_lanes) {
      sum += device::read_shared(plan.partials + static_cast<int64_t>(c) * kNSums + which);
    }
    return sum;
  };
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.numel[t] < kLargeTensor || !wanted(t)) continue;
    double sum[1] = {sum_of(t, device::thread(), device::kThreads)};
    block_sum(sum);
    if (device::thread() == 0) sums[t] = sum[0];
  }
  for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
    if (plan.numel[t] < kLargeTensor && wanted(t)) sums[t] = sum_of(t, 0, 1);
  }
  device::block_sync();
}

// plan.sums[kCC], and what the next reuse steps divide by. By one block.
SAMKERN_COLD void keep_cache_norms(const UpdateArgs& args) {
  const PlanView& plan = args.plan;
  double* norm = args.mix.cache_norm;  // null: only the sums are wanted
  double* cc = plan.sums_of(kCC);
  auto written = [&](int32_t t) { return plan.grad[t].address != nullptr && plan.cache[t].address != nullptr; };
  fold_left(plan, kCC, cc, written);
  const bool judges = args.mix.mix == Mix::kDecompose;  // else there is no sum over the second gradient
  double total[2] = {};                                 // of the cache, of the gradients
  for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
    const bool untouched = plan.first[t].address == nullptr || plan.cache[t].address == nullptr;
    if (!written(t)) cc[t] = untouched && norm != nullptr ? norm[t] * norm[t] : 0;
    total[0] += cc[t];
    if (norm == nullptr) continue;
    const double second_sq = judges ? device::read_shared(plan.sums_of(kBB) + t) : 0;
    total[1] += second_sq;
    if (plan.cache[t].address == nullptr) continue;  // what it keeps stays
    norm[t] = scalars::kept_cache_norm(cc[t], second_sq, args.mix.scope == Scope::kTensor ? args.mix.min_sine : 0);
  }
  block_sum(total);
  if (device::thread() != 0) return;
  cc[plan.n_tensors] = total[0];
  if (norm == nullptr) return;
  const double min_sine = args.mix.scope == Scope::kGlobal ? args.mix.min_sine : 0;
  norm[plan.n_tensors] = scalars::kept_cache_norm(total[0], total[1], min_sine);
}

// The sums of squares that the next climb along the momentum divides by. By one block.
template <Base base>
SAMKERN_COLD void keep_momentum_sq(const UpdateArgs& args) {
  fold_left(args.plan, kAA, args.momentum_sq, [&](int32_t t) {
    return args.plan.grad[t].address != nullptr && state1_of<base>(args, t).address != nullptr;
  });
}

// What may only change after all blocks have read it. By the last block.
template <Base base>
SAMKERN_COLD void finish(const UpdateArgs& args, bool skip) {
  const PlanView& plan = args.plan;
  if (skip) {
    if (device::thread() == 0 && args.skips != nullptr) ++*args.skips;
    return;
  }
  if (device::thread() == 0 && args.average.taken != nullptr) ++*args.average.taken;
  for (int32_t t = device::thread(); t < plan.n_tensors; t += device::kThreads) {
    if (plan.grad[t].address == nullptr) continue;
    if constexpr (base == Base::kSgd) {
      if (plan.state1[t].address != nullptr) plan.fresh[t] = 0;
    }
    if constexpr (base == Base::kAdam || base == Base::kAdamW) {
      if (plan.step[t].address == nullptr) continue;
      const double step[1] = {step_after(plan.step[t])};
      store<Kind::kAny>(plan.step[t], 0, step);
    }
  }
  if (fills_cache(args.mix.mix)) keep_cache_norms(args);
  if (base != Base::kNone && args.momentum_sq != nullptr) keep_momentum_sq<base>(args);
}

template <Kind kind_w, Kind kind_g, Base base>
SAMKERN_DEVICE void apply_phase(const UpdateArgs& args) {
  const PlanView& plan = args.plan;
  clear_report(args);
  Decided decided;
  if (args.report == nullptr) {
    decided = as_told(args.applied);
  } else {
    decided = args.reduces ? decide(args) : decide_without_sums(args);
  }
  const bool averages = base != Base::kNone && args.average.taken != nullptr && !decided.skip;
  for (int32_t c = plan.block_begin[device::block() + 1] - 1; c >= plan.block_begin[device::block()]; --c) {
    apply_chunk<kind_w, kind_g, base>(args, decided, chunk_at(plan, c));
    if (averages && !kCrowded<kind_w, base>) average_chunk<kind_w>(args, c);
  }
  if (averages && kCrowded<kind_w, base>) average_chunks<kind_w>(args);
  if (is_last_block(plan)) finish<base>(args, decided.skip);
}

template <Kind kind_w, Kind kind_g, Base base>
SAMKERN_KERNEL update_kernel(SAMKERN_ARGUMENT UpdateArgs args) {
  if ((args.phases & kReducePhase) != 0) {
    reduce_gradients<kind_g>(args);
    end_phase(args.together);
  }
  if ((args.phases & kFoldPhase) != 0) {
    fold_phase<base>(args);
    end_phase(args.together);
  }
  if ((args.phases & kApplyPhase) != 0) apply_phase<kind_w, kind_g, base>(args);
}

SAMKERN_KERNEL restore_kernel(SAMKERN_ARGUMENT UpdateArgs args) {
  const PlanView& plan = args.plan;
  for (int32_t c = plan.block_begin[device::block()]; c < plan.block_begin[device::block() + 1]; ++c) {
    const Chunk chunk = chunk_at(plan, c);
    if (plan.saved[chunk.tensor].address != nullptr) restore_chunk<Kind::kAny>(plan, chunk);
  }
}

template <Base base>
const char* start_update(const UpdateArgs& args, const device::Stream& stream, const AfterSums* after_sums) {
  switch (kind_of(args.plan)) {
    case Kind::kFloat32: return start(update_kernel<Kind::kFloat32, Kind::kFloat32, base>, args, stream, after_sums);
    case Kind::kBFloat16: return start(update_kernel<Kind::kBFloat16, Kind::kBFloat16, base>, args, stream, after_sums);
    case Kind::kFloat16: return start(update_kernel<Kind::kFloat16, Kind::kFloat16, base>, args, stream, after_sums);
    default: return start(update_kernel<Kind::kAny, Kind::kAny, base>, args, stream, after_sums);
  }
}

const char* start_update(const PlanView& plan, const UpdateOptions& options, const Applied& applied, bool reduces,
                         const device::Stream& stream) {
  UpdateArgs args{.plan = plan,
                  .groups = {},
                  .mix = options.mix,
                  .scaling = options.scaling,
                  .max_grad_norm = options.max_grad_norm,
                  .report = options.report,
                  .skips = options.skips,
                  .momentum_sq = options.momentum_sq,
                  .average = options.average,
                  .applied = applied,
                  .looked = options.looked,
                  .check = options.check,
                  .restores = options.restores,
                  .hands_over = options.hands_over,
                  .reduces = reduces,
                  .phases = kApplyPhase,
                  .together = false};
  const bool adam = options.base == Base::kAdam || options.base == Base::kAdamW;
  if (reduces) args.phases = kAllPhases;
  if (!reduces && adam) args.phases = kFoldPhase | kApplyPhase;
  set_groups(args.groups, options.groups, options.group_table, options.n_groups);
  const AfterSums* after_sums = reduces ? options.after_sums : nullptr;
  switch (options.base) {
    case Base::kSgd: return start_update<Base::kSgd>(args, stream, after_sums);
    case Base::kAdam: return start_update<Base::kAdam>(args, stream, after_sums);
    case Base::kAdamW: return start_update<Base::kAdamW>(args, stream, after_sums);
    default: return start_update<Base::kNone>(args, stream, after_sums);
  }
}

}  // namespace

const char* restore(const PlanView& plan, const device::Stream& stream) {
  UpdateArgs args{};
  args.plan = plan;
  return device::launch(restore_kernel, args, plan.n_blocks, false, stream);
}

const char* update(const PlanView& plan, const UpdateOptions& options, const device::Stream& stream) {
  return start_update(plan, options, {}, options.reduces(), stream);
}

const char* update_apply(const PlanView& plan, const UpdateOptions& options, const Applied& applied,
                         const device::Stream& stream) {
  return start_update(plan, options, applied, false, stream);
}

}  // namespace samkern::cuda
