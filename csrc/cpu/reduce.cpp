// norms and difference_dot: sums of squares and products of whole tensor lists. Chunks and filters are added in a fixed
// order in double, so the result does not depend on the number of threads.
#include <numeric>

#include "../scalars.h"
#include "bits.h"
#include "launchers.h"
#include "sums.h"

namespace samkern::cpu {
namespace {

template <typename T>
SAMKERN_CLONES void weigh_range(const T* w, const T* g, int64_t n, T eta, T* __restrict weighed) {
  for (int64_t i = 0; i < n; ++i) weighed[i] = math::weigh_element(w[i], g[i], eta);
}

// What the perturbation needs to know of one tensor. kEuclidean needs nothing beyond sum a^2.
Climb climb_for(const PlanView& plan, const ReduceOptions& options, int32_t tensor) {
  if (options.climbs == nullptr || options.a[tensor].address == nullptr) return Climb::kEuclidean;
  const ClimbGroup& group = options.climbs[plan.group[tensor]];
  return value(group.rho) > 0 || is_noise(group.climb) ? climb_of(group, plan.filters[tensor]) : Climb::kEuclidean;
}

bool scales_by_weights(Climb climb) {
  return climb == Climb::kLayer || climb == Climb::kLars || climb == Climb::kLayerSign || climb == Climb::kTrust ||
         climb == Climb::kNoiseTensor;
}

// The bits that a tensor's kTT is summed through; no address: in full.
Operand mask_for(const PlanView& plan, const ReduceOptions& options, int32_t tensor) {
  return options.masked && options.a[tensor].address != nullptr ? plan.mask[tensor] : Operand{};
}

// n values of a from `at`, zeros where the mask has them.
template <typename T>
const T* through(const Operand& mask, int64_t at, int64_t n, const T* a, T* buffer) {
  if (mask.address == nullptr) return a;
  uint32_t words[kBlockWords];
  load_bits(mask, at, n, words);
  choose_or_zero(words, n, a, buffer);
  return buffer;
}

template <typename T>
void reduce_chunk(const PlanView& plan, const ReduceOptions& options, const Span& chunk) {
  const Operand a = options.a[chunk.tensor];
  const Operand b = options.b != nullptr ? options.b[chunk.tensor] : Operand{};
  const Climb climb = climb_for(plan, options, chunk.tensor);
  const Operand mask = mask_for(plan, options, chunk.tensor);
  const bool masked = mask.address != nullptr;
  // Of filters the sums are added, but these are masked sums if there is a mask. Noise goes by the weights alone.
  const bool squares = a.address != nullptr && (climb != Climb::kFilter || masked) && !is_noise(climb);
  const bool element = climb == Climb::kElement;
  const bool weights = options.weights || scales_by_weights(climb);
  const T eta = element ? static_cast<T>(options.climbs[plan.group[chunk.tensor]].eta) : T{};
  double sums[kNSums] = {};
  T buffer_a[kBlock], buffer_b[kBlock], buffer_w[kBlock], kept[kBlock], weighed[kBlock];
  for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
    const T* values_a = a.address != nullptr ? read(a, at, n, buffer_a) : nullptr;
    const T* values_b = b.address != nullptr ? read(b, at, n, buffer_b) : nullptr;
    if (squares) sums[kAA] += sum_squares(values_a, n);
    if (values_b != nullptr) sums[kBB] += sum_squares(values_b, n);
    if (values_a != nullptr && values_b != nullptr) sums[kAB] += sum_products(values_a, values_b, n);
    if (masked && climb != Climb::kFilter && !element)
      sums[kTT] += sum_squares(through(mask, at, n, values_a, kept), n);
    if (element || weights) {
      const T* values_w = read(plan.w[chunk.tensor], at, n, buffer_w);
      if (weights) sums[kWW] += sum_squares(values_w, n);
      if (element) {
        weigh_range(values_w, through(mask, at, n, values_a, kept), n, eta, weighed);
        sums[kTT] += sum_squares(weighed, n);
      }
    }
  }
  std::copy_n(sums, kNSums, plan.partials + static_cast<int64_t>(chunk.chunk) * kNSums);
}

template <typename T>
void multiply_differences(const PlanView& plan, const Span& chunk) {
  const Operand &a = plan.grad[chunk.tensor], &b = plan.first[chunk.tensor];
  const Operand &c = plan.cache[chunk.tensor], &d = plan.state1[chunk.tensor];
  double sums[kNSums] = {};
  T buffer_a[kBlock], buffer_b[kBlock], buffer_c[kBlock], buffer_d[kBlock];
  for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
    sums[kAA] += sum_difference_products(read(a, at, n, buffer_a), read(b, at, n, buffer_b), read(c, at, n, buffer_c),
                                         read(d, at, n, buffer_d), n);
  }
  std::copy_n(sums, kNSums, plan.partials + static_cast<int64_t>(chunk.chunk) * kNSums);
}

