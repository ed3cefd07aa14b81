// select_mask: the ones of a mask, chosen exactly from a whole list by radix select. One launch.
//
// Keys are unsigned numbers in the order that is wanted. Each of the first passes counts 11 bits of the keys that agree
// with the threshold so far; every block then looks up for itself which bits the threshold has there. After the last
// one it is known exactly, and how many of the entries equal to it (ties) still belong. One more pass writes the mask;
// if only some of the ties belong, it leaves them out and counts them chunk by chunk, and the chunks with the first of
// them are visited again.
//
// Counts are whole numbers, added by integer atomics: the same in any order. Entries are taken by eights, a byte of the
// mask, which one thread reads and writes.
#include "../philox.h"
#include "harness.cuh"
#include "launchers.h"
#include "start.cuh"

namespace samkern::cuda {
namespace {

constexpr int kDigitBits = 11;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kByte = 8;  // entries

// A block's counters, each in so many copies, of which a lane uses one. Scores crowd: eight exponents hold most entries
// of a Gaussian gradient, so that a warp adds to the same few counters, and the same address takes one lane after
// another. With four copies side by side, in banks of their own, it is at most 8 lanes, and neighbours of a thread with
// equal bits are added at once: a list of equal scores costs no more than one of random bits. 32 KB, static; eight
// copies would leave one block a processor less to the others.
constexpr int kCopies = 4;

struct SelectArgs {
  PlanView plan;
  SelectOptions options;
  int32_t only;  // the phase of this launch; -1: all, with barriers in between
};

// What is chosen from, by which keys, and what becomes of the chosen.
enum class Source {
  kScores,    // every entry, by plan.grad: ones; all others zeros
  kActive,    // ones of the mask, smallest |plan.grad| first: zeros
  kInactive,  // zeros of the mask (of plan.saved, if there is one), at random: ones
};

// ---- counters in global memory: for each selection digits of every pass, ties of every chunk; then NaNs

SAMKERN_INLINE constexpr int max_passes(bool wide) { return wide ? 6 : 3; }

SAMKERN_INLINE int64_t counters_per_selection(const PlanView& plan, bool wide) {
  return int64_t{max_passes(wide)} * kDigits + plan.n_chunks;
}

SAMKERN_DEVICE uint64_t* counters_of(const SelectArgs& args, int selection) {
  return device::in_global(args.options.counters) + selection * counters_per_selection(args.plan, args.options.wide);
}

SAMKERN_DEVICE uint64_t* digits_of(const SelectArgs& args, int selection, int pass) {
  return counters_of(args, selection) + pass * kDigits;
}

SAMKERN_DEVICE uint64_t* ties_of(const SelectArgs& args, int selection) {
  return digits_of(args, selection, max_passes(args.options.wide));
}

SAMKERN_DEVICE uint64_t* nan_counter(const SelectArgs& args) {
  return counters_of(args, args.options.what == Select::kDropGrow ? 2 : 1);
}

// ---- phases

// The phases of a kernel in their order: all of them in one launch, or one of them, whose number is `only`.
struct Phases {
  int32_t only, now = 0;

  SAMKERN_DEVICE bool mine() const { return only < 0 || now == only; }

