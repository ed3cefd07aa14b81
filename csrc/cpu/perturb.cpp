// perturb: saved = w;  w = w + scale * direction, with the norms of the gradient in front; and the same along noise,
// with norms of the weights.
#include "../scalars.h"
#include "bits.h"
#include "launchers.h"
#include "noise.h"
#include "sums.h"

namespace samkern::cpu {
namespace {

// Directions, as what becomes of one entry.
template <typename T>
struct Along {
  T scale;
  SAMKERN_INLINE T operator()(T w, T g) const { return math::climb(w, g, scale); }
};

template <typename T>
struct AlongSign {
  T scale;
  SAMKERN_INLINE T operator()(T w, T g) const { return math::climb_sign(w, g, scale); }
};

template <typename T>
struct AlongElement {
  T scale, eta;
  SAMKERN_INLINE T operator()(T w, T g) const { return math::climb_element(w, g, scale, eta); }
};

template <typename T, typename Direction>
SAMKERN_CLONES void climb_range(const T* w, const T* g, int64_t n, Direction direction, T* climbed) {
  SAMKERN_VECTORIZE
  for (int64_t i = 0; i < n; ++i) climbed[i] = direction(w[i], g[i]);
}

// Where a bit is 0, w stays.
template <typename T, typename Direction>
SAMKERN_CLONES void climb_masked_range(const T* w, const T* g, const uint32_t* words, int64_t n, Direction direction,
                                       T* climbed) {
  using Key = math::KeyOf<T>;
  int64_t i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    const Key word = words[i / kWordBits];
    SAMKERN_VECTORIZE
    for (int l = 0; l < kWordBits; ++l) {
      const T old = w[i + l], moved = direction(old, g[i + l]);
      climbed[i + l] = (word & kLaneBits<Key>.at[l]) != 0 ? moved : old;
    }
  }
  for (int l = 0; i + l < n; ++l) {
    const T old = w[i + l];
    climbed[i + l] = (words[i / kWordBits] >> l & 1) != 0 ? direction(old, g[i + l]) : old;
  }
}

template <typename T, typename Direction>
void climb_through(const uint32_t* words, const T* w, const T* g, int64_t n, Direction direction, T* climbed) {
  if (words == nullptr) return climb_range(w, g, n, direction, climbed);
  climb_masked_range(w, g, words, n, direction, climbed);
}

// Filter-wise: the scale changes with every run of `stride` elements. T_f^2 is applied in double and rounded once.
template <typename T>
void climb_filters(const PlanView& plan, int32_t tensor, int64_t at, const T* w, const T* g, const uint32_t* words,
                   int64_t n, double scale, double eta, T* climbed) {
  const Filters& filters = plan.filters[tensor];
  const bool is_short = has_short_filters(plan, tensor);
  uint32_t of_run[kBlockWords];  // filters and words do not begin at the same places
  for (int64_t done = 0; done < n;) {
    const int64_t run = (at + done) / filters.stride;
    const int64_t step = std::min(n - done, (run + 1) * filters.stride - (at + done));
    const double t = std::sqrt(plan.filter_ww[filters.first + run % filters.count]) + eta;
    const T scale_f = static_cast<T>(scale * (t * t));
    if (is_short) {
      for (int64_t i = done; i < done + step; ++i) {
        const bool moves = words == nullptr || (words[i / kWordBits] >> i % kWordBits & 1) != 0;
        climbed[i] = moves ? math::climb(w[i], g[i], scale_f) : w[i];
      }
    } else {
      if (words != nullptr) load_bits(plan.mask[tensor], at + done, step, of_run);
      climb_through(words != nullptr ? of_run : nullptr, w + done, g + done, step, Along<T>{scale_f}, climbed + done);
    }
    done += step;
  }
}

// `words`: the bits of a mask, or null. `climbed` may be w.
template <typename T>
void climb_block(const PlanView& plan, const ClimbGroup& group, double scale, int32_t tensor, int64_t at, const T* w,
                 const T* g, const uint32_t* words, int64_t n, T* climbed) {
  const T s = static_cast<T>(scale);
  switch (climb_of(group, plan.filters[tensor])) {
    case Climb::kElement: return climb_through(words, w, g, n, AlongElement<T>{s, static_cast<T>(group.eta)}, climbed);
    case Climb::kFilter: return climb_filters(plan, tensor, at, w, g, words, n, scale, group.eta, climbed);
    case Climb::kSign:
    case Climb::kLayerSign: return climb_through(words, w, g, n, AlongSign<T>{s}, climbed);
    default: return climb_through(words, w, g, n, Along<T>{s}, climbed);
  }
}

// What half-precision weights made of their perturbation: eps vanishes where it is below half a unit in the last place.
enum Realised { kMovedSq, kMovedEps, kEpsSq, kNRealised };
static_assert(kNRealised <= static_cast<int>(kNSums));

template <typename T>
SAMKERN_CLONES void subtract_range(const T* a, const T* b, int64_t n, T* __restrict difference) {
  for (int64_t i = 0; i < n; ++i) difference[i] = a[i] - b[i];
}

template <typename T>
void add_realised(const T* w, const T* climbed, const T* rounded, int64_t n, double* realised) {
  T moved[kBlock], eps[kBlock];
  subtract_range(rounded, w, n, moved);
  subtract_range(climbed, w, n, eps);
  realised[kMovedSq] += sum_squares(moved, n);
  realised[kMovedEps] += sum_products(moved, eps, n);
  realised[kEpsSq] += sum_squares(eps, n);
}

template <typename T>
void perturb_chunk(const PlanView& plan, const ClimbGroup& group, double scale, const Span& chunk, bool streamed) {
  const Operand &w = plan.w[chunk.tensor], &saved = plan.saved[chunk.tensor], &first = plan.first[chunk.tensor];
  const Operand& mask = plan.mask[chunk.tensor];
  const bool half = size_of(w.dtype) == 2;
  double realised[kNRealised] = {};
  uint32_t words[kBlockWords];
  T buffer_w[kBlock], buffer_g[kBlock], buffer_climbed[kBlock], rounded[kBlock];
  for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
    copy(saved, w, at, n, streamed);
    if (!std::isfinite(scale)) continue;
    const T* values = read(w, at, n, buffer_w);
    T* climbed = target(w, at, buffer_climbed);
    if (mask.address != nullptr) load_bits(mask, at, n, words);
    climb_block(plan, group, scale, chunk.tensor, at, values, read(first, at, n, buffer_g),
                mask.address != nullptr ? words : nullptr, n, climbed);
    write(w, at, n, climbed);
    if (half) add_realised(values, climbed, read(w, at, n, rounded), n, realised);
  }
  std::copy_n(realised, kNRealised, plan.partials + static_cast<int64_t>(chunk.chunk) * kNSums);
}

