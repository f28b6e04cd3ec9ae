// A stand-in for the CUDA runtime header, with which g++ compiles csrc/cuda unchanged. The threads
// of a block are fibers that switch only at synchronization points. The header has only the
// functions that csrc/cuda uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __builtin_assume(condition)
#define __shared__ static  // one copy: blocks run one after another

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline double __fma_rn(double x, double y, double z) { return __builtin_fma(x, y, z); }

namespace shim {

constexpr int kWarp = 32, kMostThreads = 1024;

// A synchronization point of threads.
struct Meeting {
  int arrived = 0, round = 0;
};
struct Warp {
  Meeting meeting;
  unsigned char values[kWarp][8];
};
struct Block {
  dim3 thread, block, grid, threads;
  Meeting meeting;
  Warp warps[kMostThreads / kWarp];
  bool moved = false;  // whether any thread made progress in this round of turns
};
extern Block now;
extern long launches, blocks;  // blocks of all launches
extern long failed_votes;      // the number of votes of a warp that were not unanimous

// The number of the active capture, or 0, and the launches that it recorded for a replay.
extern unsigned long long capture;
extern std::vector<std::function<void()>> graph;

void give_way();
void run(dim3 grid, dim3 threads, const std::function<void()>& kernel);

inline void meet(Meeting& meeting, int size) {
  const int round = meeting.round;
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.round;
    now.moved = true;
    return;
  }
  while (meeting.round == round) give_way();
}

// Bulk copies and their barriers: csrc/cuda/bulk_copy.cuh. The destination of a copy is overwritten
// when the copy starts, and gets its data only when a thread waits for a phase that has ended. A
// misuse prints a message and aborts.
void init_barrier(const void* barrier, unsigned arrivals);
void arrive(const void* barrier, unsigned bytes);
void wait_for(const void* barrier, unsigned parity);
void copy_bulk(void* to, const void* from, unsigned bytes, const void* barrier);
void fence_async();
// Called at the end of each block: every copy must have arrived.
void end_block();

}  // namespace shim

inline const dim3 &threadIdx = shim::now.thread, &blockIdx = shim::now.block;
inline const dim3 &gridDim = shim::now.grid, &blockDim = shim::now.threads;

inline void __syncthreads() {
  shim::meet(shim::now.meeting, static_cast<int>(shim::now.threads.x));
}

inline void __syncwarp() {
  shim::meet(shim::now.warps[threadIdx.x / shim::kWarp].meeting, shim::kWarp);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= 8, "one register or two");
  if (mask != ~0u) std::abort();
  const unsigned lane = threadIdx.x % shim::kWarp;
  shim::Warp& warp = shim::now.warps[threadIdx.x / shim::kWarp];
  std::memcpy(warp.values[lane], &value, sizeof value);
  shim::meet(warp.meeting, shim::kWarp);
  std::memcpy(&value, warp.values[lane ^ static_cast<unsigned>(distance)], sizeof value);
  shim::meet(warp.meeting, shim::kWarp);  // all threads read before any writes again
  return value;
}

inline bool __all_sync(unsigned mask, bool value) {
  int all = value;
  for (int distance = 1; distance < shim::kWarp; distance *= 2)
    all &= __shfl_xor_sync(mask, all, distance);
  shim::failed_votes += !all && threadIdx.x % shim::kWarp == 0;
  return all != 0;
}

// The threads of the stand-in run one at a time.
inline uint32_t atomicOr(uint32_t* to, uint32_t bits) {
  const uint32_t before = *to;
  *to = before | bits;
  return before;
}

