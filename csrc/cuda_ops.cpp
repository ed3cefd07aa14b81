// samkern._cuda: the GPU kernels, as functions that samkern._C's Plan calls. Device, stream and errors are dealt with
// here.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "cuda/launchers.h"
#include "half_steps.h"

namespace samkern {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// SAMKERN_ONE_LAUNCH=0 takes a launch for each phase, for profilers that serialise blocks and to compare.
bool one_launch(int device) {
  const char* const setting = std::getenv("SAMKERN_ONE_LAUNCH");
  return (setting == nullptr || std::string(setting) != "0") && attribute(cudaDevAttrCooperativeLaunch, device) != 0;
}

device::Stream stream_of(int device) {
  return {c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream(), one_launch(device)};
}

void check(const char* error, const char* what) {
  TORCH_CHECK(error == nullptr, "samkern: the launch of ", what, " failed: ", error);
}

void perturb(const PlanView& plan, const PerturbOptions& options, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::perturb(plan, options, stream_of(device)), "perturb");
}

void restore(const PlanView& plan, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::restore(plan, stream_of(device)), "restore");
}

void update(const PlanView& plan, const UpdateOptions& options, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::update(plan, options, stream_of(device)), "update");
}

void reduce(const PlanView& plan, const ReduceOptions& options, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::reduce(plan, options, stream_of(device)), "reduce");
}

void perturb_apply(const PlanView& plan, const PerturbOptions& options, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::perturb_apply(plan, options, stream_of(device)), "perturb_apply");
}

void update_apply(const PlanView& plan, const UpdateOptions& options, const Applied& applied, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::update_apply(plan, options, applied, stream_of(device)), "update_apply");
}

void select_mask(const PlanView& plan, const SelectOptions& options, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::select_mask(plan, options, stream_of(device)), "select_mask");
}

void fisher_accumulate(const PlanView& plan, const FisherOptions& options, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::fisher_accumulate(plan, options, stream_of(device)), "fisher_accumulate");
}

void difference_dot(const PlanView& plan, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::difference_dot(plan, stream_of(device)), "difference_dot");
}

void perturb_by_noise(const PlanView& plan, const NoiseOptions& options, int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  check(cuda::perturb_by_noise(plan, options, stream_of(device)), "perturb_by_noise");
}

int n_blocks(int device) { return device::kBlocksPerProcessor * attribute(cudaDevAttrMultiProcessorCount, device); }

bool is_capturing(int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

DeviceFunctions functions{perturb,           restore,        update,           reduce,
                          perturb_apply,     update_apply,   select_mask,      cuda::n_select_counters,
                          fisher_accumulate, difference_dot, perturb_by_noise, n_blocks,
                          is_capturing,
                          /*on_host=*/false};

}  // namespace
}  // namespace samkern

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "GPU kernels of samkern, for samkern._C.use_device_functions.";
  m.attr("functions") = pybind11::capsule(&samkern::functions);
}
