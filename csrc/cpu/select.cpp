// select_mask: exact selection of the n largest keys of a list by radix, without copying or moving an entry.
//
// A pass counts 11 bits of the keys of all candidates that agree with the bits found so far. After the last one, or as
// soon as all that agree are taken, keys above are known to be in, and how many of the equal ones are, in flat order.
// One more pass writes the bits and counts ties by chunk; chunks with ties that are in are visited once more.
#include <bit>
#include <numeric>
#include <vector>

#include "../passes.h"
#include "../philox.h"
#include "bits.h"
#include "launchers.h"

namespace samkern::cpu {
namespace {

constexpr int kDigitBits = 11;
constexpr int64_t kDigits = 1 << kDigitBits;
// Neighbouring entries count in different copies, and what is no candidate in one of several places: an increment that
// follows another one of the same counter would have to wait for it.
constexpr int64_t kCopies = 4;
constexpr int64_t kElsewhere = 16;
constexpr int64_t kRow = kDigits + kElsewhere;

enum class Ranking { kOrder, kSmallness, kGrowth };
enum class Candidates { kAll, kOnes, kZeros, kZerosBefore };

// Keys whose digits down to `shift` are known: candidates above are in, and `ties` of those that agree.
template <typename Key>
struct Answer {
  Key known = 0;   // which bits
  Key prefix = 0;  // their values
  int64_t ties = 0;
  bool all_ties = false;
};

template <typename T>
SAMKERN_CLONES void order_keys_range(const T* x, int64_t n, math::KeyOf<T>* __restrict keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = math::order_key(x[i]);
}

template <typename T>
SAMKERN_CLONES void smallness_keys_range(const T* x, int64_t n, math::KeyOf<T>* __restrict keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = math::smallness_key(x[i]);
}

// Keys of entries 4 q to 4 (q + n) - 1 of the list.
SAMKERN_CLONES void growth_keys_range(int64_t q, int64_t n, uint32_t t, uint64_t seed, uint32_t* __restrict keys) {
  for (int64_t i = 0; i < n; ++i) {
    const philox::Words words = philox::growth_keys(q + i, t, seed);
    for (int j = 0; j < 4; ++j) keys[4 * i + j] = words.x[j];
  }
}

template <typename Key>
struct Block {
  alignas(64) Key keys[kBlock + 8] = {};
  alignas(64) uint32_t words[kBlockWords];  // candidates
  alignas(64) uint16_t digits[kBlock];
  const Key* first;  // key of the first entry
};

// The digit of every candidate whose known bits are the prefix; a place beyond the digits for others.
template <typename Key>
SAMKERN_CLONES void digits_range(const Key* keys, const uint32_t* words, int64_t n_words, Key known, Key prefix,
                                 int shift, Key digit_mask, uint16_t* __restrict digits) {
  for (int64_t w = 0; w < n_words; ++w) {
    const Key word = words[w];
    for (int l = 0; l < kWordBits; ++l) {
      const Key key = keys[w * kWordBits + l];
      const bool counts = (key & known) == prefix && (word & kLaneBits<Key>.at[l]) != 0;
      const Key digit = counts ? (key >> shift) & digit_mask : static_cast<Key>(kDigits + l % kElsewhere);
      digits[w * kWordBits + l] = static_cast<uint16_t>(digit);
    }
  }
}

void count_range(const uint16_t* digits, int64_t n, uint32_t* counts) {
  for (int64_t i = 0; i < n; i += kCopies) {
    for (int64_t j = 0; j < kCopies; ++j) ++counts[j * kRow + digits[i + j]];
  }
}

// Bits of the keys above those that agree, and of these.
template <typename Key>
SAMKERN_CLONES void compare_range(const Key* keys, int64_t n_words, Key known, Key prefix, uint32_t* __restrict above,
                                  uint32_t* __restrict equal) {
  const Key highest = prefix | static_cast<Key>(~known);
  for (int64_t w = 0; w < n_words; ++w) {
    uint32_t a = 0, e = 0;
    for (int l = 0; l < kWordBits; ++l) {
      const Key key = keys[w * kWordBits + l];
      a |= key > highest ? kLaneBits<uint32_t>.at[l] : 0;
      e |= (key & known) == prefix ? kLaneBits<uint32_t>.at[l] : 0;
    }
    above[w] = a;
    equal[w] = e;
  }
}

// What one selection reads, block by block.
template <typename T, Ranking ranking>
struct Source {
  using Key = std::conditional_t<ranking == Ranking::kGrowth, uint32_t, math::KeyOf<T>>;
  const PlanView& plan;
  const SelectOptions& options;
  Candidates candidates;

