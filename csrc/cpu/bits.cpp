#include "bits.h"

#include "../passes.h"

namespace samkern::cpu {
namespace {

// A test against constants: not every instruction set shifts lanes by different numbers.
template <typename T>
SAMKERN_INLINE bool has_bit(uint32_t word, int64_t i) {
  return (static_cast<math::KeyOf<T>>(word) & (math::KeyOf<T>{1} << i)) != 0;
}

template <typename T>
SAMKERN_INLINE void choose_lanes(const uint32_t* words, int64_t n, const T* a, const T* b, T* chosen) {
  int64_t i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    const uint32_t word = words[i / kWordBits];
    SAMKERN_VECTORIZE
    for (int64_t l = 0; l < kWordBits; ++l) chosen[i + l] = has_bit<T>(word, l) ? a[i + l] : b[i + l];
  }
  for (int64_t l = 0; i + l < n; ++l) chosen[i + l] = has_bit<T>(words[i / kWordBits], l) ? a[i + l] : b[i + l];
}

template <typename T>
SAMKERN_INLINE void choose_lanes_or_zero(const uint32_t* words, int64_t n, const T* a, T* chosen) {
  int64_t i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    const uint32_t word = words[i / kWordBits];
    SAMKERN_VECTORIZE
    for (int64_t l = 0; l < kWordBits; ++l) chosen[i + l] = has_bit<T>(word, l) ? a[i + l] : T{0};
  }
  for (int64_t l = 0; i + l < n; ++l) chosen[i + l] = has_bit<T>(words[i / kWordBits], l) ? a[i + l] : T{0};
}

}  // namespace

SAMKERN_CLONES void choose(const uint32_t* words, int64_t n, const float* a, const float* b, float* chosen) {
  choose_lanes(words, n, a, b, chosen);
}

SAMKERN_CLONES void choose(const uint32_t* words, int64_t n, const double* a, const double* b, double* chosen) {
  choose_lanes(words, n, a, b, chosen);
}

SAMKERN_CLONES void choose_or_zero(const uint32_t* words, int64_t n, const float* a, float* chosen) {
  choose_lanes_or_zero(words, n, a, chosen);
}

SAMKERN_CLONES void choose_or_zero(const uint32_t* words, int64_t n, const double* a, double* chosen) {
  choose_lanes_or_zero(words, n, a, chosen);
}

}  // namespace samkern::cpu