// --- host API ---

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorCudartUnloading = 4,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidKernelImage = 200,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorJitCompilationDisabled = 223,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorStreamCaptureUnsupported = 900,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
constexpr int cudaSharedmemCarveoutMaxShared = 100;
struct cudaFuncAttributes {
  int numRegs = 0;
};
using cudaStream_t = struct CUstream_st*;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeRelaxed = 2 };
using cudaEvent_t = struct CUevent_st*;
constexpr unsigned cudaEventDisableTiming = 2;
struct cudaLaunchConfig_t {
  dim3 gridDim{}, blockDim{};
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace shim {

struct Device {
  int capability;       // compute capability: 10 * major + minor
  cudaError_t kernels;  // returned by loading a kernel
};
extern std::vector<Device> devices;
extern int device;          // current device
extern cudaError_t driver;  // returned by cudaGetDevice and cudaSetDevice

// Launches are numbered. A kernel runs immediately but counts as ended only after the host has
// waited for it. The set of a stream has its launches and those that it waits for: they precede its
// next event.
using Launches = std::set<long>;
extern std::map<cudaStream_t, Launches> streams;
extern Launches ended;
extern int events;  // number of events that were not destroyed

// The last wait of the host: the current device and the device of the event, -1 if none.
struct Wait {
  int current = -1, of = -1;
};
extern Wait wait;

// The capture mode of the only thread, and whether any call would have invalidated a capture.
extern cudaStreamCaptureMode mode;
extern bool capture_broken;

// The error that shim_fail set for this function, returned once; else cudaSuccess.
cudaError_t failure(const char* call);

inline bool breaks_capture() {
  const bool broken = capture && mode != cudaStreamCaptureModeRelaxed;
  capture_broken = capture_broken || broken;
  return broken;
}

}  // namespace shim

struct CUevent_st {
  int device;
  shim::Launches before;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = shim::device;
  return shim::driver;
}
// CPU tensors have device index -1 in torch; here they are on device 0.
inline cudaError_t cudaSetDevice(int device) {
  const int index = device < 0 ? 0 : device;
  if (index >= static_cast<int>(shim::devices.size())) return cudaErrorInvalidDevice;
  shim::device = index;
  return shim::driver;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const int capability = shim::devices[device].capability;
  *value = 1;  // one multiprocessor, so that a block of the norm processes several chunks
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = capability / 10;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return shim::devices[shim::device].kernels;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long* id) {
  *status = shim::capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  *id = shim::capture;
  return cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, shim::mode);
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st{shim::device, {}};
  ++shim::events;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  --shim::events;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (const cudaError_t error = shim::failure("cudaEventRecord")) return error;
  if (shim::capture) {
    shim::capture_broken = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  if (event->device != shim::device) return cudaErrorInvalidResourceHandle;
  event->before = shim::streams[stream];
  return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (const cudaError_t error = shim::failure("cudaStreamWaitEvent")) return error;
  if (shim::capture) {
    shim::capture_broken = true;
    return cudaErrorStreamCaptureUnsupported;
  }
  shim::streams[stream].insert(event->before.begin(), event->before.end());
  return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  shim::wait = {shim::device, event->device};
  if (const cudaError_t error = shim::failure("cudaEventSynchronize")) return error;
  if (shim::breaks_capture()) return cudaErrorStreamCaptureUnsupported;
  shim::ended.insert(event->before.begin(), event->before.end());
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  shim::wait = {shim::device, -1};
  if (shim::breaks_capture()) return cudaErrorStreamCaptureUnsupported;
  const shim::Launches& launches = shim::streams[stream];
  shim::ended.insert(launches.begin(), launches.end());
  return cudaSuccess;
}
inline const char* cudaGetErrorName(cudaError_t error) {
#define SHIM_NAME(NAME) \
  case NAME:            \
    return #NAME;
  switch (error) {
    SHIM_NAME(cudaSuccess)
    SHIM_NAME(cudaErrorCudartUnloading)
    SHIM_NAME(cudaErrorInvalidConfiguration)
    SHIM_NAME(cudaErrorInsufficientDriver)
    SHIM_NAME(cudaErrorInvalidDeviceFunction)
    SHIM_NAME(cudaErrorInvalidDevice)
    SHIM_NAME(cudaErrorInvalidKernelImage)
    SHIM_NAME(cudaErrorNoKernelImageForDevice)
    SHIM_NAME(cudaErrorInvalidPtx)
    SHIM_NAME(cudaErrorJitCompilerNotFound)
    SHIM_NAME(cudaErrorUnsupportedPtxVersion)
    SHIM_NAME(cudaErrorJitCompilationDisabled)
    SHIM_NAME(cudaErrorInvalidResourceHandle)
    SHIM_NAME(cudaErrorLaunchOutOfResources)
    SHIM_NAME(cudaErrorStreamCaptureUnsupported)
  }
#undef SHIM_NAME
  return "unknown error";
}
inline const char* cudaGetErrorString(cudaError_t) { return "an error of the shim"; }

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const unsigned threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads > shim::kMostThreads || threads % 32)
    return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = shim::failure("cudaLaunchKernelEx")) return error;
  const auto run = [grid = config->gridDim, block = config->blockDim, kernel, args...] {
    shim::run(grid, block, [&] { kernel(args...); });
  };
  if (shim::capture) {
    shim::graph.push_back(run);
    return cudaSuccess;
  }
  run();
  shim::streams[config->stream].insert(shim::launches);
  return cudaSuccess;
}