  // Keys and candidates of entries [at, at + n) of a tensor.
  void read_block(int32_t tensor, int64_t at, int64_t n, Block<Key>& block) const {
    block.first = block.keys;
    if constexpr (ranking == Ranking::kGrowth) {
      const int64_t flat = plan.flat[tensor] + at;
      growth_keys_range(flat / 4, (flat % 4 + n + 3) / 4, options.t, options.seed, block.keys);
      block.first = block.keys + flat % 4;
    } else {
      T buffer[kBlock];
      const T* values = read(plan.grad[tensor], at, n, buffer);
      if constexpr (ranking == Ranking::kOrder) order_keys_range(values, n, block.keys);
      if constexpr (ranking == Ranking::kSmallness) smallness_keys_range(values, n, block.keys);
    }
    const Operand& bits = candidates == Candidates::kZerosBefore ? plan.saved[tensor] : plan.mask[tensor];
    for (int64_t i = 0; i < n; i += kWordBits) {
      uint32_t word = candidates == Candidates::kAll ? ~uint32_t{0} : load_word(bits, at + i);
      if (candidates == Candidates::kZeros || candidates == Candidates::kZerosBefore) word = ~word;
      block.words[i / kWordBits] = word & lowest_bits(n - i);
    }
  }
};

int64_t words_of(int64_t n) { return (n + kWordBits - 1) / kWordBits; }

// How many candidates have each digit.
template <typename Source, typename Key>
std::vector<int64_t> count_digits(const Source& source, const Answer<Key>& found, int shift, Key digit_mask,
                                  const Pool& pool) {
  std::vector<int64_t> totals(chunk_runs(source.plan, pool) * kDigits);
  for_chunk_runs(source.plan, pool, [&](int64_t run, int32_t begin, int32_t end) {
    Block<Key> block;
    std::vector<uint32_t> counts(kCopies * kRow);
    int64_t* total = totals.data() + run * kDigits;
    int64_t n_counted = 0;
    auto add = [&] {
      for (int64_t copy = 0; copy < kCopies; ++copy) {
        for (int64_t digit = 0; digit < kDigits; ++digit) total[digit] += counts[copy * kRow + digit];
      }
      std::fill(counts.begin(), counts.end(), 0);
    };
    for (int32_t c = begin; c < end; ++c) {
      const Span chunk = span(source.plan, c);
      for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
        const int64_t n = std::min(kBlock, chunk.at + chunk.n - at), n_words = words_of(n);
        source.read_block(chunk.tensor, at, n, block);
        digits_range(block.first, block.words, n_words, found.known, found.prefix, shift, digit_mask, block.digits);
        count_range(block.digits, n_words * kWordBits, counts.data());
      }
      n_counted += chunk.n;
      if (n_counted > (int64_t{1} << 31)) {
        add();
        n_counted = 0;
      }
    }
    add();
  });
  for (size_t i = kDigits; i < totals.size(); ++i) totals[i % kDigits] += totals[i];
  totals.resize(kDigits);
  return totals;
}

template <typename Source>
int64_t count_nans(const Source& source, const Pool& pool) {
  std::vector<int64_t> counts(source.plan.n_chunks);
  for_chunks(source.plan, pool, Walk::kBackwards, [&](const Span& chunk) {
    Block<typename Source::Key> block;
    for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
      const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
      source.read_block(chunk.tensor, at, n, block);
      counts[chunk.chunk] += std::count(block.keys, block.keys + n, 0);
    }
  });
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

// Where the n-th largest key lies. `significant`: the highest bits, in which alone keys differ.
template <typename Source, typename Key = typename Source::Key>
Answer<Key> find(const Source& source, int64_t n, int significant, const Pool& pool) {
  constexpr int kKeyBits = 8 * sizeof(Key);
  Answer<Key> found;
  int64_t left = n;
  for (int known = 0; known < significant && !found.all_ties;) {
    const int width = std::min(kDigitBits, kKeyBits - known), shift = kKeyBits - known - width;
    const Key digit_mask = (Key{1} << width) - 1;
    const std::vector<int64_t> counts = count_digits(source, found, shift, digit_mask, pool);
    if (known == 0 && source.options.n_nan != nullptr) {
      *source.options.n_nan = counts[0] > 0 ? count_nans(source, pool) : 0;  // they are among the smallest
    }
    if (n == 0) return {static_cast<Key>(~Key{0}), static_cast<Key>(~Key{0}), 0, false};
    Key digit = digit_mask;
    while (counts[digit] < left) left -= counts[digit--];
    found.known |= digit_mask << shift;
    found.prefix |= digit << shift;
    found.all_ties = counts[digit] == left;
    known += width;
  }
  found.ties = left;
  return found;
}

// Turns bits: those of kTop's mask are zeros to begin with.
template <typename Source, typename Key = typename Source::Key>
void turn(const Source& source, const Answer<Key>& found, const Pool& pool) {
  const PlanView& plan = source.plan;
  const bool fresh = source.candidates == Candidates::kAll;
  std::vector<int64_t> ties(plan.n_chunks);
  auto for_blocks = [&](const Span& chunk, const auto& body) {
    Block<Key> block;
    uint32_t above[kBlockWords], equal[kBlockWords];
    for (int64_t at = chunk.at; at < chunk.at + chunk.n; at += kBlock) {
      const int64_t n = std::min(kBlock, chunk.at + chunk.n - at);
      source.read_block(chunk.tensor, at, n, block);
      compare_range(block.first, words_of(n), found.known, found.prefix, above, equal);
      for (int64_t w = 0; w < words_of(n); ++w) {
        const int64_t i = at + w * kWordBits;
        body(i, above[w] & block.words[w], equal[w] & block.words[w], lowest_bits(chunk.at + chunk.n - i));
      }
    }
  };
  for_chunks(plan, pool, Walk::kForwards, [&](const Span& chunk) {
    const Operand& mask = plan.mask[chunk.tensor];
    int64_t n_equal = 0;
    for_blocks(chunk, [&](int64_t i, uint32_t above, uint32_t equal, uint32_t valid) {
      const uint32_t old = fresh ? 0 : load_word(mask, i) & valid;
      store_word(mask, i, old ^ (found.all_ties ? above | equal : above));
      n_equal += std::popcount(equal);
    });
    ties[chunk.chunk] = n_equal;
  });
  if (found.all_ties) return;
  std::vector<int64_t> taken(plan.n_chunks);
  int64_t left = found.ties;
  for (int32_t c = 0; c < plan.n_chunks; ++c) left -= taken[c] = std::min(left, ties[c]);
  for_chunks(plan, pool, Walk::kBackwards, [&](const Span& chunk) {
    if (taken[chunk.chunk] == 0) return;
    const Operand& mask = plan.mask[chunk.tensor];
    int64_t rest = taken[chunk.chunk];
    for_blocks(chunk, [&](int64_t i, uint32_t, uint32_t equal, uint32_t) {
      uint32_t taking = equal;
      while (std::popcount(taking) > rest) taking &= ~std::bit_floor(taking);
      rest -= std::popcount(taking);
      store_word(mask, i, load_word(mask, i) ^ taking);
    });
  });
}

int64_t count_ones(const PlanView& plan) {
  int64_t n = 0;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    for (int64_t i = 0; i < plan.numel[t]; i += kWordBits) {
      n += std::popcount(load_word(plan.mask[t], i) & lowest_bits(plan.numel[t] - i));
    }
  }
  return n;
}

