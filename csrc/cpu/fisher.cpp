// fisher_accumulate: F = keep F + gain (scale g)^2.
#include "../passes.h"
#include "launchers.h"

namespace samkern::cpu {
namespace {

template <typename T>
SAMKERN_CLONES void scale_range(const T* g, int64_t n, T scale, T* __restrict scaled) {
  for (int64_t i = 0; i < n; ++i) scaled[i] = scale * g[i];
}

template <typename T>
SAMKERN_CLONES void accumulate_range(const T* f, const T* g, int64_t n, T keep, T gain, T* sum) {
  SAMKERN_VECTORIZE
  for (int64_t i = 0; i < n; ++i) sum[i] = math::accumulate_square(f[i], g[i], keep, gain);
}

template <typename T>
void accumulate_chunk(const PlanView& plan, const FisherOptions& options, const Span& chunk) {
  const Operand &f = plan.w[chunk.tensor], &g = plan.grad[chunk.tensor];
  T buffer_f[kBlock], buffer_g[kBlock], scaled[kBlock];
  for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
    const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
    const T* values = read(g, at, n, buffer_g);
    if (options.scale != nullptr) {
      scale_range(values, n, static_cast<T>(*options.scale), scaled);
      values = scaled;
    }
    T* sum = target(f, at, buffer_f);
    accumulate_range(read(f, at, n, buffer_f), values, n, static_cast<T>(options.keep), static_cast<T>(options.gain),
                     sum);
    write(f, at, n, sum);
  }
}

}  // namespace

void fisher_accumulate(const PlanView& plan, const FisherOptions& options, const Pool& pool) {
  if (options.skip != nullptr && *options.skip) return;
  for_chunks(plan, pool, Walk::kForwards, [&](const Span& chunk) {
    with_math_type(plan.w[chunk.tensor].dtype,
                   [&](auto zero) { accumulate_chunk<decltype(zero)>(plan, options, chunk); });
  });
}

}  // namespace samkern::cpu
