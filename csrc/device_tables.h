// A plan's tables in the memory of a GPU. No CUDA headers: samkern._C is built and linked without them.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "half_steps.h"
#include "tables.h"

namespace samkern {

// One allocation that holds all tables and the workspace. The rows of operands are compared with what was sent last,
// and only the span that changed is sent, by way of pinned memory; the rest never changes.
class DeviceTables {
 public:
  DeviceTables(const Tables& host, at::Device device, const DeviceFunctions& functions);

  // The host's view with device addresses, up to date in the order of the current stream.
  // Throws while a graph is recorded and an operand has moved: the replays would go on using the old address.
  const PlanView& upload(const PlanView& host);

 private:
  template <typename T>
  size_t reserve(size_t count, const T* values = nullptr);

  void send(size_t begin, size_t end);

  const DeviceFunctions& functions_;
  at::Device device_;
  at::Tensor memory_;
  std::vector<char> image_;    // of what has a value on the host
  std::vector<Operand> sent_;  // rows as they are on the device
  size_t n_tensors_;
  double *filter_ww_ = nullptr, *filter_aa_ = nullptr;
  PlanView view_{};
};

}  // namespace samkern