  // Ends a phase. False: this launch has done what it is for. `waits`: the next one reads what other blocks wrote.
  SAMKERN_DEVICE bool next(bool waits = true) {
    if (only >= 0 && now == only) return false;
    if (only < 0) waits ? device::grid_sync() : device::block_sync();
    ++now;
    return true;
  }
};

// Calls body(chunk) for the chunks of this block, in turns forwards and backwards: what a phase read last is still in
// the second-level cache when the next one begins.
template <typename Body>
SAMKERN_DEVICE void for_chunks(const PlanView& plan, bool backwards, const Body& body) {
  const int32_t begin = plan.block_begin[device::block()], end = plan.block_begin[device::block() + 1];
  for (int32_t i = begin; i < end; ++i) body(chunk_at(plan, backwards ? begin + end - 1 - i : i));
}

// Adds what all lanes have to a counter of the grid. All 32 must come.
SAMKERN_DEVICE void add_from_warp(uint64_t* counter, uint32_t x) {
  const uint64_t sum = warp_sum(uint64_t{x});
  if (device::thread() % device::kWarp == 0 && sum > 0) device::add_in_grid(counter, sum);
}

// ---- keys

struct Above {
  uint64_t sum, total;  // over threads with higher numbers, over all
};

// Every thread of the block must come.
SAMKERN_DEVICE Above sum_above(uint64_t x) {
  uint64_t* sums = device::shared<uint64_t, device::kWarps, 3>();
  const int warp = device::thread() / device::kWarp, lane = device::thread() % device::kWarp;
  uint64_t from_here = x;
  for (int by = 1; by < device::kWarp; by *= 2) {
    const uint64_t further = device::shuffle_down(from_here, by);
    if (lane + by < device::kWarp) from_here += further;
  }
  if (lane == 0) sums[warp] = from_here;
  device::block_sync();
  Above above{from_here - x, 0};
  for (int w = 0; w < device::kWarps; ++w) {
    if (w > warp) above.sum += sums[w];
    above.total += sums[w];
  }
  device::block_sync();  // the next call writes the same places
  return above;
}

// Keys of 8 entries from `flat` on, which may lie in three blocks of four words. Indices are constants after
// unrolling: an array with others would lie in memory.
SAMKERN_DEVICE void growth_keys(int64_t flat, uint32_t t, uint64_t seed, uint32_t (&keys)[kByte]) {
  uint32_t words[12] = {};
  const int64_t q = flat >> 2;
  const auto shift = static_cast<int>(flat & 3);
  for (int block = 0; block < 3; ++block) {
    if (block == 2 && shift == 0) continue;
    const philox::Words four = philox::growth_keys(q + block, t, seed);
    for (int k = 0; k < 4; ++k) words[4 * block + k] = four.x[k];
  }
  for (int k = 0; k < 10; ++k) words[k] = (shift & 2) != 0 ? words[k + 2] : words[k];
  for (int k = 0; k < kByte; ++k) keys[k] = (shift & 1) != 0 ? words[k + 1] : words[k];
}

// How far the threshold is known after some passes.
template <typename Key>
struct Threshold {
  Key prefix = 0;     // its bits so far
  uint64_t left = 0;  // to be chosen among the candidates that agree with it
  uint64_t ties = 0;  // how many those are
};

// Bytes of the mask whose entries a thread loads before it looks at the first: 128 bytes of float are under way.
template <typename T>
constexpr int kTogether = sizeof(T) == 8 ? 2 : 4;

template <Source source, Kind kind, typename T>
struct Selection {
  using Key = std::conditional_t<source == Source::kInactive, uint32_t, math::KeyOf<T>>;

  const SelectArgs& args;
  const PlanView& plan;
  const int number;  // of the selections of a launch

  static constexpr bool reads = source != Source::kInactive;
  static constexpr int kBits = 8 * sizeof(Key);
  // Half types, widened exactly, have at most 19 bits; what is below is the same in all numbers of a sign.
  static constexpr bool half = reads && (kind == Kind::kBFloat16 || kind == Kind::kFloat16);
  static constexpr int kLowest = half ? kBits - 2 * kDigitBits : 0;
  static constexpr int kPasses = (kBits - kLowest + kDigitBits - 1) / kDigitBits;

  SAMKERN_DEVICE static int shift_of(int pass) {
    const int shift = kBits - kDigitBits * (pass + 1);
    return shift > kLowest ? shift : kLowest;
  }

  // Bytes of the mask that a thread has loaded, and the entries of each.
  template <int together>
  struct Loaded {
    T values[together][kByte];
    uint32_t mask[together], candidates[together];
  };

  SAMKERN_DEVICE static uint8_t* byte_at(const Operand& mask, const Chunk& chunk, int32_t byte) {
    return device::in_global(static_cast<uint8_t*>(mask.address) + chunk.at / kByte + byte);
  }

