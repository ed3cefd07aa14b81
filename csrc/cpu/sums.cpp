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
struct Values {
  const T* x;
  SAMKERN_INLINE double operator[](int64_t i) const { return static_cast<double>(x[i]); }
};

template <typename T>
struct Differences {
  const T *x, *y;
  SAMKERN_INLINE double operator[](int64_t i) const { return static_cast<double>(x[i] - y[i]); }
};

template <typename Factors>
SAMKERN_INLINE double sum_lanes(const Factors& a, const Factors& b, int64_t n) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lanes[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i + l < n; ++l) lanes[l] += a[i + l] * b[i + l];
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

}  // namespace

SAMKERN_CLONES SAMKERN_EXACT_PRODUCTS double sum_squares(const float* a, int64_t n) {
  return sum_lanes(Values<float>{a}, Values<float>{a}, n);
}

SAMKERN_CLONES SAMKERN_EXACT_PRODUCTS double sum_products(const float* a, const float* b, int64_t n) {
  return sum_lanes(Values<float>{a}, Values<float>{b}, n);
}

SAMKERN_CLONES SAMKERN_EXACT_PRODUCTS double sum_difference_products(const float* a, const float* b, const float* c,
                                                                     const float* d, int64_t n) {
  return sum_lanes(Differences<float>{a, b}, Differences<float>{c, d}, n);
}

SAMKERN_CLONES double sum_squares(const double* a, int64_t n) {
  return sum_lanes(Values<double>{a}, Values<double>{a}, n);
}

SAMKERN_CLONES double sum_products(const double* a, const double* b, int64_t n) {
  return sum_lanes(Values<double>{a}, Values<double>{b}, n);
}

SAMKERN_CLONES double sum_difference_products(const double* a, const double* b, const double* c, const double* d,
                                              int64_t n) {
  return sum_lanes(Differences<double>{a, b}, Differences<double>{c, d}, n);
}

}  // namespace samkern::cpu
