// Launches on the current stream of a device, and what a CUDA graph that is being captured asks
// for.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "tuning.h"

namespace onepass::cuda {
namespace {

#define ONEPASS_CUDA(CALL)                                                           \
  do {                                                                               \
    const cudaError_t error = (CALL);                                                \
    STD_TORCH_CHECK(                                                                 \
        error == cudaSuccess, "onepass: " #CALL ": ", cudaGetErrorName(error), ", ", \
        cudaGetErrorString(error));                                                  \
  } while (0)

class OnDevice {
 public:
  explicit OnDevice(int device) {
    ONEPASS_CUDA(cudaGetDevice(&before_));
    ONEPASS_CUDA(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// Within it the thread may allocate while it captures: a graph has no part in that.
class Relaxed {
 public:
  Relaxed() { ONEPASS_CUDA(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline cudaStream_t stream_of(int device) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  return static_cast<cudaStream_t>(current);
}

// The number of the capture that a stream is in; 0 outside of one.
inline unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  ONEPASS_CUDA(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// Whether a kernel has code for the current device; loads it there if it has.
template <class... Params>
cudaError_t verify(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

template <class... Params, class... Args>
void launch(cudaStream_t stream, void (*kernel)(Params...), unsigned blocks, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kTuning.threads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
  STD_TORCH_CHECK(
      error == cudaSuccess, "onepass: launching ", blocks, " blocks: ", cudaGetErrorName(error),
      ", ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace onepass::cuda
