// How kernels walk a plan on a GPU, and how a block adds. A half-step is one kernel in three phases:
//
//   reduce   every block sums its chunks; each chunk leaves its partial sums at its own place
//   fold     the partial sums of a tensor are added in a fixed pattern, by whichever block it falls to
//   apply    every block derives the scalars for itself and walks its chunks backwards: what it read last is still in
//   cache
//
// with a grid barrier between them, or as three launches of the same kernel. Bits are the same either way, and on any
// number of blocks: no sum depends on who computes it. The last block to finish leaves what may only change after all
// have read it.
#pragma once
#include "../half_steps.h"
#include "../scalars.h"
#include "device.h"
#include "packs.cuh"

namespace samkern::cuda {

enum Phase : int32_t { kReducePhase = 1, kFoldPhase = 2, kApplyPhase = 4, kAllPhases = 7 };  // a set of bits

template <typename Group>
struct Groups {
  const Group* table;  // null: carried
  Group carried[kCarriedGroups];
};

template <typename Group>
SAMKERN_DEVICE const Group& group_of(const Groups<Group>& groups, const PlanView& plan, int32_t tensor) {
  const int32_t index = plan.group[tensor];
  return groups.table != nullptr ? groups.table[index] : groups.carried[index];
}

struct Chunk {
  int32_t index, tensor;
  int64_t at;
  int32_t n;
};

SAMKERN_DEVICE Chunk chunk_at(const PlanView& plan, int32_t index) {
  const int32_t tensor = plan.chunk_tensor[index];
  const int64_t at = plan.chunk_index[index] * kDeviceChunk, left = plan.numel[tensor] - at;
  return {index, tensor, at, static_cast<int32_t>(left < kDeviceChunk ? left : kDeviceChunk)};
}

// Calls body(Width, i) so that the block covers [0, n): packs if every operand allows, single elements otherwise and at
// the end. `together`: packs of a thread that are taken in one go, so that a body without stores has them all under
// way.
template <int pack, int together = 1, typename Body>
SAMKERN_DEVICE void for_block(int32_t n, bool packed, const Body& body) {
  constexpr int32_t stride = device::kThreads * pack;
  int32_t done = 0;
  if (packed) {
    int32_t i = device::thread() * pack;
    if constexpr (together > 1) {
      for (; i + (together - 1) * stride + pack <= n; i += together * stride) {
        for (int k = 0; k < together; ++k) body(Width<pack>{}, i + k * stride);
      }
    }
    for (; i + pack <= n; i += stride) body(Width<pack>{}, i);
    done = n / pack * pack;
  }
  for (int32_t i = done + device::thread(); i < n; i += device::kThreads) body(Width<1>{}, i);
}

// Calls body with a value of the math type of x: double for fp64, float for everything else.
template <Kind kind, typename Body>
SAMKERN_DEVICE void with_math_type(const Operand& x, const Body& body) {
  if constexpr (kind == Kind::kAny) {
    if (x.dtype == Dtype::kFloat64) return body(double{});
  }
  body(float{});
}

// Sum over the 32 lanes, in a fixed tree; the whole of it in lane 0.
template <typename T>
SAMKERN_DEVICE T warp_sum(T x) {
  for (int by = device::kWarp / 2; by > 0; by /= 2) x += device::shuffle_down(x, by);
  return x;
}

// Sums over the threads of the block, in a fixed tree; every thread gets them. Every thread of the block must come.
template <int n>
SAMKERN_DEVICE void block_sum(double (&x)[n]) {
  double* sums = device::shared<double, n * device::kWarps, 0>();
  const int warp = device::thread() / device::kWarp, lane = device::thread() % device::kWarp;
  for (int k = 0; k < n; ++k) {
    const double sum = warp_sum(x[k]);
    if (lane == 0) sums[k * device::kWarps + warp] = sum;
  }
  device::block_sync();
  for (int k = 0; k < n; ++k) {
    x[k] = 0;
    for (int w = 0; w < device::kWarps; ++w) x[k] += sums[k * device::kWarps + w];
  }
  device::block_sync();  // the next call writes the same places
}

// ---- reduce

struct Reduction {
  const Operand* a;
  const Operand* b;      // null: no sums with b
  bool filters;          // some tensor may climb by filters
  bool weights = false;  // sum w^2 of every tensor
  bool masked = false;   // kTT sums over the entries that plan.mask lets through
};

// The mask of a tensor, if there is one and sums heed it.
SAMKERN_DEVICE Operand mask_of(const PlanView& plan, bool masked, int32_t tensor) {
  return masked ? plan.mask[tensor] : Operand{};
}

// What the perturbation needs to know of one tensor; kEuclidean needs nothing beyond sum a^2. `group` may be null.
SAMKERN_DEVICE Climb climb_for(const PlanView& plan, const Operand* a, int32_t tensor, const ClimbGroup* group) {
  if (group == nullptr || a[tensor].address == nullptr || !(value(group->rho) > 0)) return Climb::kEuclidean;
  return climb_of(*group, plan.filters[tensor]);
}

SAMKERN_DEVICE bool scales_by_weights(Climb climb) {
  return climb == Climb::kLayer || climb == Climb::kLars || climb == Climb::kLayerSign || climb == Climb::kTrust;
}

// Partial sums of one chunk. A thread adds at most 32 products of a kind in T before they are widened.
template <Kind kind_a, Kind kind_b, Kind kind_w, typename T>
SAMKERN_DEVICE void reduce_chunk(const PlanView& plan, const Reduction& what, Climb climb, double eta,
                                 const Chunk& chunk) {
  const Operand a = what.a[chunk.tensor], w = plan.w[chunk.tensor];
  const Operand b = what.b != nullptr ? what.b[chunk.tensor] : Operand{};
  const bool has_a = a.address != nullptr, has_b = b.address != nullptr;
  const bool element = climb == Climb::kElement, weights = what.weights || scales_by_weights(climb);
  const bool needs_w = element || weights;
  const Operand mask = mask_of(plan, what.masked, chunk.tensor);
  const bool masked = has_a && mask.address != nullptr;
  // Of filters, the filters' sums are added instead, unless they are of the masked gradient.
  const bool squares = has_a && (climb != Climb::kFilter || masked);
  T sums[kCC] = {};
  const int32_t n = squares || has_b || needs_w ? chunk.n : 0;
  for_block<kPack<kind_a, T>, 2>(n, aligned(a) && aligned(b) && (!needs_w || aligned(w)), [&](auto width, int32_t i) {
    constexpr int N = decltype(width)::value;
    T va[N] = {}, vb[N] = {}, vw[N] = {};
    if (has_a) load<kind_a>(a, chunk.at + i, va);
    if (has_b) load<kind_b>(b, chunk.at + i, vb);
    if (needs_w) load<kind_w>(w, chunk.at + i, vw);
    for (int k = 0; k < N; ++k) {
      if (squares) sums[kAA] += va[k] * va[k];
      if (has_a && has_b) sums[kAB] += va[k] * vb[k];
      if (has_b) sums[kBB] += vb[k] * vb[k];
      if (weights) sums[kWW] += vw[k] * vw[k];
      if (element && !masked) {
        const T weighed = math::weigh_element(vw[k], va[k], static_cast<T>(eta));
        sums[kTT] += weighed * weighed;
      }
    }
    if (!masked || climb == Climb::kFilter) return;
    const uint32_t bits = load_bits<N>(mask, chunk.at + i);
    for (int k = 0; k < N; ++k) {
      const T kept = (bits >> k & 1) != 0 ? va[k] : T{0};
      const T weighed = element ? math::weigh_element(vw[k], kept, static_cast<T>(eta)) : kept;
      sums[kTT] += weighed * weighed;
    }
  });
  double total[kCC];
  for (int s = 0; s < kCC; ++s) total[s] = static_cast<double>(sums[s]);
  block_sum(total);
  if (device::thread() == 0) {
    for (int s = 0; s < kCC; ++s) plan.partials[static_cast<int64_t>(chunk.index) * kNSums + s] = total[s];
  }
}

// Sums of w^2 and of a^2, where the mask lets it through, of one filter, by the lanes of one warp.
template <Kind kind_a, Kind kind_w, typename T>
SAMKERN_DEVICE void reduce_filter(const PlanView& plan, const Operand& a, const Operand& mask, int32_t tensor,
                                  int64_t filter) {
  const Filters filters = plan.filters[tensor];
  const int64_t per_filter = plan.numel[tensor] / filters.count;
  double ww = 0, aa = 0;
  for (int64_t q = device::thread() % device::kWarp; q < per_filter; q += device::kWarp) {
    const int64_t run = per_filter == filters.stride ? 0 : q / filters.stride;
    const int64_t at = (run * filters.count + filter) * filters.stride + (q - run * filters.stride);
    T w[1], g[1];
    load<kind_w>(plan.w[tensor], at, w);
    load<kind_a>(a, at, g);
    if ((load_bits<1>(mask, at) & 1) == 0) g[0] = 0;
    ww += static_cast<double>(w[0]) * static_cast<double>(w[0]);
    aa += static_cast<double>(g[0]) * static_cast<double>(g[0]);
  }
  ww = warp_sum(ww);
  aa = warp_sum(aa);
  if (device::thread() % device::kWarp == 0) {
    plan.filter_ww[filters.first + filter] = ww;
    plan.filter_aa[filters.first + filter] = aa;
  }
}

template <Kind kind_a, Kind kind_w, typename Find>
SAMKERN_DEVICE void reduce_filters(const PlanView& plan, const Reduction& what, const Find& climb_group) {
  const Operand* a = what.a;
  for (int32_t index = device::block(); index < plan.n_filter_runs; index += device::n_blocks()) {
    const FilterRun run = plan.filter_runs[index];
    if (climb_for(plan, a, run.tensor, climb_group(run.tensor)) != Climb::kFilter) continue;
    const Operand mask = mask_of(plan, what.masked, run.tensor);
    with_math_type<kind_w>(plan.w[run.tensor], [&](auto zero) {
      for (int64_t f = device::thread() / device::kWarp; f < run.count; f += device::kWarps) {
        reduce_filter<kind_a, kind_w, decltype(zero)>(plan, a[run.tensor], mask, run.tensor, run.first + f);
      }
    });
  }
}

template <Kind kind_a, Kind kind_b, Kind kind_w, typename Find>
SAMKERN_DEVICE void reduce_phase(const PlanView& plan, const Reduction& what, const Find& climb_group) {
  if (what.filters) reduce_filters<kind_a, kind_w>(plan, what, climb_group);
  for (int32_t c = plan.block_begin[device::block()]; c < plan.block_begin[device::block() + 1]; ++c) {
    const Chunk chunk = chunk_at(plan, c);
    const ClimbGroup* group = climb_group(chunk.tensor);
    const Climb climb = climb_for(plan, what.a, chunk.tensor, group);
    const double eta = group != nullptr ? group->eta : 0;
    with_math_type<kind_w>(plan.w[chunk.tensor], [&](auto zero) {
      reduce_chunk<kind_a, kind_b, kind_w, decltype(zero)>(plan, what, climb, eta, chunk);
    });
  }
}

// ---- fold

// Sums of one tensor over its chunks, by `n_lanes` threads of which this is number `lane`.
SAMKERN_DEVICE void add_partials(const PlanView& plan, int32_t tensor, int lane, int n_lanes, double (&sums)[kCC]) {
  for (int32_t c = plan.first_chunk[tensor] + lane; c < plan.first_chunk[tensor + 1]; c += n_lanes) {
    for (int s = 0; s < kCC; ++s) sums[s] += device::read_shared(plan.partials + static_cast<int64_t>(c) * kNSums + s);
  }
}

// norm(a)^2 and norm(T a)^2 of one tensor from its filters; of a masked one only the latter.
SAMKERN_DEVICE void add_filters(const PlanView& plan, int32_t tensor, bool masked, double eta, int lane, int n_lanes,
                                double (&sums)[kCC]) {
  const Filters filters = plan.filters[tensor];
  for (int64_t f = filters.first + lane; f < filters.first + filters.count; f += n_lanes) {
    const double t = sqrt(device::read_shared(plan.filter_ww + f)) + eta, aa = device::read_shared(plan.filter_aa + f);
    if (!masked) sums[kAA] += aa;
    sums[kTT] += t * t * aa;
  }
}

// Tensors of at least this many elements are folded by a whole block.
constexpr int64_t kLargeTensor = int64_t{32} * kDeviceChunk;

// Calls add(tensor, lane, n_lanes, sums) with all threads of a block for a large tensor, with a warp for the others;
// then finish(tensor, sums) in one thread. Tensors are shared out among all blocks.
template <typename Add, typename Finish>
SAMKERN_DEVICE void fold_tensors(const PlanView& plan, const Add& add, const Finish& finish) {
  for (int32_t t = device::block(); t < plan.n_tensors; t += device::n_blocks()) {
    if (plan.numel[t] < kLargeTensor) continue;
    double sums[kCC] = {};
    add(t, device::thread(), device::kThreads, sums);
    block_sum(sums);
    if (device::thread() == 0) finish(t, sums);
  }
  const int warp = device::block() * device::kWarps + device::thread() / device::kWarp;
  for (int32_t t = warp; t < plan.n_tensors; t += device::n_blocks() * device::kWarps) {
    if (plan.numel[t] >= kLargeTensor) continue;
    double sums[kCC] = {};
    add(t, device::thread() % device::kWarp, device::kWarp, sums);
    for (int s = 0; s < kCC; ++s) sums[s] = warp_sum(sums[s]);
    if (device::thread() % device::kWarp == 0) finish(t, sums);
  }
}

// Between two phases of one launch. Launches of their own need no barrier.
SAMKERN_DEVICE void end_phase(bool together) {
  if (together) device::grid_sync();
}

// Whether this block is the last of the grid to finish; then what the others wrote is seen. Every thread must come.
SAMKERN_DEVICE bool is_last_block(const PlanView& plan) {
  uint32_t* last = device::shared<uint32_t, 1, 1>();
  device::block_sync();
  if (device::thread() == 0) {
    *last = device::arrive(plan.arrivals, static_cast<uint32_t>(device::n_blocks() - 1)) ==
            static_cast<uint32_t>(device::n_blocks() - 1);
  }
  device::block_sync();
  if (*last != 0) device::acquire();
  return *last != 0;
}

}  // namespace samkern::cuda
