// update: one pass that puts w back, mixes what the base optimizer receives, keeps the cache, clips, and steps.
#include <cstring>

#include "../scalars.h"
#include "launchers.h"
#include "sums.h"

namespace samkern::cpu {
namespace {

template <typename T>
SAMKERN_CLONES void project_range(const T* g_s, const T* g, int64_t n, T a, T k, T* __restrict c) {
  for (int64_t i = 0; i < n; ++i) c[i] = math::project(g_s[i], g[i], a, k);
}

template <typename T>
SAMKERN_CLONES void combine_range(const T* a, const T* b, int64_t n, T coeff_a, T coeff_b, T* __restrict u) {
  for (int64_t i = 0; i < n; ++i) u[i] = math::combine(a[i], b[i], coeff_a, coeff_b);
}

template <typename T>
SAMKERN_CLONES void scale_range(const T* u, int64_t n, T factor, T* scaled) {
  SAMKERN_VECTORIZE
  for (int64_t i = 0; i < n; ++i) scaled[i] = factor * u[i];
}

template <typename T>
SAMKERN_CLONES void sgd_range(const T* old, const T* u, int64_t n, const math::Sgd<T> o, T* w) {
  SAMKERN_VECTORIZE
  for (int64_t i = 0; i < n; ++i) w[i] = math::sgd(old[i], u[i], o);
}

template <typename T>
SAMKERN_CLONES void sgd_momentum_range(const T* old, const T* u, int64_t n, const math::Sgd<T> o, T* v, T* w) {
  SAMKERN_VECTORIZE
  for (int64_t i = 0; i < n; ++i) w[i] = math::sgd_momentum(old[i], u[i], v[i], o);
}

template <typename T>
SAMKERN_CLONES void adam_range(const T* old, const T* u, int64_t n, const math::Adam<T> o, T* m, T* v, T* w) {
  SAMKERN_VECTORIZE
  for (int64_t i = 0; i < n; ++i) w[i] = math::adam(old[i], u[i], m[i], v[i], o);
}

template <typename T>
SAMKERN_CLONES void average_range(const T* w, int64_t n, T gain, T* __restrict avg) {
  for (int64_t i = 0; i < n; ++i) avg[i] = math::average(avg[i], w[i], gain);
}

// Takes n stored weights into their average.
template <typename T>
void take_in(const Operand& average, const T* w, int64_t at, int64_t n, double gain) {
  T* avg = in_place<T>(average, at);
  if (gain == 1) {
    copy_bytes(avg, w, n * static_cast<int64_t>(sizeof(T)), /*streamed=*/false);
  } else {
    average_range(w, n, static_cast<T>(gain), avg);
  }
}

// The average of a chunk that has no update.
void average_chunk(const PlanView& plan, const Span& chunk, double gain) {
  with_math_type(plan.w[chunk.tensor].dtype, [&](auto zero) {
    decltype(zero) values[kBlock];
    for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
      const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
      take_in(plan.average[chunk.tensor], read(plan.w[chunk.tensor], at, n, values), at, n, gain);
    }
  });
}

// What a mix adds to the gradient of a tensor; no address: nothing.
Operand added_to(const PlanView& plan, Mix mix, int32_t tensor) {
  if (adds_cache(mix)) return plan.cache[tensor];
  return mix == Mix::kBlend ? plan.first[tensor] : Operand{};
}

// The update of one chunk, block by block.
template <typename T>
class ChunkUpdate {
 public:
  // `gain`: of the average; null: the tensor has none.
  ChunkUpdate(const PlanView& plan, const UpdateOptions& options, double clip, const double* gain, int32_t tensor,
              bool streamed)
      : plan_(plan),
        options_(options),
        fills_(fills_cache(options.mix.mix) && plan.cache[tensor].address != nullptr),
        added_(added_to(plan, options.mix.mix, tensor)),
        mixes_(options.mix.mix == Mix::kBlend || added_.address != nullptr),
        unscale_(static_cast<T>(unscale(options.scaling))),
        // The coefficients of a mix undo a loss scale.
        factor_(static_cast<T>(mixes_ ? clip : clip * unscale(options.scaling))),
        gain_(gain),
        t_(tensor),
        saved_(options.restores && plan.saved[tensor].address != nullptr),
        streamed_(streamed && saved_) {}