// Saved weights are not needed before the next pass has read everything else: they bypass the cache unless they are
// few.
bool worth_streaming(const PlanView& plan) {
  constexpr int64_t kFew = 16 << 20;
  int64_t n_bytes = 0;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.saved[t].address != nullptr) n_bytes += plan.numel[t] * size_of(plan.saved[t].dtype);
  }
  return n_bytes > kFew;
}

void report_realised(const PlanView& plan, double* report) {
  double sums[kNRealised] = {};
  for (int32_t c = 0; c < plan.n_chunks; ++c) {
    if (plan.saved[plan.chunk_tensor[c]].address == nullptr) continue;
    for (int s = 0; s < kNRealised; ++s) sums[s] += plan.partials[static_cast<int64_t>(c) * kNSums + s];
  }
  report[kRealisedNorm] = std::sqrt(sums[kMovedSq]);
  report[kRealisedShare] = sums[kEpsSq] > 0 ? sums[kMovedEps] / sums[kEpsSq] : NAN;
}

// The sums of a reduction that has been made while the moments were written.
void take_momentum_sq(const PlanView& plan, const PerturbOptions& options) {
  const int32_t n = plan.n_tensors;
  double *aa = plan.sums_of(kAA), *ww = plan.sums_of(kWW), *tt = plan.sums_of(kTT);
  aa[n] = ww[n] = tt[n] = 0;
  for (int32_t t = 0; t < n; ++t) {
    aa[t] = plan.first[t].address != nullptr ? options.momentum_sq[t] : 0;
    ww[t] = 0;
    tt[t] = value(options.climbs[plan.group[t]].rho) > 0 ? aa[t] : 0;
    aa[n] += aa[t];
    tt[n] += tt[t];
  }
}

