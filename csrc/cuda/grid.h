// The shape of all launches, and where they go. Plain C++, for those who call the launchers.
#pragma once

namespace samkern::device {

// Part of the arithmetic: the order in which a block adds depends on it.
constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlocksPerProcessor = 2;

// What a launcher is told about where to run. `one_launch`: the device lets all blocks of a grid wait for each other.
struct Stream {
  void* handle = nullptr;
  bool one_launch = true;
};

}  // namespace samkern::device
