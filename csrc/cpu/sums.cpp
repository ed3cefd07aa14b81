#include "sums.h"

#include "../passes.h"
#include "harness.h"

// A product of two floats is exact in double: fusing it with the addition changes no bit, and is faster.
#if defined(__GNUC__) && !defined(__clang__)
#define SAMKERN_EXACT_PRODUCTS __attribute__((optimize("fp-contract=fast")))
#else
#define SAMKERN_EXACT_PRODUCTS
#endif

namespace samkern::cpu {
namespace {

constexpr int kLanes = 32;

template <typename T>
SAMKERN_INLINE double sum_lanes(const T* a, const T* b, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += static_cast<double>(a[i + l]) * static_cast<double>(b[i + l]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

}  // namespace

SAMKERN_CLONES SAMKERN_EXACT_PRODUCTS double sum_squares(const float* a, int64_t n) { return sum_lanes(a, a, n); }

SAMKERN_CLONES SAMKERN_EXACT_PRODUCTS double sum_products(const float* a, const float* b, int64_t n) {
  return sum_lanes(a, b, n);
}

SAMKERN_CLONES double sum_squares(const double* a, int64_t n) { return sum_lanes(a, a, n); }

SAMKERN_CLONES double sum_products(const double* a, const double* b, int64_t n) { return sum_lanes(a, b, n); }

}  // namespace samkern::cpu