// Sums of one filter over its runs of `stride` neighbouring elements. Without an address a is left out.
template <typename T>
void reduce_filter(const PlanView& plan, const Operand& a, const Operand& mask, int32_t tensor, int64_t filter) {
  const Filters& filters = plan.filters[tensor];
  double ww = 0, aa = 0;
  T buffer_w[kBlock], buffer_a[kBlock], kept[kBlock];
  for (int64_t run = filter * filters.stride; run < plan.numel[tensor]; run += filters.count * filters.stride) {
    for (int64_t at = run; at < run + filters.stride; at += kBlock) {
      const int64_t n = std::min(kBlock, run + filters.stride - at);
      ww += sum_squares(read(plan.w[tensor], at, n, buffer_w), n);
      if (a.address != nullptr) aa += sum_squares(through(mask, at, n, read(a, at, n, buffer_a), kept), n);
    }
  }
  plan.filter_ww[filters.first + filter] = ww;
  plan.filter_aa[filters.first + filter] = aa;
}

// The same for neighbouring filters that are too short for a call each.
template <typename T>
void reduce_short_filters(const PlanView& plan, const Operand& a, const Operand& mask, const FilterRun& run) {
  const Filters& filters = plan.filters[run.tensor];
  const int64_t per_block = kBlock / filters.stride, end = run.first + run.count;
  T buffer_w[kBlock], buffer_a[kBlock], kept[kBlock];
  for (int64_t f = run.first; f < end; f += per_block) {
    const int64_t count = std::min(per_block, end - f), at = f * filters.stride, n = count * filters.stride;
    const T* w = read(plan.w[run.tensor], at, n, buffer_w);
    const T* values = a.address != nullptr ? through(mask, at, n, read(a, at, n, buffer_a), kept) : w;
    for (int64_t i = 0; i < count; ++i) {
      double ww = 0, aa = 0;
      for (int64_t j = i * filters.stride; j < (i + 1) * filters.stride; ++j) {
        ww += static_cast<double>(w[j]) * w[j];
        aa += static_cast<double>(values[j]) * values[j];
      }
      plan.filter_ww[filters.first + f + i] = ww;
      plan.filter_aa[filters.first + f + i] = aa;
    }
  }
}

void reduce_filters(const PlanView& plan, const ReduceOptions& options, const Pool& pool) {
  for_parts(pool, plan.n_filter_runs, [&](int64_t index) {
    const FilterRun& run = plan.filter_runs[index];
    const Climb climb = climb_for(plan, options, run.tensor);
    if (climb != Climb::kFilter && climb != Climb::kNoiseFilter) return;
    const Operand a = is_noise(climb) ? Operand{} : options.a[run.tensor], mask = mask_for(plan, options, run.tensor);
    with_math_type(plan.w[run.tensor].dtype, [&](auto zero) {
      using T = decltype(zero);
      if (has_short_filters(plan, run.tensor)) return reduce_short_filters<T>(plan, a, mask, run);
      for (int64_t f = run.first; f < run.first + run.count; ++f) reduce_filter<T>(plan, a, mask, run.tensor, f);
    });
  });
}

