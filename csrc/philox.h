// Philox4x32-10 (Salmon et al. 2011): random words that depend on a counter and a key only, so that they are the same
// on every backend, device and rank. No torch; samkern/philox.py has the same function.
#pragma once
#include <cstdint>

#include "inline.h"

namespace samkern::philox {

struct Words {
  uint32_t x[4];
};

SAMKERN_INLINE Words words(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53U} * c0, p1 = uint64_t{0xCD9E8D57U} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  return {{c0, c1, c2, c3}};
}

// Words for entries 4 q to 4 q + 3 of a list: the keys by which step t grows a mask.
SAMKERN_INLINE Words growth_keys(int64_t q, uint32_t t, uint64_t seed) {
  return words(static_cast<uint32_t>(q), static_cast<uint32_t>(q >> 32), t, 2, seed);
}

}  // namespace samkern::philox
