// How CPU kernels walk a plan: chunks shared out to threads, blocks that stay in the first-level cache, and operands
// that are read in place where their dtype is the math type and converted block by block where it is not.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../plan.h"
#include "convert.h"

// One source, three instruction sets, chosen when the library is loaded. Contraction is off and lanes are fixed, so all
// three give the same bits. The attribute does not reach into lambdas: it stands on named functions that hold a loop.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SAMKERN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SAMKERN_CLONES
#endif

// The loop may write where it reads (w = f(w)), element for element, and carries nothing from one turn to the next.
#if defined(__clang__)
#define SAMKERN_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define SAMKERN_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace samkern::cpu {

// Elements that a pass works on at a time: five operands of it fit into a 32 KB first-level cache.
constexpr int64_t kBlock = 1024;

// The caller's threads: torch's pool in the extension, anything else in a test. run() calls body(context, part) for
// every part in [0, n_parts), in any order and on any thread, and returns when all are done.
struct Pool {
  int64_t n_threads;
  void (*run)(int64_t n_parts, void (*body)(const void* context, int64_t part), const void* context);
};

struct Span {  // a chunk: elements [at, at + n) of a tensor
  int32_t chunk, tensor;
  int64_t at, n;
};

inline Span span(const PlanView& plan, int32_t chunk) {
  const int32_t tensor = plan.chunk_tensor[chunk];
  const int64_t at = plan.chunk_index[chunk] * kChunk;
  return {chunk, tensor, at, std::min(kChunk, plan.numel[tensor] - at)};
}

// Whether the filters of a tensor lie side by side and are so short that a call for each would take longer than its
// work.
inline bool has_short_filters(const PlanView& plan, int32_t tensor) {
  constexpr int64_t kShort = 64;
  const Filters& filters = plan.filters[tensor];
  return filters.stride <= kShort && filters.count * filters.stride == plan.numel[tensor];
}

// Calls body(part) for every part in [0, n_parts), on the pool's threads.
template <typename Body>
void for_parts(const Pool& pool, int64_t n_parts, const Body& body) {
  if (n_parts <= 1) {
    if (n_parts == 1) body(int64_t{0});
    return;
  }
  auto call = [](const void* context, int64_t part) { (*static_cast<const Body*>(context))(part); };
  pool.run(n_parts, call, &body);
}

// Threads that a walk over all chunks is worth.
inline int64_t chunk_runs(const PlanView& plan, const Pool& pool) {
  constexpr int64_t kWorthAThread = 1 << 15;
  return std::clamp<int64_t>(plan.chunk_cost[plan.n_chunks] / kWorthAThread, 1, pool.n_threads);
}

// Calls body(run, begin, end) for every thread's run of chunks, of about equal work: chunk_runs() of them.
template <typename Body>
void for_chunk_runs(const PlanView& plan, const Pool& pool, const Body& body) {
  const int64_t cost = plan.chunk_cost[plan.n_chunks], n_parts = chunk_runs(plan, pool);
  for_parts(pool, n_parts, [&](int64_t part) {
    auto boundary = [&](int64_t k) {
      const int64_t* end = plan.chunk_cost + plan.n_chunks;
      return static_cast<int32_t>(std::lower_bound(plan.chunk_cost, end, cost * k / n_parts) - plan.chunk_cost);
    };
    body(part, boundary(part), boundary(part + 1));
  });
}

enum class Walk { kForwards, kBackwards };

// Calls body(span) for every chunk. A thread owns a run of chunks; walking it backwards in the apply phase meets what
// the reduce phase read last while it is still in cache.
template <typename Body>
void for_chunks(const PlanView& plan, const Pool& pool, Walk walk, const Body& body) {
  for_chunk_runs(plan, pool, [&](int64_t, int32_t begin, int32_t end) {
    for (int32_t i = 0; i < end - begin; ++i) {
      body(span(plan, walk == Walk::kForwards ? begin + i : end - 1 - i));
    }
    stream_fence();
  });
}

// Calls body with a value of the tensor's math type: double for fp64, float for everything else.
template <typename Body>
void with_math_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat64) {
    body(double{});
  } else {
    body(float{});
  }
}

template <typename T>
constexpr Dtype dtype_of = std::is_same_v<T, double> ? Dtype::kFloat64 : Dtype::kFloat32;

template <typename T>
T* in_place(const Operand& x, int64_t at) {
  return x.dtype == dtype_of<T> ? static_cast<T*>(x.address) + at : nullptr;
}

// n values of x from `at`: the tensor's own memory, or a converted copy in `buffer`.
template <typename T>
const T* read(const Operand& x, int64_t at, int64_t n, T* buffer) {
  if (const T* values = in_place<T>(x, at)) return values;
  load(x, at, n, buffer);
  return buffer;
}

// Where a loop may write n values of x: the tensor's own memory, or `buffer` if they have to be rounded or streamed.
// write() then brings them home.
template <typename T>
T* target(const Operand& x, int64_t at, T* buffer, bool streamed = false) {
  T* values = in_place<T>(x, at);
  return values != nullptr && !streamed ? values : buffer;
}

template <typename T>
void write(const Operand& x, int64_t at, int64_t n, const T* from, bool streamed = false) {
  T* values = in_place<T>(x, at);
  if (values == from) return;
  if (values == nullptr) return store(x, at, n, from);
  copy_bytes(values, from, n * static_cast<int64_t>(sizeof(T)), streamed);
}

// Copies n raw elements between two operands of one dtype.
inline void copy(const Operand& to, const Operand& from, int64_t at, int64_t n, bool streamed) {
  const int64_t size = size_of(to.dtype);
  copy_bytes(static_cast<char*>(to.address) + at * size, static_cast<const char*>(from.address) + at * size, n * size,
             streamed);
}

}  // namespace samkern::cpu