  void run(const Span& chunk) {
    double cache_sq = 0;
    momentum_sq_ = 0;
    for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
      const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
      const T* u = read(plan_.grad[t_], at, n, grad_);
      if (fills_) cache_sq += decompose(u, at, n);
      if (mixes_) u = mix(u, at, n);
      step(u, at, n);
    }
    double* partials = plan_.partials + static_cast<int64_t>(chunk.chunk) * kNSums;
    partials[kCC] = cache_sq;
    partials[kAA] = momentum_sq_;  // the sums over gradients have been folded
  }

 private:
  T coeff(Coeff which) const { return static_cast<T>(plan_.coeffs_of(which)[t_]); }

  // cache = grad - k first. Returns the sum of squares of what was stored.
  double decompose(const T* g_s, int64_t at, int64_t n) {
    const Operand& cache = plan_.cache[t_];
    T* c = target(cache, at, mixed_);
    if (plan_.first[t_].address != nullptr) {
      project_range(g_s, read(plan_.first[t_], at, n, other_), n, unscale_, coeff(kProject), c);
    } else {
      scale_range(g_s, n, unscale_, c);
    }
    write(cache, at, n, c);
    return sum_squares(read(cache, at, n, mixed_), n);
  }

  const T* mix(const T* g, int64_t at, int64_t n) {
    if (added_.address == nullptr) {
      scale_range(g, n, coeff(kMixA), mixed_);
    } else {
      combine_range(g, read(added_, at, n, other_), n, coeff(kMixA), coeff(kMixB), mixed_);
    }
    return mixed_;
  }

  // Base step on factor * u, from the saved weights if they are perturbed.
  void step(const T* u, int64_t at, int64_t n) {
    const Operand& w = plan_.w[t_];
    const Operand& source = saved_ ? plan_.saved[t_] : w;
    if (options_.base == Base::kNone) {
      if (saved_) copy(w, source, at, n, streamed_);
      if (options_.hands_over) hand_over(u, at, n);
      return;
    }
    const T* old = read(source, at, n, old_);
    T* updated = target(w, at, new_, streamed_);
    const BaseGroup& group = options_.groups[plan_.group[t_]];
    if (options_.base == Base::kSgd) {
      sgd(group, old, u, at, n, updated);
    } else {
      adam(group, old, u, at, n, updated);
    }
    write(w, at, n, updated, streamed_);
    if (gain_ != nullptr) average(updated, at, n);
  }

  // The weights as they are stored: those of half types have just been rounded.
  void average(const T* updated, int64_t at, int64_t n) {
    if (in_place<T>(plan_.w[t_], at) == nullptr) load(plan_.w[t_], at, n, new_);
    take_in(plan_.average[t_], updated, at, n, *gain_);
  }

  void hand_over(const T* u, int64_t at, int64_t n) {
    T* scaled = target(plan_.out[t_], at, new_);
    scale_range(u, n, factor_, scaled);
    write(plan_.out[t_], at, n, scaled);
  }

  void sgd(const BaseGroup& group, const T* old, const T* u, int64_t at, int64_t n, T* updated) {
    const bool fresh = plan_.fresh[t_] != 0;
    const math::Sgd<T> o{.lr = static_cast<T>(value(group.lr)),
                         .weight_decay = static_cast<T>(group.weight_decay),
                         .momentum = static_cast<T>(group.momentum),
                         .keep = fresh ? T{0} : static_cast<T>(group.momentum),
                         .gain = fresh ? T{1} : static_cast<T>(1 - group.dampening),
                         .factor = factor_,
                         .nesterov = group.nesterov};
    if (group.momentum == 0) return sgd_range(old, u, n, o, updated);
    T* v = state(plan_.state1[t_], at, n, state1_);
    sgd_momentum_range(old, u, n, o, v, updated);
    keep_momentum(v, at, n);
  }

  void adam(const BaseGroup& group, const T* old, const T* u, int64_t at, int64_t n, T* updated) {
    const bool decoupled = options_.base == Base::kAdamW;
    const math::Adam<T> o{.weight_decay = static_cast<T>(decoupled ? 0 : group.weight_decay),
                          .decay = static_cast<T>(decoupled ? 1 - value(group.lr) * group.weight_decay : 1),
                          .gain1 = static_cast<T>(1 - group.beta1),
                          .beta2 = static_cast<T>(group.beta2),
                          .gain2 = static_cast<T>(1 - group.beta2),
                          .step_size = coeff(kStepSize),
                          .bias2 = coeff(kBias2),
                          .eps = static_cast<T>(group.eps),
                          .factor = factor_};
    T* m = state(plan_.state1[t_], at, n, state1_);
    T* v = state(plan_.state2[t_], at, n, state2_);
    adam_range(old, u, n, o, m, v, updated);
    keep_momentum(m, at, n);
    write(plan_.state2[t_], at, n, v);
  }

