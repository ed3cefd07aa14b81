// The device of csrc/cuda/device.h on a CPU: every thread of every block is a fiber that runs until it has to wait, and
// chance decides who runs next. So a missing barrier shows as a wrong or unstable result, and a barrier that not all
// reach as a deadlock that names the threads. What it cannot show: weak memory ordering, limits of the hardware, speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define SAMKERN_DEVICE inline
#define SAMKERN_COLD inline
#define SAMKERN_KERNEL void
#define SAMKERN_ARGUMENT const

namespace samkern::device {

// How the next launches run. `without`: a synchronisation that does nothing, to see that the tests notice. `capturing`:
// launches run all the same, but the plan is told that they are being recorded.
struct Setting {
  uint64_t seed = 0;
  int n_blocks = 3;
  bool one_launch = true;
  std::string without;
  bool capturing = false;  // what the launcher's caller is told of its stream
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  Setting setting;
  int n_launches = 0;

  // Runs body() in every thread of n_blocks blocks until all are done.
  template <typename Body>
  void run(int n_blocks, bool together, const Body& body) {
    random_.seed(setting.seed);
    without_ = {setting.without == "block_sync", setting.without == "grid_sync", setting.without == "shuffle"};
    together_ = together;
    n_blocks_ = n_blocks;
    blocks_.assign(n_blocks, {});
    for (Block& block : blocks_) block.warps.assign(kWarps, {});
    grid_ = {};
    error_.clear();
    body_ = [](const void* context) { (*static_cast<const Body*>(context))(); };
    context_ = &body;
    const size_t n = static_cast<size_t>(n_blocks) * kThreads;
    while (fibers_.size() < n) fibers_.push_back(std::make_unique<Fiber>());
    ready_.clear();
    for (size_t i = 0; i < n; ++i) {
      fibers_[i]->prepare(static_cast<int>(i));
      ready_.push_back(static_cast<int>(i));
    }
    size_t done = 0;
    while (!ready_.empty()) {
      const size_t pick = std::uniform_int_distribution<size_t>(0, ready_.size() - 1)(random_);
      current_ = fibers_[ready_[pick]].get();
      ready_[pick] = ready_.back();
      ready_.pop_back();
      if (_setjmp(scheduler_) == 0) current_->resume();
      done += current_->finished ? 1 : 0;
    }
    current_ = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
    if (done < n) throw std::runtime_error("deadlock: " + waiting(n));
  }

  int thread() const { return current_->index % kThreads; }
  int block() const { return current_->index / kThreads; }
  int n_blocks() const { return n_blocks_; }

  void block_sync() {
    if (!without_.block_sync) wait(blocks_[block()].barrier, kThreads, "block_sync");
  }

  void grid_sync() {
    if (!together_) return fail("grid_sync in a grid that was not launched together");
    if (!without_.grid_sync) wait(grid_, n_blocks_ * kThreads, "grid_sync");
  }

  // Values of the warp's lanes, by turns in two rows: who is at the next but one shuffle knows that all have read this
  // one.
  template <typename T>
  T exchange(T x, int from) {
    Warp& warp = blocks_[block()].warps[thread() / kWarp];
    uint64_t* row = warp.values[current_->shuffles++ % 2];
    std::memcpy(row + thread() % kWarp, &x, sizeof x);
    if (!without_.shuffle) wait(warp.barrier, kWarp, "shuffle");
    if (from < kWarp) std::memcpy(&x, row + from, sizeof x);
    return x;
  }

  // Memory of the block, poisoned: bytes of ones are a NaN.
  void* shared(const void* key, size_t n_bytes) {
    auto& memory = blocks_[block()].shared[key];
    if (memory.empty()) memory.assign(n_bytes, static_cast<char>(0xFF));
    return memory.data();
  }

  void fail(const char* what) {
    if (error_.empty()) error_ = what;
    ready_.clear();
    _longjmp(scheduler_, 1);
  }

 private:
  struct Barrier {
    std::vector<int> waiting;
  };
  struct Warp {
    Barrier barrier;
    uint64_t values[2][kWarp];
  };
  struct Block {
    Barrier barrier;
    std::vector<Warp> warps;
    std::unordered_map<const void*, std::vector<char>> shared;
  };

