// The per-element math of every pass: what a formula in the documentation looks like in the order of operations that
// all backends keep. No torch. T is the math type: double for fp64 tensors, float for all others.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace samkern::math {

// SAM: w' = w + s g.
template <typename T>
SAMKERN_INLINE T climb(T w, T g, T scale) {
  return w + scale * g;
}

// SAM with p = inf, and the "sign" mode of Look-LayerSAM: w' = w + s sign(g), sign(0) = 0.
template <typename T>
SAMKERN_INLINE T climb_sign(T w, T g, T scale) {
  return w + scale * static_cast<T>((g > 0) - (g < 0));
}

// ASAM's element-wise operator: w' = w + s T^2 g, T = |w| + eta.
template <typename T>
SAMKERN_INLINE T climb_element(T w, T g, T scale, T eta) {
  const T t = std::abs(w) + eta;
  return w + scale * (t * t * g);
}

// (T g) of the same operator, for its norm.
template <typename T>
SAMKERN_INLINE T weigh_element(T w, T g, T eta) {
  return (std::abs(w) + eta) * g;
}

// g_s without its part along g: c = a g_s - k g, where a undoes a loss scale and is 1 otherwise.
template <typename T>
SAMKERN_INLINE T project(T g_s, T g, T a, T k) {
  return a * g_s - k * g;
}

// u = A a + B b.
template <typename T>
SAMKERN_INLINE T combine(T a, T b, T coeff_a, T coeff_b) {
  return coeff_a * a + coeff_b * b;
}

template <typename T>
struct Sgd {
  T lr, weight_decay;
  T momentum;    // what Nesterov's look-ahead uses
  T keep, gain;  // v = keep v + gain d: momentum and 1 - dampening, or 0 and 1 on a tensor's first step
  T factor;      // on u: clipping, and what undoes a loss scale
  bool nesterov;
};

// torch.optim.SGD without momentum.
template <typename T>
SAMKERN_INLINE T sgd(T w, T u, const Sgd<T>& o) {
  return w - o.lr * (o.factor * u + o.weight_decay * w);
}

// torch.optim.SGD: d = u + wd w;  v = mu v + (1 - dampening) d;  w = w - lr v, or w - lr (d + mu v) with Nesterov.
template <typename T>
SAMKERN_INLINE T sgd_momentum(T w, T u, T& v, const Sgd<T>& o) {
  const T d = o.factor * u + o.weight_decay * w;
  v = o.keep * v + o.gain * d;
  return w - o.lr * (o.nesterov ? d + o.momentum * v : v);
}

template <typename T>
struct Adam {
  T weight_decay;         // coupled: added to u
  T decay;                // decoupled: factor on w, 1 - lr wd
  T gain1, beta2, gain2;  // gain = 1 - beta
  T step_size, bias2;     // lr / (1 - beta1^t), sqrt(1 - beta2^t)
  T eps, factor;
};

// torch.optim.Adam and AdamW (one of weight_decay and decay is neutral):
// m = m + (1 - beta1) (u - m);  v = beta2 v + (1 - beta2) u^2;  w = w - step_size m / (sqrt(v) / bias2 + eps).
template <typename T>
SAMKERN_INLINE T adam(T w, T u, T& m, T& v, const Adam<T>& o) {
  const T d = o.factor * u + o.weight_decay * w;
  const T decayed = o.decay * w;
  m = m + o.gain1 * (d - m);
  v = o.beta2 * v + o.gain2 * d * d;
  return decayed - o.step_size * m / (std::sqrt(v) / o.bias2 + o.eps);
}

// Squared gradients, as a sum or a running mean: F = keep F + gain g^2.
template <typename T>
SAMKERN_INLINE T accumulate_square(T f, T g, T keep, T gain) {
  return keep * f + gain * (g * g);
}

// A running average, mean or exponential: avg' = avg + k (w - avg).
template <typename T>
SAMKERN_INLINE T average(T avg, T w, T gain) {
  return avg + gain * (w - avg);
}

SAMKERN_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
SAMKERN_INLINE uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <typename T>
using KeyOf = decltype(bits_of(T{}));

// Unsigned keys in the order of the numbers: NaN is below everything, -0 is 0.
template <typename T>
SAMKERN_INLINE KeyOf<T> order_key(T x) {
  using Key = KeyOf<T>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  const Key bits = bits_of(x);
  if (x != x) return 0;
  if (bits == kSign) return kSign;
  return (bits & kSign) != 0 ? static_cast<Key>(~bits) : bits | kSign;
}

// The same in the order of -|x|.
template <typename T>
SAMKERN_INLINE KeyOf<T> smallness_key(T x) {
  using Key = KeyOf<T>;
  constexpr Key kSign = Key{1} << (8 * sizeof(Key) - 1);
  return x != x ? Key{0} : static_cast<Key>(~(bits_of(x) & ~kSign));
}

}  // namespace samkern::math