  void keep_momentum(const T* m, int64_t at, int64_t n) {
    write(plan_.state1[t_], at, n, m);
    if (options_.momentum_sq != nullptr) momentum_sq_ += sum_squares(m, n);
  }

  // State that is read and written: in place, or a converted copy in `buffer`.
  T* state(const Operand& x, int64_t at, int64_t n, T* buffer) {
    if (T* values = in_place<T>(x, at)) return values;
    load(x, at, n, buffer);
    return buffer;
  }

  const PlanView& plan_;
  const UpdateOptions& options_;
  const bool fills_;  // the cache
  const Operand added_;
  const bool mixes_;          // u is A grad + B added
  const T unscale_, factor_;  // what undoes a loss scale; what u is multiplied by
  const double* gain_;
  double momentum_sq_ = 0;
  const int32_t t_;
  const bool saved_, streamed_;
  T grad_[kBlock], other_[kBlock], mixed_[kBlock], old_[kBlock], new_[kBlock], state1_[kBlock], state2_[kBlock];
};

void restore_chunk(const PlanView& plan, const Span& chunk, bool streamed) {
  if (plan.saved[chunk.tensor].address == nullptr) return;
  copy(plan.w[chunk.tensor], plan.saved[chunk.tensor], chunk.at, chunk.n, streamed);
}

// Weights that are written and not read bypass the cache when it cannot hold what a step touches anyway.
bool worth_streaming(const PlanView& plan) {
  int64_t n_bytes = 0;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.saved[t].address != nullptr) n_bytes += 4 * plan.numel[t] * size_of(plan.w[t].dtype);
  }
  return n_bytes > last_level_cache();
}

double read_scalar(const Operand& x) {
  double value;
  load(x, 0, 1, &value);
  return value;
}

// Adam's scalars of every tensor from its own step, which may lag where a gradient was missing. Advances the step.
void advance_steps(const PlanView& plan, const UpdateOptions& options) {
  double previous = -1, bias1 = 0, bias2 = 0;
  int32_t previous_group = -1;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.grad[t].address == nullptr || plan.step[t].address == nullptr) continue;
    const BaseGroup& group = options.groups[plan.group[t]];
    const double step = read_scalar(plan.step[t]) + 1;
    store(plan.step[t], 0, 1, &step);
    if (step != previous || plan.group[t] != previous_group) {  // usually all tensors agree, and pow is slow
      bias1 = 1 - std::pow(group.beta1, step);
      bias2 = 1 - std::pow(group.beta2, step);
      previous = step;
      previous_group = plan.group[t];
    }
    plan.coeffs_of(kStepSize)[t] = value(group.lr) / bias1;
    plan.coeffs_of(kBias2)[t] = std::sqrt(bias2);
  }
}

void mark_written(const PlanView& plan, const UpdateOptions& options) {
  if (options.base != Base::kSgd) return;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.grad[t].address != nullptr && plan.state1[t].address != nullptr) plan.fresh[t] = 0;
  }
}

// A tensor whose second gradient is missing leaves nothing to reuse; one without any gradient keeps what it had.
void forget_cache(const PlanView& plan, const Span& chunk) {
  const Operand& cache = plan.cache[chunk.tensor];
  if (cache.address == nullptr || plan.first[chunk.tensor].address == nullptr) return;
  const int64_t size = size_of(cache.dtype);
  std::memset(static_cast<char*>(cache.address) + chunk.at * size, 0, chunk.n * size);
}

