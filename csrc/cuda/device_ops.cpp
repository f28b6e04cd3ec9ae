// The ops that Python calls before it uses this library.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "combinations.h"
#include "kernels.h"
#include "launch.h"

namespace onepass::cuda {
namespace {

// Loads a small kernel on a device, as a launch would. All kernels are compiled for the same
// architectures, so the result holds for every kernel.
cudaError_t load_kernel(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error != cudaSuccess) return error;
  error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    // Loading a kernel may allocate memory, which would invalidate a CUDA graph capture in
    // progress.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error == cudaSuccess) {
      error = verify(kStepKernels.judge);
      cudaThreadExchangeStreamCaptureMode(&mode);
    }
  }
  if (device != before) cudaSetDevice(before);
  return error;
}

// Whether an error means that the library has no machine code or usable PTX for the device.
bool is_missing_code(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorNoKernelImageForDevice:
    // The library contains PTX that this driver cannot compile.
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
}

// A version as text, for example "9.0".
std::string with_dot(int first, int second) {
  return std::to_string(first) + "." + std::to_string(second);
}

// Returns (the reason why this library cannot run on a device, or an empty string; whether that
// result is valid for the lifetime of the process). It raises no CUDA error.
std::tuple<std::string, bool> cuda_support(int64_t device) {
  const int index = static_cast<int>(device);
  const cudaError_t error = load_kernel(index);
  if (error == cudaSuccess) return {"", true};
  const std::string name = std::string(" (") + cudaGetErrorName(error) + ")";
  if (error == cudaErrorInsufficientDriver)
    return {
        "the NVIDIA driver is too old for CUDA " +
            with_dot(CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10) +
            ", which onepass was built with" + name +
            ": update the driver, or rebuild onepass with an older CUDA toolkit",
        true};
  int major = 0, minor = 0;
  if (is_missing_code(error) &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index) == cudaSuccess) {
    const std::string capability = with_dot(major, minor);
    return {
        "the CUDA library has no code for the compute capability " + capability +
            " of cuda:" + std::to_string(index) + name +
            ": rebuild onepass from its sources with ONEPASS_CUDA_ARCH=" + capability,
        true};
  }
  return {
      "the kernels of the CUDA library do not load on cuda:" + std::to_string(index) + name + ": " +
          cudaGetErrorString(error),
      false};
}

// The op layout of csrc/ops.cpp for this library.
std::string cuda_layout() { return kLayout; }

// Why no GPU should run this library; empty unless it has only a sample of the kernels
// (combinations.h).
std::string cuda_refusal() {
  if (!kSample) return "";
  return "has only a sample of the kernels, because nvidia-smi listed no GPU where it was built: "
         "run make -B setup KERNELS=all";
}

}  // namespace

// The schemas are here, not in csrc/ops.cpp, because these ops take no tensor and therefore cannot
// be dispatched by device.
STABLE_TORCH_LIBRARY_FRAGMENT(onepass, m) {
  m.def("cuda_support(int device) -> (str reason, bool lasting)");
  m.def("cuda_layout() -> str");
  m.def("cuda_refusal() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(onepass, CompositeExplicitAutograd, m) {
  m.impl("cuda_support", TORCH_BOX(&cuda_support));
  m.impl("cuda_layout", TORCH_BOX(&cuda_layout));
  m.impl("cuda_refusal", TORCH_BOX(&cuda_refusal));
}

}  // namespace onepass::cuda
