// Standard normal numbers from random words. In float32 operations that round alike everywhere, written out, so that
// every backend has the same bits: samkern/reference_noise.py has the same functions. No torch.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace samkern::normals {

SAMKERN_INLINE float as_float(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
SAMKERN_INLINE int32_t as_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// sqrt(-2 ln U), U = (word + 1/2) / 2^32.
SAMKERN_INLINE float length(uint32_t word) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3;  // bits of the float32 next to sqrt(1/2)
  constexpr float kUnit = 0x1p-32F, kLn2 = static_cast<float>(0.693147180559945309417);
  const float uniform = (static_cast<float>(word) + 0.5F) * kUnit;
  const float rest = (static_cast<float>(~word) + 0.5F) * kUnit;  // 1 - U, to the last place also where U is near 1
  const int32_t bits = as_bits(uniform);
  const int32_t exponent = (bits - kSqrtHalf) >> 23;  // U = 2^exponent m, sqrt(1/2) <= m < sqrt(2)
  const float m = as_float(bits - exponent * (1 << 23));
  const float f = exponent == 0 ? -rest : m - 1;
  const float s = f / (f + 2);
  const float s2 = s * s;
  // ln(1 + f) = 2 (s + s^3 / 3 + s^5 / 5 + ...)
  float series = s2 * static_cast<float>(1. / 9) + static_cast<float>(1. / 7);
  series = s2 * series + static_cast<float>(1. / 5);
  series = s2 * series + static_cast<float>(1. / 3);
  const float ln_m = 2 * s * (s2 * series + 1);
  const float ln = static_cast<float>(exponent) * kLn2 + ln_m;
  return std::sqrt(ln * -2);
}

struct Turn {
  float cosine, sine;
};

// cos(2 pi U) and sin(2 pi U).
SAMKERN_INLINE Turn turn(uint32_t word) {
  constexpr float kStep = static_cast<float>(6.283185307179586476925 / 4294967296.);
  const uint32_t quarter = (word + (1U << 29)) >> 30;  // the nearest of 0 to 3 quarters of a turn; 4 is 0
  const auto rest = static_cast<int32_t>(word - (quarter << 30));
  const float x = (static_cast<float>(rest) + 0.5F) * kStep;  // what is left: at most an eighth
  const float x2 = x * x;
  float sine = x2 * static_cast<float>(1. / 362880) - static_cast<float>(1. / 5040);
  sine = x2 * sine + static_cast<float>(1. / 120);
  sine = x2 * sine + static_cast<float>(-1. / 6);
  sine = x2 * sine + 1;
  sine = x * sine;
  float cosine = x2 * static_cast<float>(-1. / 3628800) + static_cast<float>(1. / 40320);
  cosine = x2 * cosine + static_cast<float>(-1. / 720);
  cosine = x2 * cosine + static_cast<float>(1. / 24);
  cosine = x2 * cosine + static_cast<float>(-1. / 2);
  cosine = x2 * cosine + 1;
  const bool odd = (quarter & 1) != 0;
  const float turned_cosine = odd ? sine : cosine, turned_sine = odd ? cosine : sine;
  return {((quarter + 1) & 2) != 0 ? -turned_cosine : turned_cosine, (quarter & 2) != 0 ? -turned_sine : turned_sine};
}

}  // namespace samkern::normals
