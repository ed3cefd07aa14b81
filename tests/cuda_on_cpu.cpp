// The GPU kernels, run by fibers on the CPU, in the place of samkern._cuda. See cuda_on_cpu.h.
#include <pybind11/pybind11.h>

#include <utility>

#include "../csrc/cuda/device.h"
#include "../csrc/cuda/launchers.h"

namespace py = pybind11;
using samkern::device::Machine;

namespace samkern {
namespace {

device::Stream stream() { return {nullptr, Machine::get().setting.one_launch}; }

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

DeviceFunctions functions{
    [](const PlanView& plan, const PerturbOptions& options, int) { check(cuda::perturb(plan, options, stream())); },
    [](const PlanView& plan, int) { check(cuda::restore(plan, stream())); },
    [](const PlanView& plan, const UpdateOptions& options, int) { check(cuda::update(plan, options, stream())); },
    [](const PlanView& plan, const ReduceOptions& options, int) { check(cuda::reduce(plan, options, stream())); },
    [](const PlanView& plan, const PerturbOptions& options, int) {
      check(cuda::perturb_apply(plan, options, stream()));
    },
    [](const PlanView& plan, const UpdateOptions& options, const Applied& applied, int) {
      check(cuda::update_apply(plan, options, applied, stream()));
    },
    [](const PlanView& plan, const SelectOptions& options, int) { check(cuda::select_mask(plan, options, stream())); },
    cuda::n_select_counters,
    [](const PlanView& plan, const FisherOptions& options, int) {
      check(cuda::fisher_accumulate(plan, options, stream()));
    },
    [](const PlanView& plan, int) { check(cuda::difference_dot(plan, stream())); },
    [](const PlanView& plan, const NoiseOptions& options, int) {
      check(cuda::perturb_by_noise(plan, options, stream()));
    },
    [](int) { return Machine::get().setting.n_blocks; },
    [](int) { return Machine::get().setting.capturing; },
    /*on_host=*/true,
};

}  // namespace
}  // namespace samkern

namespace samkern {
namespace {

struct Nothing {};

// Half of the block comes to the barrier.
void deadlock_kernel(const Nothing) {
  if (device::thread() < device::kThreads / 2) device::block_sync();
}

}  // namespace
}  // namespace samkern

PYBIND11_MODULE(cuda_on_cpu, m) {
  m.def(
      "configure",
      [](uint64_t seed, int n_blocks, bool one_launch, const std::string& without, bool capturing) {
        Machine::get().setting = {seed, n_blocks, one_launch, without, capturing};
      },
      py::arg("seed") = 0, py::arg("n_blocks") = 3, py::arg("one_launch") = true, py::arg("without") = "",
      py::arg("capturing") = false);
  m.def("take_launches", [] { return std::exchange(Machine::get().n_launches, 0); });
  m.def("run_into_a_deadlock",
        [] { samkern::check(samkern::device::launch(samkern::deadlock_kernel, samkern::Nothing{}, 1, false, {})); });
  m.attr("functions") = py::capsule(&samkern::functions);
}