  struct Fiber {
    static constexpr size_t kStack = 64 << 10;
    std::unique_ptr<char[]> stack{new char[kStack]};
    ucontext_t start;
    jmp_buf place;
    int index = 0;
    unsigned shuffles = 0;
    bool started = false, finished = false;  // a fiber that has finished can be resumed: it begins anew
    const char* waits_for = nullptr;

    void prepare(int i) {
      index = i;
      shuffles = 0;
      started = started && finished;  // one that an error left in the middle starts from nothing
      finished = false;
      waits_for = nullptr;
      if (started) return;
      getcontext(&start);
      start.uc_stack.ss_sp = stack.get();
      start.uc_stack.ss_size = kStack;
      start.uc_link = nullptr;
      makecontext(&start, &Machine::enter, 0);
    }

    void resume() {
      if (started) _longjmp(place, 1);
      started = true;
      setcontext(&start);
    }
  };

  static void enter() {
    Machine& machine = get();
    for (;;) {
      machine.body_(machine.context_);
      machine.current_->finished = true;
      if (_setjmp(machine.current_->place) == 0) _longjmp(machine.scheduler_, 1);
    }
  }

  void wait(Barrier& barrier, int n, const char* what) {
    if (static_cast<int>(barrier.waiting.size()) + 1 == n) {
      for (const int i : barrier.waiting) fibers_[i]->waits_for = nullptr;
      ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
      ready_.push_back(current_->index);
    } else {
      current_->waits_for = what;
      barrier.waiting.push_back(current_->index);
    }
    if (_setjmp(current_->place) == 0) _longjmp(scheduler_, 1);
  }

  std::string waiting(size_t n) const {
    size_t count = 0, first = n;
    for (size_t i = 0; i < n; ++i) {
      if (fibers_[i]->finished) continue;
      if (count++ == 0) first = i;
    }
    return std::to_string(count) + " threads wait for ever, the first in block " + std::to_string(first / kThreads) +
           ", thread " + std::to_string(first % kThreads) + ", at " + fibers_[first]->waits_for;
  }

  struct Without {
    bool block_sync, grid_sync, shuffle;
  };

  std::mt19937_64 random_;
  Without without_{};
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<int> ready_;
  std::vector<Block> blocks_;
  Barrier grid_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  int n_blocks_ = 0;
  bool together_ = false;
  std::string error_;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
};

inline int thread() { return Machine::get().thread(); }
inline int block() { return Machine::get().block(); }
inline int n_blocks() { return Machine::get().n_blocks(); }
inline void block_sync() { Machine::get().block_sync(); }
inline void grid_sync() { Machine::get().grid_sync(); }
template <typename T>
T shuffle_down(T x, int by) {
  return Machine::get().exchange(x, thread() % kWarp + by);
}

template <typename T, int N, int id>
T* shared() {
  static const char key = 0;
  return static_cast<T*>(Machine::get().shared(&key, N * sizeof(T)));
}

// Fibers only give way where they wait: nothing comes between the load and the store.
inline void add_in_block(uint32_t* counter, uint32_t x) { *counter += x; }
inline void add_in_grid(uint64_t* counter, uint64_t x) { *counter += x; }

inline uint32_t arrive(uint32_t* counter, uint32_t last) {
  const uint32_t before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline void acquire() {}
template <typename T>
T read_shared(const T* x) {
  return *x;
}

template <typename T>
T* in_global(T* x) {
  return x;
}

template <typename Bits>
void check_aligned(const Bits* x) {
  if (reinterpret_cast<uintptr_t>(x) % sizeof(Bits) != 0) Machine::get().fail("a wide access to a misaligned address");
}
template <typename Bits>
Bits load(const Bits* from) {
  check_aligned(from);
  Bits x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <typename Bits>
void store(Bits* to, const Bits& x, bool) {
  check_aligned(to);
  std::memcpy(to, &x, sizeof x);
}

inline int count_ones(uint32_t x) { return __builtin_popcount(x); }

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return static_cast<float>(x);
}
inline uint16_t float_to_half(float value) {
  const auto x = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

template <typename Args>
const char* launch(void (*kernel)(Args), const Args& args, int n_blocks, bool together, const Stream&) {
  static std::string error;
  ++Machine::get().n_launches;
  try {
    Machine::get().run(n_blocks, together, [&] { kernel(args); });
  } catch (const std::runtime_error& failure) {
    error = failure.what();
    return error.c_str();
  }
  return nullptr;
}

}  // namespace samkern::device
