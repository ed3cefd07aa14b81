#include "convert.h"

#include <algorithm>
#include <cstring>

#include "harness.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <unistd.h>
#endif

namespace samkern::cpu {
namespace {

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SAMKERN_CLONES void bf16_to_float(const uint16_t* __restrict from, int64_t n, float* __restrict to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_bits(static_cast<uint32_t>(from[i]) << 16);
}

SAMKERN_CLONES void float_to_bf16(const float* __restrict from, int64_t n, uint16_t* __restrict to) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = to_bits(from[i]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to[i] = static_cast<uint16_t>(from[i] != from[i] ? 0x7FC0 : rounded);
  }
}

float half_to_float_scalar(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) return from_bits(sign | 0x7F800000 | (magnitude & 0x3FF) << 13);
  // Below 2^-14 a half is m 2^-24; above, its exponent is rebased.
  const float value =
      magnitude < 0x400 ? static_cast<float>(magnitude) * 0x1p-24F : from_bits((magnitude << 13) + 0x38000000);
  return from_bits(sign | to_bits(value));
}

uint16_t float_to_half_scalar(float value) {
  const uint32_t bits = to_bits(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return sign | 0x7E00;   // NaN
  if (magnitude >= 0x477FF000) return sign | 0x7C00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                       // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    return static_cast<uint16_t>(sign | (to_bits(from_bits(magnitude) + 0.5F) - 0x3F000000));
  }
  const uint32_t rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

#if defined(__x86_64__)
// GCC does not vectorise conversions of _Float16 without AVX512-FP16, hence intrinsics.
__attribute__((target("avx,f16c"))) void half_to_float_f16c(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < n; ++i) to[i] = half_to_float_scalar(from[i]);
}

__attribute__((target("avx,f16c"))) void float_to_half_f16c(const float* from, int64_t n, uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < n; ++i) to[i] = float_to_half_scalar(from[i]);
}

const bool kHasF16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
#endif

void half_to_float(const uint16_t* from, int64_t n, float* to) {
#if defined(__x86_64__)
  if (kHasF16c) return half_to_float_f16c(from, n, to);
#endif
  for (int64_t i = 0; i < n; ++i) to[i] = half_to_float_scalar(from[i]);
}

void float_to_half(const float* from, int64_t n, uint16_t* to) {
#if defined(__x86_64__)
  if (kHasF16c) return float_to_half_f16c(from, n, to);
#endif
  for (int64_t i = 0; i < n; ++i) to[i] = float_to_half_scalar(from[i]);
}

template <typename From, typename To>
void cast(const From* from, int64_t n, To* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace

void load(const Operand& x, int64_t at, int64_t n, float* to) {
  switch (x.dtype) {
    case Dtype::kFloat32: return cast(static_cast<const float*>(x.address) + at, n, to);
    case Dtype::kFloat64: return cast(static_cast<const double*>(x.address) + at, n, to);
    case Dtype::kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(x.address) + at, n, to);
    case Dtype::kFloat16: return half_to_float(static_cast<const uint16_t*>(x.address) + at, n, to);
  }
}

void load(const Operand& x, int64_t at, int64_t n, double* to) {
  if (x.dtype == Dtype::kFloat64) return cast(static_cast<const double*>(x.address) + at, n, to);
  float values[kBlock];
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t step = std::min(kBlock, n - done);
    load(x, at + done, step, values);
    cast(values, step, to + done);
  }
}

void store(const Operand& x, int64_t at, int64_t n, const float* from) {
  switch (x.dtype) {
    case Dtype::kFloat32: return cast(from, n, static_cast<float*>(x.address) + at);
    case Dtype::kFloat64: return cast(from, n, static_cast<double*>(x.address) + at);
    case Dtype::kBFloat16: return float_to_bf16(from, n, static_cast<uint16_t*>(x.address) + at);
    case Dtype::kFloat16: return float_to_half(from, n, static_cast<uint16_t*>(x.address) + at);
  }
}

void store(const Operand& x, int64_t at, int64_t n, const double* from) {
  if (x.dtype == Dtype::kFloat64) return cast(from, n, static_cast<double*>(x.address) + at);
  float values[kBlock];
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t step = std::min(kBlock, n - done);
    cast(from + done, step, values);
    store(x, at + done, step, values);
  }
}

void copy_bytes(void* to, const void* from, int64_t n_bytes, bool streamed) {
#if defined(__x86_64__)
  if (streamed) {
    auto* target = static_cast<char*>(to);
    const auto* source = static_cast<const char*>(from);
    const int64_t head = std::min<int64_t>(n_bytes, -reinterpret_cast<intptr_t>(target) & 15);
    std::memcpy(target, source, head);
    int64_t i = head;
    for (; i + 16 <= n_bytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
    }
    std::memcpy(target + i, source + i, n_bytes - i);
    return;
  }
#endif
  (void)streamed;
  std::memcpy(to, from, n_bytes);
}

void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

int64_t last_level_cache() {
  static const int64_t n_bytes = [] {  // asked once: in virtual machines the question is slow
#if defined(_SC_LEVEL3_CACHE_SIZE)
    const long reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (reported > 0) return static_cast<int64_t>(reported);
#endif
    return int64_t{32} << 20;
  }();
  return n_bytes;
}

}  // namespace samkern::cpu
