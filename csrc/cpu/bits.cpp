#include "bits.h"

#include "../passes.h"

namespace samkern::cpu {
namespace {

// The value is read before it is chosen: a load on a condition would be a branch, or a masked one.
template <typename T>
SAMKERN_INLINE void choose_lanes_or_zero(const uint32_t* words, int64_t n, const T* a, T* chosen) {
  using Key = math::KeyOf<T>;
  int64_t i = 0;
  for (; i + kWordBits <= n; i += kWordBits) {
    const Key word = words[i / kWordBits];
    SAMKERN_VECTORIZE
    for (int l = 0; l < kWordBits; ++l) {
      const T x = a[i + l];
      chosen[i + l] = (word & kLaneBits<Key>.at[l]) != 0 ? x : T{0};
    }
  }
  for (int l = 0; i + l < n; ++l) chosen[i + l] = (words[i / kWordBits] >> l & 1) != 0 ? a[i + l] : T{0};
}

}  // namespace

SAMKERN_CLONES void choose_or_zero(const uint32_t* words, int64_t n, const float* a, float* chosen) {
  choose_lanes_or_zero(words, n, a, chosen);
}

SAMKERN_CLONES void choose_or_zero(const uint32_t* words, int64_t n, const double* a, double* chosen) {
  choose_lanes_or_zero(words, n, a, chosen);
}

}  // namespace samkern::cpu
