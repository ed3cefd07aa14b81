#include "noise.h"

#include "../normals.h"
#include "../philox.h"

namespace samkern::cpu {
namespace {

constexpr int64_t kPerBlock = 4;  // numbers that one counter gives

// Counters, which become words.
struct Words {
  alignas(64) uint32_t x[4][kBlock];
};

// Round by round over all counters: one counter after another does not vectorise as well.
SAMKERN_CLONES void words_range(int64_t n, uint64_t seed, Words& words) {
  uint32_t* __restrict c0 = words.x[0], * __restrict c1 = words.x[1];
  uint32_t* __restrict c2 = words.x[2], * __restrict c3 = words.x[3];
  philox::Key key(seed);
  for (int round = 0; round < philox::kRounds; ++round) {
    for (int64_t i = 0; i < n; ++i) philox::take_round(c0[i], c1[i], c2[i], c3[i], key);
    key.next();
  }
}

// All four numbers of every counter.
SAMKERN_CLONES void normals_range(const Words& words, int64_t n, float* __restrict z) {
  for (int64_t i = 0; i < n; ++i) {
    for (int pair = 0; pair < 2; ++pair) {
      const float length = normals::length(words.x[2 * pair][i]);
      const normals::Turn turn = normals::turn(words.x[2 * pair + 1][i]);
      z[kPerBlock * i + 2 * pair] = length * turn.cosine;
      z[kPerBlock * i + 2 * pair + 1] = length * turn.sine;
    }
  }
}

// Number places[i] % 4 of counter i.
SAMKERN_CLONES void chosen_normals_range(const Words& words, const int64_t* places, int64_t n, float* __restrict z) {
  for (int64_t i = 0; i < n; ++i) {
    const bool second = (places[i] & 2) != 0, odd = (places[i] & 1) != 0;
    const float length = normals::length(second ? words.x[2][i] : words.x[0][i]);
    const normals::Turn turn = normals::turn(second ? words.x[3][i] : words.x[1][i]);
    z[i] = length * (odd ? turn.sine : turn.cosine);
  }
}

// Counters of n blocks, block i being number q(i).
template <typename Block>
SAMKERN_INLINE void set_counters(const NoiseOptions& noise, int64_t n, const Block& q, Words& words) {
  for (int64_t i = 0; i < n; ++i) {
    words.x[0][i] = static_cast<uint32_t>(q(i));
    words.x[1][i] = static_cast<uint32_t>(q(i) >> 32);
    words.x[2][i] = noise.t;
    words.x[3][i] = philox::noise_stream(noise.draw);
  }
}

// Places in the list of entries [at, at + n) of a tensor's memory, along runs of its innermost dim.
void places_range(const PlanView& plan, int32_t tensor, int64_t flat, int64_t at, int64_t n, int64_t* places) {
  const Dim inner = plan.dims[plan.first_dim[tensor + 1] - 1];
  for (int64_t done = 0; done < n;) {
    const int64_t run = std::min(n - done, inner.size - (at + done) % inner.size);
    const int64_t begin = flat + row_major(plan, tensor, at + done);
    for (int64_t i = 0; i < run; ++i) places[done + i] = begin + i * inner.step;
    done += run;
  }
}

}  // namespace

float* fill_normals(const PlanView& plan, const NoiseOptions& noise, int32_t tensor, int64_t at, int64_t n,
                    float (&buffer)[kBlock + 4]) {
  Words words;
  const int64_t flat = noise.first + plan.flat[tensor];
  if (plan.first_dim[tensor] == plan.first_dim[tensor + 1]) {
    const int64_t begin = (flat + at) / kPerBlock, offset = (flat + at) % kPerBlock;
    const int64_t n_blocks = (offset + n + kPerBlock - 1) / kPerBlock;
    set_counters(noise, n_blocks, [=](int64_t i) { return begin + i; }, words);
    words_range(n_blocks, noise.seed, words);
    normals_range(words, n_blocks, buffer);
    return buffer + offset;
  }
  int64_t places[kBlock];
  places_range(plan, tensor, flat, at, n, places);
  set_counters(noise, n, [&](int64_t i) { return places[i] / kPerBlock; }, words);
  words_range(n, noise.seed, words);
  chosen_normals_range(words, places, n, buffer);
  return buffer;
}

}  // namespace samkern::cpu