  // `n` of the 8 entries are there.
  SAMKERN_DEVICE void load_bits(const Chunk& chunk, int32_t byte, int32_t n, uint32_t& mask,
                                uint32_t& candidates) const {
    const uint32_t there = (1U << n) - 1;
    mask = source != Source::kScores ? *byte_at(plan.mask[chunk.tensor], chunk, byte) & there : 0;
    if constexpr (source == Source::kScores) candidates = there;
    if constexpr (source == Source::kActive) candidates = mask & there;
    if constexpr (source == Source::kInactive) {
      const Operand saved = plan.saved[chunk.tensor];
      candidates = ~(saved.address != nullptr ? *byte_at(saved, chunk, byte) : mask) & there;
    }
  }

  SAMKERN_DEVICE void load_some(const Chunk& chunk, int32_t byte, int32_t n, bool packed, Loaded<1>& to) const {
    load_bits(chunk, byte, n, to.mask[0], to.candidates[0]);
    if constexpr (reads) {
      const Operand& from = plan.grad[chunk.tensor];
      const int64_t at = chunk.at + int64_t{byte} * kByte;
      if (packed && n == kByte) return load<kind>(from, at, to.values[0]);
      for (int k = 0; k < kByte; ++k) {
        T value[1] = {};
        if (k < n) load<kind>(from, at + k, value);
        to.values[0][k] = value[0];
      }
    }
  }

  SAMKERN_DEVICE int32_t bytes_of(const Chunk& chunk) const { return (chunk.n + kByte - 1) / kByte; }
  SAMKERN_DEVICE static int32_t entries_of(const Chunk& chunk, int32_t byte) {
    const int32_t left = chunk.n - byte * kByte;
    return left < kByte ? left : kByte;
  }

  // Calls body(byte, keys, mask, candidates) for every byte of the chunk's mask.
  template <typename Body>
  SAMKERN_DEVICE void for_bytes(const Chunk& chunk, const Body& body) const {
    const bool packed = reads && aligned(plan.grad[chunk.tensor]);
    int32_t byte = device::thread();
    if constexpr (reads) {
      constexpr int32_t last = (kTogether<T> - 1) * device::kThreads;
      for (; packed && byte + last < chunk.n / kByte; byte += kTogether<T> * device::kThreads) {
        Loaded<kTogether<T>> loaded;
        for (int j = 0; j < kTogether<T>; ++j) {
          const int32_t b = byte + j * device::kThreads;
          load<kind>(plan.grad[chunk.tensor], chunk.at + int64_t{b} * kByte, loaded.values[j]);
          load_bits(chunk, b, kByte, loaded.mask[j], loaded.candidates[j]);
        }
        for (int j = 0; j < kTogether<T>; ++j) use(chunk, byte + j * device::kThreads, loaded, j, body);
      }
    }
    for (; byte < bytes_of(chunk); byte += device::kThreads) {
      Loaded<1> loaded;
      load_some(chunk, byte, entries_of(chunk, byte), packed, loaded);
      use(chunk, byte, loaded, 0, body);
    }
  }

  template <int together, typename Body>
  SAMKERN_DEVICE void use(const Chunk& chunk, int32_t byte, const Loaded<together>& loaded, int j,
                          const Body& body) const {
    Key keys[kByte] = {};
    if constexpr (source == Source::kScores) {
      for (int k = 0; k < kByte; ++k) keys[k] = math::order_key(loaded.values[j][k]);
    }
    if constexpr (source == Source::kActive) {
      for (int k = 0; k < kByte; ++k) keys[k] = math::smallness_key(loaded.values[j][k]);
    }
    if constexpr (source == Source::kInactive) {
      if (loaded.candidates[j] != 0) {
        const int64_t flat = plan.flat[chunk.tensor] + chunk.at + int64_t{byte} * kByte;
        growth_keys(flat, args.options.t, args.options.seed, keys);
      }
    }
    body(byte, keys, loaded.mask[j], loaded.candidates[j]);
  }

