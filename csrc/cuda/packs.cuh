// Between storage and registers: N neighbouring values of an operand, in accesses of 16 bytes where N allows it.
#pragma once
#include <type_traits>

#include "../plan.h"
#include "device.h"

namespace samkern::cuda {

// What a kernel was compiled for. A list of one dtype has a kernel of its own; kAny looks at each operand.
enum class Kind : int32_t { kFloat32, kBFloat16, kFloat16, kAny };

template <int n>
struct Width {
  static constexpr int value = n;
};

// Values that a thread takes at a time: 16 bytes of a half type or double, 32 of float. Half of that in kernels for
// lists of any dtype, which need registers for the dtypes that they do not meet.
template <Kind kind, typename T>
constexpr int kPack = (sizeof(T) == 8 ? 2 : 8) / (kind == Kind::kAny && sizeof(T) == 4 ? 2 : 1);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T>
SAMKERN_DEVICE T widen(float x) {
  return static_cast<T>(x);
}
template <typename T>
SAMKERN_DEVICE T widen(double x) {
  return static_cast<T>(x);
}
template <typename T>
SAMKERN_DEVICE T widen(BFloat16 x) {
  return static_cast<T>(device::as_float(uint32_t{x.bits} << 16));
}
template <typename T>
SAMKERN_DEVICE T widen(Float16 x) {
  return static_cast<T>(device::half_to_float(x.bits));
}

// Rounds to the nearest even; double becomes a half type by way of float, as in torch.
template <typename T>
SAMKERN_DEVICE void narrow(T x, float& to) {
  to = static_cast<float>(x);
}
template <typename T>
SAMKERN_DEVICE void narrow(T x, double& to) {
  to = static_cast<double>(x);
}
template <typename T>
SAMKERN_DEVICE void narrow(T x, BFloat16& to) {
  const auto value = static_cast<float>(x);
  const uint32_t bits = device::as_bits(value), rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}
template <typename T>
SAMKERN_DEVICE void narrow(T x, Float16& to) {
  to.bits = device::float_to_half(static_cast<float>(x));
}

// Calls body with a value of the type in which x is stored.
template <Kind kind, typename Body>
SAMKERN_DEVICE void with_storage(const Operand& x, const Body& body) {
  if constexpr (kind == Kind::kFloat32) return body(float{});
  if constexpr (kind == Kind::kBFloat16) return body(BFloat16{});
  if constexpr (kind == Kind::kFloat16) return body(Float16{});
  if constexpr (kind == Kind::kAny) {
    switch (x.dtype) {
      case Dtype::kFloat32: return body(float{});
      case Dtype::kFloat64: return body(double{});
      case Dtype::kBFloat16: return body(BFloat16{});
      case Dtype::kFloat16: return body(Float16{});
    }
  }
}

// N neighbouring values as they lie in memory. Moved in accesses of 16 bytes, of 8, or one by one.
template <typename Storage, int N>
struct alignas(sizeof(Storage) * N % 16 == 0 ? 16
               : sizeof(Storage) * N == 8    ? 8
                                             : alignof(Storage)) Raw {
  Storage values[N];
};

template <typename R>
using AccessOf = std::conditional_t<sizeof(R) % 16 == 0, device::Bits16, device::Bits8>;

template <typename Storage, int N>
SAMKERN_DEVICE Raw<Storage, N> read_raw(const Operand& x, int64_t at) {
  const Storage* from = device::in_global(static_cast<const Storage*>(x.address) + at);
  Raw<Storage, N> raw;
  if constexpr (N > 1 && sizeof(raw) % 8 == 0) {
    using Access = AccessOf<Raw<Storage, N>>;
    auto* packs = reinterpret_cast<Access*>(raw.values);
    constexpr int n = sizeof(raw) / sizeof(Access);
    for (int k = 0; k < n; ++k) packs[k] = device::load(reinterpret_cast<const Access*>(from) + k);
  } else {
    for (int k = 0; k < N; ++k) raw.values[k] = from[k];
  }
  return raw;
}

template <typename Storage, int N>
SAMKERN_DEVICE void write_raw(const Operand& x, int64_t at, const Raw<Storage, N>& raw, bool streamed = false) {
  Storage* to = device::in_global(static_cast<Storage*>(x.address) + at);
  if constexpr (N > 1 && sizeof(raw) % 8 == 0) {
    using Access = AccessOf<Raw<Storage, N>>;
    const auto* packs = reinterpret_cast<const Access*>(raw.values);
    constexpr int n = sizeof(raw) / sizeof(Access);
    for (int k = 0; k < n; ++k) device::store(reinterpret_cast<Access*>(to) + k, packs[k], streamed);
  } else {
    for (int k = 0; k < N; ++k) to[k] = raw.values[k];
  }
}

template <Kind kind, typename T, int N>
SAMKERN_DEVICE void load(const Operand& x, int64_t at, T (&values)[N]) {
  with_storage<kind>(x, [&](auto storage) {
    const auto raw = read_raw<decltype(storage), N>(x, at);
    for (int k = 0; k < N; ++k) values[k] = widen<T>(raw.values[k]);
  });
}

template <Kind kind, typename T, int N>
SAMKERN_DEVICE void store(const Operand& x, int64_t at, const T (&values)[N]) {
  with_storage<kind>(x, [&](auto storage) {
    Raw<decltype(storage), N> raw;
    for (int k = 0; k < N; ++k) narrow(values[k], raw.values[k]);
    write_raw(x, at, raw);
  });
}

// Loads from x and leaves the same bits in `saved`, which is not needed soon.
template <Kind kind, typename T, int N>
SAMKERN_DEVICE void load_and_save(const Operand& x, const Operand& saved, int64_t at, T (&values)[N]) {
  with_storage<kind>(x, [&](auto storage) {
    const auto raw = read_raw<decltype(storage), N>(x, at);
    write_raw(saved, at, raw, true);
    for (int k = 0; k < N; ++k) values[k] = widen<T>(raw.values[k]);
  });
}

// What storing `values` in the dtype of x makes of them.
template <Kind kind, typename T, int N>
SAMKERN_DEVICE void round_to(const Operand& x, const T (&values)[N], T (&rounded)[N]) {
  with_storage<kind>(x, [&](auto storage) {
    for (int k = 0; k < N; ++k) {
      narrow(values[k], storage);
      rounded[k] = widen<T>(storage);
    }
  });
}

template <Kind kind, int N>
SAMKERN_DEVICE void copy(const Operand& to, const Operand& from, int64_t at) {
  with_storage<kind>(from, [&](auto storage) { write_raw(to, at, read_raw<decltype(storage), N>(from, at)); });
}

// Bits of a mask for N neighbours from element `at` on, which lie in one of its bytes; ones without a mask.
template <int N>
SAMKERN_DEVICE uint32_t load_bits(const Operand& mask, int64_t at) {
  static_assert(N <= 8);
  if (mask.address == nullptr) return ~0U;
  return device::in_global(static_cast<const uint8_t*>(mask.address))[at / 8] >> (at % 8);
}

// Stores values, of which those whose bit is 0 are what x holds: it keeps their bits, of a NaN too, which rounding
// would change.
template <Kind kind, typename T, int N>
SAMKERN_DEVICE void store_some(const Operand& x, int64_t at, const T (&values)[N], uint32_t bits) {
  if constexpr (kind == Kind::kFloat32) return store<kind>(x, at, values);
  with_storage<kind>(x, [&](auto storage) {
    Raw<decltype(storage), N> raw = read_raw<decltype(storage), N>(x, at);
    for (int k = 0; k < N; ++k) {
      if ((bits >> k & 1) != 0) narrow(values[k], raw.values[k]);
    }
    write_raw(x, at, raw);
  });
}

// Whether 16-byte accesses may start at x. An operand that is not there does not matter.
SAMKERN_DEVICE bool aligned(const Operand& x) { return (reinterpret_cast<uintptr_t>(x.address) & 15) == 0; }

}  // namespace samkern::cuda
