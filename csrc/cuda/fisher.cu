// fisher_accumulate: F = keep F + gain (scale g)^2. One launch.
#include "harness.cuh"
#include "launchers.h"
#include "start.cuh"

namespace samkern::cuda {
namespace {

struct FisherArgs {
  PlanView plan;
  FisherOptions options;
};

template <Kind kind, typename T>
SAMKERN_DEVICE void accumulate_chunk(const FisherArgs& args, const Chunk& chunk) {
  const Operand f = args.plan.w[chunk.tensor], g = args.plan.grad[chunk.tensor];
  const FisherOptions& options = args.options;
  const T keep = static_cast<T>(options.keep), gain = static_cast<T>(options.gain);
  const T scale = options.scale != nullptr ? static_cast<T>(*options.scale) : T{1};
  for_block<kPack<kind, T>>(chunk.n, aligned(f) && aligned(g), [&](auto width, int32_t i) {
    constexpr int N = decltype(width)::value;
    T values[N], sum[N];
    load<kind>(g, chunk.at + i, values);
    load<kind>(f, chunk.at + i, sum);
    for (int k = 0; k < N; ++k) sum[k] = math::accumulate_square(sum[k], scale * values[k], keep, gain);
    store<kind>(f, chunk.at + i, sum);
  });
}

template <Kind kind>
SAMKERN_KERNEL fisher_kernel(SAMKERN_ARGUMENT FisherArgs args) {
  if (args.options.skip != nullptr && *args.options.skip) return;
  const PlanView& plan = args.plan;
  for (int32_t c = plan.block_begin[device::block()]; c < plan.block_begin[device::block() + 1]; ++c) {
    const Chunk chunk = chunk_at(plan, c);
    with_math_type<kind>(plan.w[chunk.tensor], [&](auto zero) { accumulate_chunk<kind, decltype(zero)>(args, chunk); });
  }
}

}  // namespace

const char* fisher_accumulate(const PlanView& plan, const FisherOptions& options, const device::Stream& stream) {
  const FisherArgs args{plan, options};
  auto start = [&](void (*kernel)(FisherArgs)) { return device::launch(kernel, args, plan.n_blocks, false, stream); };
  switch (kind_of(plan)) {
    case Kind::kFloat32: return start(fisher_kernel<Kind::kFloat32>);
    case Kind::kBFloat16: return start(fisher_kernel<Kind::kBFloat16>);
    case Kind::kFloat16: return start(fisher_kernel<Kind::kFloat16>);
    default: return start(fisher_kernel<Kind::kAny>);
  }
}

}  // namespace samkern::cuda