int64_t count_entries(const PlanView& plan) {
  return plan.n_tensors > 0 ? plan.flat[plan.n_tensors - 1] + plan.numel[plan.n_tensors - 1] : 0;
}

// Highest bits of a score's key in which scores differ: the low bits of converted half types are all alike.
int significant_bits(const PlanView& plan, const SelectOptions& options) {
  if (options.wide) return 64;
  for (int32_t t = 0; t < plan.n_tensors; ++t) {
    if (plan.numel[t] > 0 && size_of(plan.grad[t].dtype) > 2) return 32;
  }
  return 2 * kDigitBits;
}

template <typename T, Ranking ranking>
void select(const PlanView& plan, const SelectOptions& options, Candidates candidates, int64_t n, const Pool& pool) {
  const Source<T, ranking> source{plan, options, candidates};
  const int significant = ranking == Ranking::kGrowth ? 32 : significant_bits(plan, options);
  turn(source, find(source, n, significant, pool), pool);
}

template <Ranking ranking>
void select_scores(const PlanView& plan, const SelectOptions& options, Candidates candidates, int64_t n,
                   const Pool& pool) {
  if (options.wide) return select<double, ranking>(plan, options, candidates, n, pool);
  select<float, ranking>(plan, options, candidates, n, pool);
}

}  // namespace

void select_mask(const PlanView& plan, const SelectOptions& options, const Pool& pool) {
  if (options.what == Select::kTop) {
    return select_scores<Ranking::kOrder>(plan, options, Candidates::kAll, options.n, pool);
  }
  if (options.skip != nullptr && *options.skip) return;
  const int64_t ones = count_ones(plan), zeros = count_entries(plan) - ones;
  const bool drops = options.what == Select::kDropGrow;
  int64_t n = std::min(options.n, drops ? ones : zeros);
  if (drops && !options.regrow) n = std::min(n, zeros);
  if (n == 0) return;
  if (drops) select_scores<Ranking::kSmallness>(plan, options, Candidates::kOnes, n, pool);
  const Candidates grown = drops && !options.regrow ? Candidates::kZerosBefore : Candidates::kZeros;
  select<float, Ranking::kGrowth>(plan, options, grown, n, pool);
}

}  // namespace samkern::cpu
