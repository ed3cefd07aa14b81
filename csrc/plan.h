// What a kernel sees of the tensor lists of one optimizer: plain structs, no torch, no CUDA headers.
#pragma once
#include <cstdint>

#include "inline.h"

namespace samkern {

// Elements of one tensor that are summed together. Fixed, so that a sum never depends on the device or the number of
// threads: every chunk has its own partial sum, and partial sums are added in the order of the chunks.
constexpr int64_t kChunk = 1 << 16;

// The same on a GPU, where a list of ordinary size has to keep some hundred blocks busy.
constexpr int64_t kDeviceChunk = 1 << 14;

enum class Dtype : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

SAMKERN_INLINE constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Bits of a mask over n entries take whole words.
SAMKERN_INLINE constexpr int64_t mask_bytes(int64_t n) { return (n + 31) / 32 * 4; }
inline bool begins_a_word(const void* bits) { return reinterpret_cast<uintptr_t>(bits) % 4 == 0; }

// The storage of one tensor in one role. No address: this tensor plays no such role in this call.
struct Operand {
  void* address = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// The filters (dim-0 slices) of a dense tensor, in memory order: element i lies in filter (i / stride) % count.
struct Filters {
  int64_t count;  // 0 for tensors of fewer than two dimensions: every entry is its own filter
  int64_t stride;
  int64_t first;  // place of its first filter in the tables of filters
};

// One step of a tensor's memory order, the largest first: entries that lie `size` apart in turn are `step` apart in
// row-major order.
struct Dim {
  int64_t size, step;
};

// Filters that one thread sums: about a chunk's worth of elements, at least one filter.
struct FilterRun {
  int32_t tensor;
  int64_t first;
  int64_t count;
};

// Sums over pairs of operands a, b and the weights w. kTT is the sum of (T a)^2 with the perturbation's operator T, kCC
// the sum of squares of a cache that an update has just written.
enum Sum : int32_t { kAA, kAB, kBB, kWW, kTT, kCC, kNSums };

// Scalars of one tensor that the apply phase reads.
enum Coeff : int32_t { kScale, kProject, kMixA, kMixB, kStepSize, kBias2, kNCoeffs };

struct PlanView {
  // Operands by role, [n_tensors] each. `grad` is what the latest backward left; `first` the gradient at w, set aside
  // while `grad` is the one at w + eps. `saved` is w itself while w is perturbed. `state1`, `state2` are
  // momentum_buffer or exp_avg, and exp_avg_sq; `step` is Adam's 0-d step; `out` receives u for other bases; `mask` are
  // bits, one an entry in the order of w's memory, from a multiple of 4 bytes on: where 0, the entry is not perturbed.
  // `average` is a running average of w, in the math type.
  Operand *w, *grad, *first, *saved, *cache, *state1, *state2, *step, *out, *mask, *average;
  uint8_t* fresh;  // [n_tensors] 1: state1 has never been written (SGD's first step takes u undampened)

  const int64_t* numel;         // [n_tensors]
  const int64_t* flat;          // [n_tensors] entries of the list before this tensor's
  const int64_t* slices;        // [n_tensors] dim-0 slices of the list before this tensor's
  const int32_t* first_dim;     // [n_tensors + 1] of a tensor's dims; a tensor in row-major order has none
  const Dim* dims;              // [first_dim[n_tensors]]
  const int32_t* group;         // [n_tensors] row of the per-group options
  const Filters* filters;       // [n_tensors]
  const int32_t* chunk_tensor;  // [n_chunks] which tensor; an empty tensor keeps its number and owns no chunk
  const int32_t* chunk_index;   // [n_chunks] which chunk of it
  const int64_t* chunk_cost;    // [n_chunks + 1] work before each chunk, to share chunks out evenly
  const int32_t* first_chunk;   // [n_tensors + 1]
  const FilterRun* filter_runs;
  const int32_t* block_begin;  // [n_blocks + 1] chunks of each block of a grid; only on a GPU
  int32_t n_tensors, n_chunks, n_filter_runs, n_blocks;
  int32_t common_dtype;  // the Dtype of all weights and gradients, or -1; only on a GPU

  double* partials;    // [n_chunks][kNSums]
  double* sums;        // [kNSums][n_tensors + 1]: per tensor, then over all
  double* coeffs;      // [kNCoeffs][n_tensors]
  double* filter_ww;   // [all filters] sum of w^2
  double* filter_aa;   // [all filters] sum of a^2
  uint32_t* arrivals;  // blocks of a grid that are done, 0 between launches; only on a GPU