  // Counts the digits of this block's candidates that agree with the threshold so far, and adds them to the grid's.
  SAMKERN_DEVICE void count_digits(int pass, const Threshold<Key>& threshold, bool backwards) const {
    uint32_t* counts = device::shared<uint32_t, kDigits * kCopies, 2>();
    for (int i = device::thread(); i < kDigits * kCopies; i += device::kThreads) counts[i] = 0;
    device::block_sync();
    uint32_t* mine = counts + device::thread() % kCopies;
    const int shift = shift_of(pass), known = pass > 0 ? shift_of(pass - 1) : 0;
    const auto digit_mask = static_cast<uint32_t>(pass > 0 ? (1 << (known - shift)) - 1 : kDigits - 1);
    const bool counts_nan = source == Source::kScores && pass == 0;
    uint32_t n_nan = 0;
    for_chunks(plan, backwards, [&](const Chunk& chunk) {
      for_bytes(chunk, [&](int32_t, const Key(&keys)[kByte], uint32_t, uint32_t candidates) {
        uint32_t last = 0, run = 0;
        for (int k = 0; k < kByte; ++k) {
          if ((candidates >> k & 1) == 0 || (pass > 0 && keys[k] >> known != threshold.prefix)) continue;
          const uint32_t digit = static_cast<uint32_t>(keys[k] >> shift) & digit_mask;
          if (run > 0 && digit != last) {
            device::add_in_block(mine + last * kCopies, run);
            run = 0;
          }
          last = digit;
          ++run;
          if (counts_nan && keys[k] == 0) ++n_nan;
        }
        if (run > 0) device::add_in_block(mine + last * kCopies, run);
      });
    });
    device::block_sync();
    uint64_t* total = digits_of(args, number, pass);
    for (int d = device::thread(); d < kDigits; d += device::kThreads) {
      uint64_t count = 0;
      for (int copy = 0; copy < kCopies; ++copy) count += counts[d * kCopies + copy];
      if (count > 0) device::add_in_grid(total + d, count);
    }
    if (!counts_nan) return;
    add_from_warp(nan_counter(args), n_nan);
  }

  // The threshold with one more digit: the one at which the keys above it no longer are enough. By every block for
  // itself. `n` candidates are wanted; the first digits of all tell how many there are, and n becomes what can be had.
  SAMKERN_DEVICE Threshold<Key> narrowed(int pass, const Threshold<Key>& so_far, uint64_t& n) const {
    constexpr int kPerThread = kDigits / device::kThreads;
    struct Found {
      uint32_t digit;
      uint64_t left, ties;
    };
    Found* found = device::shared<Found, 1, 4>();
    const uint64_t* counts = digits_of(args, number, pass) + device::thread() * kPerThread;
    uint64_t count[kPerThread], sum = 0;
    for (int k = 0; k < kPerThread; ++k) {
      count[k] = device::read_shared(counts + k);
      sum += count[k];
    }
    const Above above = sum_above(sum);
    if (pass == 0) n = available(n, above.total);
    const uint64_t left = pass == 0 ? n : so_far.left;
    const int shift = shift_of(pass), width = (pass > 0 ? shift_of(pass - 1) : kBits) - shift;
    // Nothing to be chosen: the highest of all keys, of which none belongs.
    if (left == 0 && device::thread() == 0) *found = {(1U << width) - 1, 0, 1};
    uint64_t higher = above.sum;
    for (int k = kPerThread - 1; k >= 0; --k) {
      if (higher < left && left <= higher + count[k]) {
        *found = {static_cast<uint32_t>(device::thread() * kPerThread + k), left - higher, count[k]};
      }
      higher += count[k];
    }
    device::block_sync();
    const Threshold<Key> threshold{static_cast<Key>(so_far.prefix << width | found->digit), found->left, found->ties};
    device::block_sync();  // the next pass writes the same place
    return threshold;
  }

  // How many of `n` can be chosen from so many candidates.
  SAMKERN_DEVICE uint64_t available(uint64_t n, uint64_t candidates) const {
    uint64_t most = candidates;
    if (source == Source::kActive && !args.options.regrow) {  // as many zeros have to be there, to become ones
      const int32_t last = plan.n_tensors - 1;
      const uint64_t zeros = static_cast<uint64_t>(plan.flat[last] + plan.numel[last]) - candidates;
      most = zeros < most ? zeros : most;
    }
    return n < most ? n : most;
  }