// ---- noise

template <typename T>
SAMKERN_CLONES void multiply_range(int64_t n, T factor, T* z) {
  for (int64_t i = 0; i < n; ++i) z[i] *= factor;
}

// z *= std n, which changes with every run of `stride` entries. norm(f) is n of filter f.
template <typename T, typename Norm>
void multiply_by_filters(const Filters& filters, int64_t at, int64_t n, double std, const Norm& norm, T* z) {
  constexpr int64_t kShort = 32;
  int64_t filter = at / filters.stride % filters.count, left = filters.stride - at % filters.stride;
  for (int64_t done = 0; done < n;) {
    const int64_t run = std::min(n - done, left);
    const T factor = static_cast<T>(std * norm(filters.first + filter));
    if (run < kShort) {
      for (int64_t i = done; i < done + run; ++i) z[i] *= factor;
    } else {
      multiply_range(run, factor, z + done);
    }
    done += run;
    left = filters.stride;
    filter = filter + 1 == filters.count ? 0 : filter + 1;
  }
}

// std n z of entries [at, at + n) of a tensor. `std`: where one n is for the whole tensor, std n.
template <typename T>
const T* noise_block(const PlanView& plan, const NoiseOptions& options, double std, int32_t tensor, int64_t at,
                     int64_t n, float (&buffer)[kBlock + 4], T* wide) {
  float* const normals = fill_normals(plan, options, tensor, at, n, buffer);
  T* z = wide;
  if constexpr (std::is_same_v<T, float>) {
    z = normals;
  } else {
    std::copy_n(normals, n, wide);
  }
  if (options.norms != nullptr) {
    multiply_by_filters(slices_of(plan, tensor), at, n, std, [&](int64_t f) { return options.norms[f]; }, z);
  } else if (climb_of(options.climbs[plan.group[tensor]], plan.filters[tensor]) == Climb::kNoiseFilter) {
    multiply_by_filters(plan.filters[tensor], at, n, std, [&](int64_t f) { return std::sqrt(plan.filter_ww[f]); }, z);
  } else {
    multiply_range(n, static_cast<T>(std), z);
  }
  return z;
}

// w = saved, rounded where w has fewer bits.
template <typename T>
void bring_back(const Operand& w, const Operand& saved, int64_t at, int64_t n) {
  if (w.dtype == saved.dtype) return copy(w, saved, at, n, false);
  T buffer[kBlock];
  write(w, at, n, read(saved, at, n, buffer));
}

template <typename T>
void add_noise(const PlanView& plan, const NoiseOptions& options, double std, const Span& chunk, bool streamed) {
  const Operand &w = plan.w[chunk.tensor], &saved = plan.saved[chunk.tensor], &mask = plan.mask[chunk.tensor];
  const Operand& from = options.from_saved ? saved : w;
  const bool reports = options.report != nullptr && size_of(w.dtype) == 2;
  double realised[kNRealised] = {};
  uint32_t words[kBlockWords];
  float normals[kBlock + 4];
  T buffer_w[kBlock], buffer_z[kBlock], buffer_climbed[kBlock], rounded[kBlock];
  for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
    if (!options.from_saved) copy(saved, w, at, n, streamed);
    if (!std::isfinite(std)) {
      if (options.from_saved) bring_back<T>(w, saved, at, n);
      continue;
    }
    const T* values = read(from, at, n, buffer_w);
    T* climbed = target(w, at, buffer_climbed);
    if (mask.address != nullptr) load_bits(mask, at, n, words);
    const T* z = noise_block(plan, options, std, chunk.tensor, at, n, normals, buffer_z);
    climb_through(mask.address != nullptr ? words : nullptr, values, z, n, Along<T>{1}, climbed);
    write(w, at, n, climbed);
    if (reports) add_realised(values, climbed, read(w, at, n, rounded), n, realised);
  }
  std::copy_n(realised, kNRealised, plan.partials + static_cast<int64_t>(chunk.chunk) * kNSums);
}