  SAMKERN_INLINE double* sums_of(Sum which) const { return sums + static_cast<int64_t>(which) * (n_tensors + 1); }
  SAMKERN_INLINE double* coeffs_of(Coeff which) const { return coeffs + static_cast<int64_t>(which) * n_tensors; }
};

// Place in row-major order of the entry that is number `at` in a tensor's memory.
SAMKERN_INLINE int64_t row_major(const PlanView& plan, int32_t tensor, int64_t at) {
  const int32_t begin = plan.first_dim[tensor];
  if (begin == plan.first_dim[tensor + 1]) return at;
  int64_t place = 0;
  for (int32_t d = plan.first_dim[tensor + 1] - 1; d >= begin; --d) {
    const Dim dim = plan.dims[d];
    place += at % dim.size * dim.step;
    at /= dim.size;
  }
  return place;
}

// The dim-0 slices of a tensor, of one dimension too; `first` counts those of the whole list.
SAMKERN_INLINE Filters slices_of(const PlanView& plan, int32_t tensor) {
  const Filters filters = plan.filters[tensor];
  return filters.count > 0 ? Filters{filters.count, filters.stride, plan.slices[tensor]}
                           : Filters{plan.numel[tensor], 1, plan.slices[tensor]};
}

// How a group is perturbed: eps = scale * direction. Values are shared with samkern/optim/perturbation.py.
enum class Climb : int32_t {
  kEuclidean,  // rho g / norm(g)
  kSign,       // rho sign(g)
  kElement,    // rho T^2 g / norm(T g), T = |w| + eta
  kFilter,     // the same, T = norm(w_f) + eta
  kLayer,      // the same, T = norm(w_i) + eta
  kLars,       // rho norm(w_i) g_i / norm(g_i)
  kLayerSign,  // rho norm(w_i) / norm(g_i) sign(g_i)
  kTrust,      // rho min(norm(w_i) / norm(g_i), trust_clip) g_i / norm(g)
  // Along noise: rho n z, z standard normal.
  kNoiseFilter,  // n = norm(w_f), of a tensor of fewer than two dimensions norm(w_i)
  kNoiseTensor,  // n = norm(w_i)
};

SAMKERN_INLINE constexpr bool is_noise(Climb climb) {
  return climb == Climb::kNoiseFilter || climb == Climb::kNoiseTensor;
}

// A hyper-parameter. `device` wins if there is one: a captured graph reads it anew in every replay.
struct Scalar {
  double host = 0;
  const float* device = nullptr;
};

SAMKERN_INLINE double value(const Scalar& x) { return x.device != nullptr ? static_cast<double>(*x.device) : x.host; }

// A loss scale, as torch.amp.GradScaler keeps it. Sums, norms and coefficients are those of the unscaled gradients.
struct Scaling {
  const float* grad_scale = nullptr;  // gradients are so many times too large
  const float* found_inf = nullptr;   // not 0: the step is skipped
};

SAMKERN_INLINE double unscale(const Scaling& x) {
  return x.grad_scale != nullptr ? 1 / static_cast<double>(*x.grad_scale) : 1;
}
SAMKERN_INLINE bool found_inf(const Scaling& x) { return x.found_inf != nullptr && *x.found_inf != 0; }

struct ClimbGroup {
  Climb climb = Climb::kEuclidean;
  Scalar rho;  // 0: not perturbed
  double eta = 0, trust_clip = 0;
};

// The climb of one tensor: with one-entry filters, filter-wise means element-wise, and of noise tensor by tensor.
SAMKERN_INLINE Climb climb_of(const ClimbGroup& group, const Filters& filters) {
  if (filters.count > 0) return group.climb;
  if (group.climb == Climb::kNoiseFilter) return Climb::kNoiseTensor;
  return group.climb == Climb::kFilter ? Climb::kElement : group.climb;
}

// What the base optimizer receives: u = A a + B b. Values are shared with samkern/options.py.
enum class Mix : int32_t {
  kGradient,    // u = grad
  kDecompose,   // u = grad; cache = grad - k first, the part of grad orthogonal to first
  kReuse,       // u = grad + alpha norm(grad) / norm(cache) cache
  kDifference,  // u = grad; cache = grad - first
  kAdd,         // u = grad + alpha cache
  kBlend,       // u = alpha grad + (1 - alpha) first
};

SAMKERN_INLINE constexpr bool fills_cache(Mix mix) { return mix == Mix::kDecompose || mix == Mix::kDifference; }
SAMKERN_INLINE constexpr bool adds_cache(Mix mix) { return mix == Mix::kReuse || mix == Mix::kAdd; }

enum class Scope : int32_t { kGlobal, kTensor };

struct MixOptions {
  Mix mix = Mix::kGradient;
  Scope scope = Scope::kGlobal;
  double min_sine = 0;           // a cache no longer than this share of norm(grad) is rounding residue: never reused
  double* cache_norm = nullptr;  // [n_tensors + 1] per tensor, then over all; kept between steps; 0: not to be reused
  const double* weights = nullptr;  // [n_tensors] of kAdd: factors on alpha; null: 1
};

// How an update takes the new w into plan.average, which holds `taken` weights already: avg += k (w - avg).
struct AverageOptions {
  int64_t* taken = nullptr;  // null: it does not; else counted up unless the step is skipped
  bool mean = true;          // k = 1 / (taken + 1), the mean of all; else 1 - decay after the first, which is copied
  double decay = 0;
  bool warmup = false;  // the decay is at most (1 + taken) / (10 + taken)
};

enum class Base : int32_t { kNone, kSgd, kAdam, kAdamW };

struct BaseGroup {
  Scalar lr;
  double weight_decay = 0;
  double momentum = 0, dampening = 0;  // SGD
  bool nesterov = false;
  double beta1 = 0, beta2 = 0, eps = 0;  // Adam, AdamW
  double alpha = 0;                      // of kReuse, kAdd and kBlend
};

// What a step tells about itself: one row of doubles on the device of the parameters, read only when somebody asks.
// The names are exported to Python as samkern._C.report_fields.
enum Report : int32_t {
  kGradNorm,       // norm of the gradient at w, over all tensors that have one
  kSecondNorm,     // norm of the gradient at w + eps
  kUpdateNorm,     // norm of u before clipping; only computed when clipping
  kPerturbNorm,    // the norm that eps was divided by: norm(T g) over the perturbed tensors
  kRealisedNorm,   // norm(w' - w) over half-precision tensors
  kRealisedShare,  // <w' - w, eps> / norm(eps)^2 over half-precision tensors; NaN if a look had none
  kSkippedFirst,   // 1: a gradient at w was not finite
  kSkippedSecond,  // 1: a gradient at w + eps was not finite
  kNReport
};

}  // namespace samkern