  SAMKERN_DEVICE void write_byte(const Chunk& chunk, int32_t byte, uint32_t before, uint32_t chosen) const {
    const uint32_t after = source == Source::kActive ? before & ~chosen : before | chosen;
    *byte_at(plan.mask[chunk.tensor], chunk, byte) = static_cast<uint8_t>(after);
  }

  // Chooses every candidate above the threshold, and those equal to it if all of them belong; else counts these.
  SAMKERN_DEVICE void write_bits(const Threshold<Key>& threshold, bool backwards) const {
    const bool all = threshold.left == threshold.ties;
    for_chunks(plan, backwards, [&](const Chunk& chunk) {
      uint32_t n_ties = 0;
      for_bytes(chunk, [&](int32_t byte, const Key(&keys)[kByte], uint32_t mask, uint32_t candidates) {
        uint32_t chosen = 0, ties = 0;
        for (int k = 0; k < kByte; ++k) {
          const Key key = keys[k] >> kLowest;
          chosen |= static_cast<uint32_t>(key > threshold.prefix) << k;
          ties |= static_cast<uint32_t>(key == threshold.prefix) << k;
        }
        write_byte(chunk, byte, mask, (all ? chosen | ties : chosen) & candidates);
        n_ties += device::count_ones(ties & candidates);
      });
      const int32_t padding = bytes_of(chunk) + device::thread();  // what is left of the last word
      if (padding < mask_bytes(chunk.n)) *byte_at(plan.mask[chunk.tensor], chunk, padding) = 0;
      if (!all) add_from_warp(ties_of(args, number) + chunk.index, n_ties);
    });
  }

  // Chooses the first of all ties, in the order of the list.
  SAMKERN_DEVICE void choose_first_ties(const Threshold<Key>& threshold) const {
    const uint64_t* ties = ties_of(args, number);
    const int32_t begin = plan.block_begin[device::block()], end = plan.block_begin[device::block() + 1];
    uint64_t before = 0;
    for (int32_t c = device::thread(); c < begin; c += device::kThreads) before += device::read_shared(ties + c);
    before = sum_above(before).total;
    for (int32_t c = begin; c < end && before < threshold.left; ++c) {
      const uint64_t here = device::read_shared(ties + c);
      if (here > 0) choose_first_of(chunk_at(plan, c), threshold.prefix, threshold.left - before);
      before += here;
    }
  }