// norm(a)^2, unless its filters are masked, and norm(T a)^2 of one tensor from its filters.
void fold_filters(const PlanView& plan, int32_t tensor, double eta, bool masked, double* sums) {
  const Filters& filters = plan.filters[tensor];
  for (int64_t f = filters.first; f < filters.first + filters.count; ++f) {
    const double t = std::sqrt(plan.filter_ww[f]) + eta;
    if (!masked) sums[kAA] += plan.filter_aa[f];
    sums[kTT] += t * t * plan.filter_aa[f];
  }
}

// norm(w)^2 of one tensor.
double sum_filters(const PlanView& plan, int32_t tensor) {
  const double* filters = plan.filter_ww + plan.filters[tensor].first;
  return std::accumulate(filters, filters + plan.filters[tensor].count, 0.0);
}

void fold(const PlanView& plan, const ReduceOptions& options) {
  double total[kNSums] = {};
  for (int32_t tensor = 0; tensor < plan.n_tensors; ++tensor) {
    double sums[kNSums] = {};
    for (int32_t c = plan.first_chunk[tensor]; c < plan.first_chunk[tensor + 1]; ++c) {
      for (int s = 0; s < kNSums; ++s) sums[s] += plan.partials[static_cast<int64_t>(c) * kNSums + s];
    }
    if (options.climbs != nullptr) {
      const ClimbGroup& group = options.climbs[plan.group[tensor]];
      const bool masked = mask_for(plan, options, tensor).address != nullptr;
      const Climb climb = climb_for(plan, options, tensor);
      if (climb == Climb::kFilter) fold_filters(plan, tensor, group.eta, masked, sums);
      if (climb == Climb::kNoiseFilter) sums[kWW] = sum_filters(plan, tensor);
      const double gg = masked ? sums[kTT] : sums[kAA];
      sums[kTT] = value(group.rho) > 0 ? scalars::weighted_sq(group, sums[kWW], gg, sums[kTT]) : 0;
    }
    for (int s = 0; s < kNSums; ++s) {
      plan.sums_of(static_cast<Sum>(s))[tensor] = sums[s];
      total[s] += sums[s];
    }
  }
  for (int s = 0; s < kNSums; ++s) plan.sums_of(static_cast<Sum>(s))[plan.n_tensors] = total[s];
}

}  // namespace

void reduce(const PlanView& plan, const ReduceOptions& options, const Pool& pool) {
  bool filters = false;
  for (int32_t tensor = 0; tensor < plan.n_tensors; ++tensor) {
    const Climb climb = climb_for(plan, options, tensor);
    filters = filters || climb == Climb::kFilter || climb == Climb::kNoiseFilter;
  }
  if (filters) reduce_filters(plan, options, pool);
  for_chunks(plan, pool, Walk::kForwards, [&](const Span& chunk) {
    with_math_type(plan.w[chunk.tensor].dtype, [&](auto zero) { reduce_chunk<decltype(zero)>(plan, options, chunk); });
  });
  fold(plan, options);
}

void difference_dot(const PlanView& plan, const Pool& pool) {
  for_chunks(plan, pool, Walk::kForwards, [&](const Span& chunk) {
    with_math_type(plan.w[chunk.tensor].dtype, [&](auto zero) { multiply_differences<decltype(zero)>(plan, chunk); });
  });
  fold(plan, {});
}

void scale_sums(const PlanView& plan, Sum which, double factor) {
  double* sums = plan.sums_of(which);
  for (int32_t t = 0; t <= plan.n_tensors; ++t) sums[t] *= factor;
}

}  // namespace samkern::cpu
