// Synchronization for launches on streams other than the one that a plan's tables were allocated
// on.
#pragma once

#include "launch.h"

namespace onepass::cuda {
namespace {

// Keeps a plan's tables alive until launches on side streams have finished. torch reuses freed
// memory on the stream that it was allocated on, which does not wait for other streams; the
// destructor of this class does. One event covers all side streams: each use makes its stream wait
// for the event before its launches, and records the event again after them. The number of streams
// therefore does not matter, and a stream may be destroyed at any time.
class SideStreams {
 public:
  explicit SideStreams(int device) : device_(device) {}
  SideStreams(const SideStreams&) = delete;
  SideStreams& operator=(const SideStreams&) = delete;

  // The destructor may run during garbage collection, while another thread captures a graph, and at
  // process exit, where the driver may be shutting down and calls return cudaErrorCudartUnloading.
  // It ignores errors because no caller can handle them.
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

  // A scope in which a plan launches on a side stream that is not being captured. The plan's device
  // must be the current one. A null streams makes it do nothing.
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
    // It raises no error, because the launches have already been made. If the event cannot be
    // recorded, it waits for the launches.
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