// plan.sums[kCC] from the partials that ChunkUpdate left.
void fold_cache(const PlanView& plan, const double* cache_norm) {
  double* cc = plan.sums_of(kCC);
  double total = 0;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    const bool written = plan.grad[t].address != nullptr && plan.cache[t].address != nullptr;
    const bool untouched = !written && (plan.first[t].address == nullptr || plan.cache[t].address == nullptr);
    cc[t] = untouched && cache_norm != nullptr ? cache_norm[t] * cache_norm[t] : 0;
    for (int32_t c = plan.first_chunk[t]; written && c < plan.first_chunk[t + 1]; ++c) {
      cc[t] += plan.partials[static_cast<int64_t>(c) * kNSums + kCC];
    }
    total += cc[t];
  }
  cc[plan.n_tensors] = total;
}

// What the next reuse steps divide by.
void keep_cache_norms(const PlanView& plan, const MixOptions& mix) {
  const double *cc = plan.sums_of(kCC), *second_sq = plan.sums_of(kBB);
  for (int32_t t = 0; t <= plan.n_tensors; ++t) {
    if (t < plan.n_tensors && plan.cache[t].address == nullptr) continue;  // what it keeps stays
    const bool scoped = (mix.scope == Scope::kGlobal) == (t == plan.n_tensors);
    const bool judged = scoped && mix.mix == Mix::kDecompose;  // else there is no sum over the second gradient
    mix.cache_norm[t] = scalars::kept_cache_norm(cc[t], judged ? second_sq[t] : 0, judged ? mix.min_sine : 0);
  }
}

bool finite(const PlanView& plan, const double* sums) {
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (!scalars::finite(sums[t], plan.w[t].dtype)) return false;
  }
  return true;
}

// Makes sums over gradients with a loss scale those of the gradients.
void unscale_sums(const PlanView& plan, const UpdateOptions& options) {
  const double inverse = unscale(options.scaling);
  if (inverse == 1) return;
  const bool with_cache = adds_cache(options.mix.mix);
  scale_sums(plan, kAA, inverse * inverse);
  scale_sums(plan, kAB, with_cache ? inverse : inverse * inverse);
  if (!with_cache) scale_sums(plan, kBB, inverse * inverse);
}

// kProject, or kMixA and kMixB, from the sums over (first, grad) or (grad, what is added). They undo a loss scale.
void mix_coeffs(const PlanView& plan, const UpdateOptions& options) {
  const MixOptions& mix = options.mix;
  const int32_t all = plan.n_tensors;
  const double *aa = plan.sums_of(kAA), *ab = plan.sums_of(kAB), inverse = unscale(options.scaling);
  double *project = plan.coeffs_of(kProject), *a = plan.coeffs_of(kMixA), *b = plan.coeffs_of(kMixB);
  for (int32_t t = 0; t < all; ++t) {
    const int32_t scope = mix.scope == Scope::kGlobal ? all : t;
    const double alpha = options.n_groups > 0 ? options.groups[plan.group[t]].alpha : 0;
    a[t] = inverse;
    switch (mix.mix) {
      case Mix::kDecompose: project[t] = scalars::over_squared(ab[scope], aa[scope]) * inverse; break;
      case Mix::kDifference: project[t] = inverse; break;
      case Mix::kReuse: b[t] = scalars::reuse_coeff(alpha, aa[scope], mix.cache_norm[scope]); break;
      case Mix::kAdd: b[t] = mix.weights != nullptr ? alpha * mix.weights[t] : alpha; break;
      case Mix::kBlend:
        a[t] = alpha * inverse;
        b[t] = (1 - alpha) * inverse;
        break;
      case Mix::kGradient: break;
    }
  }
}

// norm(u) from sums that are there already: u = grad, or u = A grad + B added.
double update_norm(const PlanView& plan, const UpdateOptions& options, const double* grad_sq) {
  const Mix mix = options.mix.mix;
  if (!adds_cache(mix) && mix != Mix::kBlend) return std::sqrt(grad_sq[plan.n_tensors]);
  const double *ab = plan.sums_of(kAB), *bb = plan.sums_of(kBB), *coeff_b = plan.coeffs_of(kMixB);
  double sum = 0;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.grad[t].address == nullptr) continue;
    const double alpha = options.groups[plan.group[t]].alpha;  // the sums are those of unscaled gradients
    const double a = mix == Mix::kBlend ? alpha : 1, b = mix == Mix::kBlend ? 1 - alpha : coeff_b[t];
    sum += a * a * grad_sq[t] + b * (2 * a * ab[t] + b * bb[t]);
  }
  return std::sqrt(std::max(sum, 0.0));
}

