// Masks as words of 32 bits, and what passes through them.
#pragma once
#include <cstdint>
#include <cstring>

#include "harness.h"

namespace samkern::cpu {

constexpr int64_t kWordBits = 32;
constexpr int64_t kBlockWords = kBlock / kWordBits;

// Bit i of a word, in lanes of a type: testing against constants vectorises on every instruction set, shifting lanes by
// different numbers does not.
template <typename Key>
struct LaneBits {
  Key at[kWordBits];
  constexpr LaneBits() : at() {
    for (int i = 0; i < kWordBits; ++i) at[i] = Key{1} << i;
  }
};
template <typename Key>
constexpr LaneBits<Key> kLaneBits{};

// The word that holds the bit of entry i.
inline uint32_t load_word(const Operand& bits, int64_t i) {
  uint32_t word;
  std::memcpy(&word, static_cast<const char*>(bits.address) + i / kWordBits * 4, sizeof word);
  return word;
}
inline void store_word(const Operand& bits, int64_t i, uint32_t word) {
  std::memcpy(static_cast<char*>(bits.address) + i / kWordBits * 4, &word, sizeof word);
}

// The lowest n bits, of up to 32.
inline uint32_t lowest_bits(int64_t n) { return n >= kWordBits ? ~uint32_t{0} : (uint32_t{1} << n) - 1; }

// The bits of entries [at, at + n), from any `at`, of up to kBlock; what is left of the last word is 0.
inline void load_bits(const Operand& bits, int64_t at, int64_t n, uint32_t* words) {
  const int64_t shift = at % kWordBits;
  if (shift == 0 && n % kWordBits == 0) {
    std::memcpy(words, static_cast<const char*>(bits.address) + at / 8, static_cast<size_t>(n / 8));
    return;
  }
  for (int64_t i = 0; i < n; i += kWordBits) {
    uint64_t pair = load_word(bits, at + i);
    // The next word is there if an entry of this block has its bit in it.
    if (shift + (n - i) > kWordBits) pair |= static_cast<uint64_t>(load_word(bits, at + i + kWordBits)) << kWordBits;
    words[i / kWordBits] = static_cast<uint32_t>(pair >> shift) & lowest_bits(n - i);
  }
}

// chosen[i] = a[i] where bit i is 1, else 0.
void choose_or_zero(const uint32_t* words, int64_t n, const float* a, float* chosen);
void choose_or_zero(const uint32_t* words, int64_t n, const double* a, double* chosen);

}  // namespace samkern::cpu
