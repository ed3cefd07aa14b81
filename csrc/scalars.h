// What stands between the reduce and the apply phase of a half-step: a few numbers per tensor, from the sums and the
// options. In double, rounded once where the apply phase reads them. No torch; samkern/reference.py has the same
// functions.
#pragma once
#include <cfloat>
#include <cmath>

#include "passes.h"
#include "plan.h"

namespace samkern::scalars {

constexpr double kTiny = 1e-12;

// A gradient entry beyond the square root of the largest fp32 counts as non-finite, on every backend.
SAMKERN_INLINE bool finite(double sum, Dtype dtype) {
  return std::abs(sum) <= (dtype == Dtype::kFloat64 ? DBL_MAX : static_cast<double>(FLT_MAX));
}

// A quotient by a squared norm has no tiny: it would swamp norms near 1e-6.
SAMKERN_INLINE double over_squared(double x, double norm_sq) { return norm_sq > 0 ? x / norm_sq : 0; }

// s of one tensor in eps = s * direction. `norm` is norm(T g) over all perturbed tensors; ww, gg are this tensor's.
// A direction that grows with g also takes `unscale`, so that g may be read with its loss scale.
SAMKERN_INLINE double climb_scale(const ClimbGroup& group, double ww, double gg, double norm, double unscale) {
  const double global = value(group.rho) / (norm + kTiny) * unscale;
  if (group.climb == Climb::kSign) return value(group.rho);
  if (group.climb == Climb::kLayer) {
    const double t = std::sqrt(ww) + group.eta;
    return global * (t * t);
  }
  if (group.climb == Climb::kLars || group.climb == Climb::kLayerSign) {
    const double scale = gg > 0 ? value(group.rho) * std::sqrt(ww) / (std::sqrt(gg) + kTiny) : 0;
    return group.climb == Climb::kLars ? scale * unscale : scale;
  }
  if (group.climb == Climb::kTrust) {
    const double trust = std::sqrt(ww) / (std::sqrt(gg) + kTiny);
    return global * (trust < group.trust_clip ? trust : group.trust_clip);
  }
  return global;  // T of kElement and kFilter is applied per element and per filter
}

// Share of this tensor in norm(T g)^2. `tt` is the sum for kElement and kFilter.
SAMKERN_INLINE double weighted_sq(const ClimbGroup& group, double ww, double gg, double tt) {
  if (group.climb == Climb::kElement || group.climb == Climb::kFilter) return tt;
  if (group.climb == Climb::kLayer) {
    const double t = std::sqrt(ww) + group.eta;
    return t * t * gg;
  }
  return gg;
}

// Weight of the cache in u = g + B c. cache_norm is 0 until a look has filled the cache.
SAMKERN_INLINE double reuse_coeff(double alpha, double gg, double cache_norm) {
  return cache_norm > 0 ? alpha * (std::sqrt(gg) / cache_norm) : 0;
}

// The norm that a look leaves for the next reuse. Below min_sine the cache is rounding residue, which the quotient of
// reuse_coeff would blow up to alpha norm(g).
SAMKERN_INLINE double kept_cache_norm(double cc, double second_sq, double min_sine) {
  const double norm = std::sqrt(cc);
  return norm > min_sine * std::sqrt(second_sq) ? norm : 0;
}

// torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), NaN if the norm is.
SAMKERN_INLINE double clip_factor(double max_norm, double norm) {
  const double factor = max_norm / (norm + 1e-6);
  return factor >= 1 ? 1 : factor;
}

// k of the average that has taken `taken` weights so far; 1: it becomes w.
SAMKERN_INLINE double average_gain(const AverageOptions& average) {
  const auto m = static_cast<double>(*average.taken);
  if (average.mean) return 1 / (m + 1);
  if (m == 0) return 1;
  const double bound = (1 + m) / (10 + m);
  return 1 - (average.warmup && bound < average.decay ? bound : average.decay);
}

}  // namespace samkern::scalars
