// A plan's tables in the memory of a GPU. No CUDA headers: samkern._C is built and linked without them.
#pragma once
#include <ATen/ATen.h>

#include <vector>

#include "half_steps.h"
#include "tables.h"

namespace samkern {

// The GPU kernels as samkern._cuda left them; null: there are none.
const DeviceFunctions* device_functions();
void use_device_functions(const DeviceFunctions* functions);

// Whether list ops on x run on these kernels.
bool is_on_device(const at::Tensor& x);

// One allocation that holds all tables and the workspace. The rows of operands are compared with what was sent last,
// and only the span that changed is sent, by way of pinned memory; the rest never changes.
class DeviceTables {
 public:
  DeviceTables(const Tables& host, at::Device device);

  // The host's view with device addresses, up to date in the order of the current stream.
  // Throws while a graph is recorded and an operand has moved: the replays would go on using the old address.
  const PlanView& upload(const PlanView& host);

  const at::Tensor& memory() const { return memory_; }

  // n numbers of the workspace, `begin` being an address of the view's: shares its memory.
  at::Tensor workspace(const double* begin, int64_t n) const;

 private:
  template <typename T>
  size_t reserve(size_t count, const T* values = nullptr);

  void send(int64_t at, const void* from, int64_t n_bytes);

  at::Device device_;
  at::Tensor memory_;
  std::vector<char> image_;    // of what has a value on the host
  std::vector<Operand> sent_;  // rows as they are on the device
  size_t n_tensors_;
  double *filter_ww_ = nullptr, *filter_aa_ = nullptr;
  PlanView view_{};
};

}  // namespace samkern