// The sums of squares that the next climb along the momentum divides by.
void fold_momentum(const PlanView& plan, const UpdateOptions& options) {
  double* momentum_sq = options.momentum_sq;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.grad[t].address == nullptr || plan.state1[t].address == nullptr) continue;
    if (options.base == Base::kSgd && options.groups[plan.group[t]].momentum == 0) continue;
    momentum_sq[t] = 0;
    for (int32_t c = plan.first_chunk[t]; c < plan.first_chunk[t + 1]; ++c) {
      momentum_sq[t] += plan.partials[static_cast<int64_t>(c) * kNSums + kAA];
    }
  }
}

}  // namespace

void restore(const PlanView& plan, const Pool& pool) {
  const bool streamed = worth_streaming(plan);
  for_chunks(plan, pool, Walk::kBackwards, [&](const Span& chunk) { restore_chunk(plan, chunk, streamed); });
}

void update_apply(const PlanView& plan, const UpdateOptions& options, const Applied& applied, const Pool& pool) {
  if (applied.skip != nullptr && *applied.skip) {
    if (options.restores) restore(plan, pool);
    return;
  }
  const double clip = applied.clip != nullptr ? *applied.clip : 1;
  const bool fills = fills_cache(options.mix.mix);
  if (options.base == Base::kAdam || options.base == Base::kAdamW) advance_steps(plan, options);
  const bool streamed = options.restores && worth_streaming(plan), averages = options.average.taken != nullptr;
  const double gain = averages ? scalars::average_gain(options.average) : 0;
  for_chunks(plan, pool, Walk::kBackwards, [&](const Span& chunk) {
    const int32_t t = chunk.tensor;
    const bool averaged = averages && plan.average[t].address != nullptr;
    const bool has_grad = plan.grad[t].address != nullptr;
    if (fills && !has_grad) forget_cache(plan, chunk);
    const bool only_restored = options.base == Base::kNone && !options.hands_over && !fills;
    if (!has_grad || only_restored) {
      if (options.restores) restore_chunk(plan, chunk, streamed);
      if (averaged) average_chunk(plan, chunk, gain);
      return;
    }
    with_math_type(plan.w[t].dtype, [&](auto zero) {
      ChunkUpdate<decltype(zero)>(plan, options, clip, averaged ? &gain : nullptr, t, streamed).run(chunk);
    });
  });
  if (averages) ++*options.average.taken;
  mark_written(plan, options);
  if (fills) fold_cache(plan, options.mix.cache_norm);
  if (options.momentum_sq != nullptr) fold_momentum(plan, options);
}

void update(const PlanView& plan, const UpdateOptions& options, const Pool& pool) {
  const MixOptions& mix = options.mix;
  const bool decomposes = mix.mix == Mix::kDecompose, clips = options.max_grad_norm > 0;
  double* report = options.report;

  ReduceOptions wanted{.a = plan.grad};
  if (decomposes) wanted = {.a = plan.first, .b = plan.grad};
  if (adds_cache(mix.mix) && clips) wanted.b = plan.cache;
  if (mix.mix == Mix::kBlend && clips) wanted.b = plan.first;
  if (!options.looked) std::fill_n(report, static_cast<int>(kNReport), 0.0);
  bool bad = found_inf(options.scaling);
  double clip = 1;
  const double* grad_sq = plan.sums_of(decomposes ? kBB : kAA);
  if (options.reduces()) {
    reduce(plan, wanted, pool);
    unscale_sums(plan, options);
    if (options.after_sums != nullptr) (*options.after_sums)();
    bad = bad || (options.check && !finite(plan, grad_sq));
    report[options.looked ? kSecondNorm : kGradNorm] = std::sqrt(grad_sq[plan.n_tensors]);
  }
  mix_coeffs(plan, options);
  if (clips) {
    report[kUpdateNorm] = update_norm(plan, options, grad_sq);
    clip = scalars::clip_factor(options.max_grad_norm, report[kUpdateNorm]);
  }
  if (bad && report[kSkippedFirst] == 0) report[options.looked ? kSkippedSecond : kSkippedFirst] = 1;
  const bool skip = report[kSkippedFirst] != 0 || report[kSkippedSecond] != 0;
  if (skip) ++*options.skips;
  update_apply(plan, options, {&skip, &clip}, pool);
  if (fills_cache(mix.mix) && !skip) keep_cache_norms(plan, mix);
}

}  // namespace samkern::cpu
