// Philox4x32-10 (Salmon et al. 2011): random words that depend on a counter and a key only, so that they are the same
// on every backend, device and rank. No torch; samkern/philox.py has the same function.
#pragma once
#include <cstdint>

#include "inline.h"

namespace samkern::philox {

struct Words {
  uint32_t x[4];
};

constexpr int kRounds = 10;

// Of one round; the next round has the next one.
struct Key {
  uint32_t k0, k1;

  SAMKERN_INLINE explicit Key(uint64_t seed) : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(seed >> 32)) {}
  SAMKERN_INLINE void next() {
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
};

SAMKERN_INLINE void take_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, const Key& key) {
  const uint64_t p0 = uint64_t{0xD2511F53U} * c0, p1 = uint64_t{0xCD9E8D57U} * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.k0;
  c1 = static_cast<uint32_t>(p1);
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.k1;
  c3 = static_cast<uint32_t>(p0);
}

SAMKERN_INLINE Words words(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  Key key(seed);
  for (int round = 0; round < kRounds; ++round) {
    take_round(c0, c1, c2, c3, key);
    key.next();
  }
  return {{c0, c1, c2, c3}};
}

// Words for entries 4 q to 4 q + 3 of a list: of their noise at step t, draw number `draw`.
SAMKERN_INLINE constexpr uint32_t noise_stream(uint32_t draw) { return draw * 256 + 1; }
SAMKERN_INLINE Words noise_words(int64_t q, uint32_t t, uint32_t draw, uint64_t seed) {
  return words(static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), t, noise_stream(draw), seed);
}

// The same: the keys by which step t grows a mask.
SAMKERN_INLINE Words growth_keys(int64_t q, uint32_t t, uint64_t seed) {
  return words(static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), t, 2, seed);
}

}  // namespace samkern::philox