// Whether all norms are finite: those given, or those of the weights that move.
bool norms_are_finite(const PlanView& plan, const NoiseOptions& options) {
  if (options.norms != nullptr) {
    return std::all_of(options.norms, options.norms + options.n_norms, [](double x) { return std::isfinite(x); });
  }
  bool finite = true;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    const Dtype dtype = options.report != nullptr ? plan.w[t].dtype : Dtype::kFloat64;
    finite = finite && (plan.saved[t].address == nullptr || scalars::finite(plan.sums_of(kWW)[t], dtype));
  }
  return finite;
}

}  // namespace

void perturb_by_noise(const PlanView& plan, const NoiseOptions& options, const Pool& pool) {
  if (options.norms == nullptr && !options.norms_known) {
    PlanView read = plan;
    if (options.from_saved) read.w = plan.saved;
    reduce(read, {.a = plan.saved, .climbs = options.climbs}, pool);
  }
  const bool finite = norms_are_finite(plan, options);
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    const ClimbGroup& group = options.climbs[plan.group[t]];
    const bool whole = options.norms == nullptr && climb_of(group, plan.filters[t]) == Climb::kNoiseTensor;
    const double n = whole ? std::sqrt(plan.sums_of(kWW)[t]) : 1;
    plan.coeffs_of(kScale)[t] = finite ? value(group.rho) * n : NAN;
  }
  const bool streamed = worth_streaming(plan);
  for_chunks(plan, pool, Walk::kBackwards, [&](const Span& chunk) {
    const int32_t t = chunk.tensor;
    if (plan.saved[t].address == nullptr) return;
    with_math_type(plan.w[t].dtype, [&](auto zero) {
      add_noise<decltype(zero)>(plan, options, plan.coeffs_of(kScale)[t], chunk, streamed);
    });
  });
  if (options.report == nullptr) return;
  std::fill_n(options.report, static_cast<int>(kNReport), 0.0);
  options.report[kSkippedFirst] = finite ? 0 : 1;
  report_realised(plan, options.report);
}

void perturb_apply(const PlanView& plan, const PerturbOptions& options, const Pool& pool) {
  const bool streamed = worth_streaming(plan);
  const double* scale = plan.coeffs_of(kScale);
  for_chunks(plan, pool, Walk::kBackwards, [&](const Span& chunk) {
    const int32_t t = chunk.tensor;
    if (plan.saved[t].address == nullptr) return;
    with_math_type(plan.w[t].dtype, [&](auto zero) {
      perturb_chunk<decltype(zero)>(plan, options.climbs[plan.group[t]], scale[t], chunk, streamed);
    });
  });
  if (options.report != nullptr) report_realised(plan, options.report);
}

void perturb(const PlanView& plan, const PerturbOptions& options, const Pool& pool) {
  if (options.momentum_sq != nullptr) {
    take_momentum_sq(plan, options);
  } else {
    reduce(plan, {.a = plan.first, .climbs = options.climbs, .masked = options.renormalise}, pool);
  }
  const double inverse = unscale(options.scaling);
  scale_sums(plan, kAA, inverse * inverse);
  scale_sums(plan, kTT, inverse * inverse);
  if (options.after_sums != nullptr) (*options.after_sums)();
  const double *gg = plan.sums_of(kAA), *ww = plan.sums_of(kWW), *tt = plan.sums_of(kTT);
  const int32_t n = plan.n_tensors;
  bool finite = !found_inf(options.scaling);
  for (int32_t t = 0; t < n; ++t) {
    const Dtype dtype = plan.w[t].dtype;
    finite = finite && scalars::finite(gg[t], dtype) && scalars::finite(tt[t], dtype) && scalars::finite(ww[t], dtype);
  }
  const double norm = std::sqrt(tt[n]);
  // Climbs that divide by a tensor's own norm have T = 1: tt is its square, masked.
  const double* own = options.renormalise ? tt : gg;
  for (int32_t t = 0; t < n; ++t) {
    const double scale = scalars::climb_scale(options.climbs[plan.group[t]], ww[t], own[t], norm, inverse);
    plan.coeffs_of(kScale)[t] = finite ? (options.along_momentum ? -scale : scale) : NAN;
  }
  std::fill_n(options.report, static_cast<int>(kNReport), 0.0);
  options.report[kGradNorm] = options.along_momentum ? 0 : std::sqrt(gg[n]);
  options.report[kPerturbNorm] = norm;
  options.report[kSkippedFirst] = finite ? 0 : 1;
  perturb_apply(plan, options, pool);
}

}  // namespace samkern::cpu
