// What a plan launches on other streams than the one that its tables were allocated on.
#pragma once

#include "launch.h"

namespace onepass::cuda {
namespace {

// torch hands freed memory to the stream that it was allocated on, which does not wait for other
// streams. The destructor waits for the launches on those. One event stands for all of them: each
// use waits for it, on the device, before its launches, and records it anew after them. So neither
// the number of streams matters nor whether one of them has been destroyed.
class SideStreams {
 public:
  explicit SideStreams(int device) : device_(device) {}
  SideStreams(const SideStreams&) = delete;
  SideStreams& operator=(const SideStreams&) = delete;

  // It may run when the interpreter collects garbage, also while another thread captures a graph,
  // and when the process ends: then the driver may be shutting down, and calls return
  // cudaErrorCudartUnloading. Errors are ignored, for nobody could handle them.
  ~SideStreams() {
    int before = 0;
    if (!last_ || cudaGetDevice(&before) != cudaSuccess) return;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    const bool relaxed = cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess;
    if (cudaSetDevice(device_) == cudaSuccess) {
      cudaEventSynchronize(last_);
      cudaEventDestroy(last_);
    }
    cudaSetDevice(before);
    if (relaxed) cudaThreadExchangeStreamCaptureMode(&mode);
  }

  // Exists while a plan launches on a side stream that is not being captured; the plan's device is
  // the current one. Does nothing where streams is null.
  class Use {
   public:
    Use(SideStreams* streams, cudaStream_t stream) : streams_(streams), stream_(stream) {
      if (!streams) return;
      if (streams->last_) {
        ONEPASS_CUDA(cudaStreamWaitEvent(stream, streams->last_, 0));
      } else {
        const Relaxed mode;
        ONEPASS_CUDA(cudaEventCreateWithFlags(&streams->last_, cudaEventDisableTiming));
      }
    }
    // Raises nothing: the launches have been made. Without the event it waits for them here.
    ~Use() {
      if (streams_ && cudaEventRecord(streams_->last_, stream_) != cudaSuccess)
        cudaStreamSynchronize(stream_);
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    SideStreams* streams_;
    cudaStream_t stream_;
  };

 private:
  int device_;
  cudaEvent_t last_ = nullptr;
};

}  // namespace
}  // namespace onepass::cuda
