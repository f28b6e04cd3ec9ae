// Kernel launches on the current stream of a device, and helpers for CUDA graph capture.
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

// Makes a device the current one for the lifetime of the object.
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

// Sets the relaxed capture mode for the lifetime of the object, so that allocations of this thread
// do not invalidate a graph capture.
class Relaxed {
 public:
  Relaxed() { ONEPASS_CUDA(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// The current stream of a device.
inline cudaStream_t stream_of(int device) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  return static_cast<cudaStream_t>(current);
}

// The ID of the graph capture of a stream; 0 if the stream is not being captured.
inline unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  ONEPASS_CUDA(cudaStreamGetCaptureInfo(stream, &status, &id));
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

// Loads a kernel on the current device; returns an error if it has no code for that device.
template <class... Params>
cudaError_t verify(void (*kernel)(Params...)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

// Gives a kernel the largest part of the L1 cache as shared memory, so that the stages of the ring
// of ring.cuh do not limit the resident blocks.
template <class... Params>
cudaError_t prefer_shared(void (*kernel)(Params...)) {
  return cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributePreferredSharedMemoryCarveout,
      cudaSharedmemCarveoutMaxShared);
}

// Lets a kernel have this much dynamic shared memory, also if that and its static shared memory
// exceed 48 KiB.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...), size_t bytes) {
  return cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
      static_cast<int>(bytes));
}

// A grid of blocks.
struct Grid {
  unsigned blocks;
  int threads = kTuning.threads;  // per block
  size_t shared = 0;              // bytes of dynamic shared memory per block
};

// Launches a kernel, or returns the error.
template <class... Params, class... Args>
cudaError_t try_launch(cudaStream_t stream, void (*kernel)(Params...), Grid grid, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Launches a kernel.
template <class... Params, class... Args>
void launch(cudaStream_t stream, void (*kernel)(Params...), Grid grid, Args... args) {
  const cudaError_t error = try_launch(stream, kernel, grid, args...);
  STD_TORCH_CHECK(
      error == cudaSuccess, "onepass: launching ", grid.blocks,
      " blocks: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

}  // namespace
}  // namespace onepass::cuda