  // Chooses the first `n` ties of a chunk. Bytes are dealt out from the last thread to the first, so that what lies
  // before a thread's byte is with the threads above it.
  SAMKERN_DEVICE void choose_first_of(const Chunk& chunk, Key prefix, uint64_t n) const {
    const bool packed = reads && aligned(plan.grad[chunk.tensor]);
    for (int32_t first = 0; first < bytes_of(chunk) && n > 0; first += device::kThreads) {
      const int32_t byte = first + device::kThreads - 1 - device::thread();
      uint32_t ties = 0, mask = 0;
      if (byte < bytes_of(chunk)) {
        Loaded<1> loaded;
        load_some(chunk, byte, entries_of(chunk, byte), packed, loaded);
        use(chunk, byte, loaded, 0, [&](int32_t, const Key(&keys)[kByte], uint32_t, uint32_t candidates) {
          for (int k = 0; k < kByte; ++k) ties |= static_cast<uint32_t>(keys[k] >> kLowest == prefix) << k;
          ties &= candidates;
        });
        mask = *byte_at(plan.mask[chunk.tensor], chunk, byte);
      }
      const Above above = sum_above(static_cast<uint64_t>(device::count_ones(ties)));
      uint64_t left = above.sum < n ? n - above.sum : 0;
      uint32_t chosen = 0;
      for (int k = 0; k < kByte && left > 0; ++k) {
        if ((ties >> k & 1) == 0) continue;
        chosen |= 1U << k;
        --left;
      }
      if (chosen != 0) write_byte(chunk, byte, mask, chosen);
      n = above.total < n ? n - above.total : 0;
    }
  }
};

template <Source source, Kind kind, typename T, typename Key>
SAMKERN_COLD void choose_first_ties(const SelectArgs& args, int number, Threshold<Key> threshold) {
  Selection<source, kind, T>{args, args.plan, number}.choose_first_ties(threshold);
}

// Chooses `n` candidates, or what there are; n is then how many. False: this launch has done what it is for.
template <Source source, Kind kind, typename T>
SAMKERN_DEVICE bool select(const SelectArgs& args, Phases& phases, int number, uint64_t& n) {
  const Selection<source, kind, T> selection{args, args.plan, number};
  Threshold<typename Selection<source, kind, T>::Key> threshold;
  for (int pass = 0; pass < selection.kPasses; ++pass) {
    if (phases.mine()) selection.count_digits(pass, threshold, pass % 2 != 0);
    if (!phases.next()) return false;
    threshold = selection.narrowed(pass, threshold, n);
  }
  if (phases.mine()) selection.write_bits(threshold, selection.kPasses % 2 != 0);
  const bool some = threshold.left < threshold.ties;
  if (!phases.next(some)) return false;
  if (phases.mine() && some) choose_first_ties<source, kind, T>(args, number, threshold);
  return phases.next(false);
}

template <Kind kind, typename T>
SAMKERN_KERNEL topk_kernel(SAMKERN_ARGUMENT SelectArgs args) {
  Phases phases{args.only};
  auto n = static_cast<uint64_t>(args.options.n);
  select<Source::kScores, kind, T>(args, phases, 0, n);
  if (phases.now > 0 && device::block() == 0 && device::thread() == 0) {
    *args.options.n_nan = static_cast<int64_t>(device::read_shared(nan_counter(args)));
  }
}

template <Kind kind, typename T>
SAMKERN_KERNEL drop_grow_kernel(SAMKERN_ARGUMENT SelectArgs args) {
  if (args.options.skip != nullptr && *args.options.skip) return;
  Phases phases{args.only};
  auto n = static_cast<uint64_t>(args.options.n);
  const bool drops = args.options.what == Select::kDropGrow;
  if (drops && !select<Source::kActive, kind, T>(args, phases, 0, n)) return;
  select<Source::kInactive, kind, T>(args, phases, drops ? 1 : 0, n);
}

template <Kind kind, typename T>
const char* start_select(const SelectArgs& args, const device::Stream& stream) {
  const bool top = args.options.what == Select::kTop, drops = args.options.what == Select::kDropGrow;
  void (*const kernel)(SelectArgs) = top ? topk_kernel<kind, T> : drop_grow_kernel<kind, T>;
  if (stream.one_launch) return device::launch(kernel, args, args.plan.n_blocks, true, stream);
  // Passes, then the mask, then its ties.
  constexpr int kOfScores = Selection<Source::kScores, kind, T>::kPasses + 2;
  constexpr int kOfKeys = Selection<Source::kInactive, kind, T>::kPasses + 2;
  const int n_phases = (top || drops ? kOfScores : 0) + (top ? 0 : kOfKeys);
  SelectArgs phase = args;
  for (phase.only = 0; phase.only < n_phases; ++phase.only) {
    if (const char* error = device::launch(kernel, phase, args.plan.n_blocks, false, stream)) return error;
  }
  return nullptr;
}

}  // namespace

const char* select_mask(const PlanView& plan, const SelectOptions& options, const device::Stream& stream) {
  const SelectArgs args{plan, options, -1};
  if (options.what != Select::kGrow && options.wide) return start_select<Kind::kAny, double>(args, stream);
  switch (kind_of(plan)) {
    case Kind::kFloat32: return start_select<Kind::kFloat32, float>(args, stream);
    case Kind::kBFloat16: return start_select<Kind::kBFloat16, float>(args, stream);
    case Kind::kFloat16: return start_select<Kind::kFloat16, float>(args, stream);
    default: return start_select<Kind::kAny, float>(args, stream);
  }
}

int64_t n_select_counters(const PlanView& plan, const SelectOptions& options) {
  const int64_t n_selections = options.what == Select::kDropGrow ? 2 : 1;
  return n_selections * counters_per_selection(plan, options.wide) + 1;
}

}  // namespace samkern::cuda
