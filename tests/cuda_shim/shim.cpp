// Runs the threads of cuda_runtime.h as fibers, and defines the one function of torch's CUDA build
// that csrc/cuda needs.
#include <ucontext.h>

#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace shim {

Block now;
long launches = 0, blocks = 0, failed_votes = 0;
unsigned long long capture = 0;
std::vector<std::function<void()>> graph;
std::vector<Device> devices{{90, cudaSuccess}};
int device = 0;
cudaError_t driver = cudaSuccess;
std::map<cudaStream_t, Launches> streams;
Launches ended;
int events = 0;
Wait wait;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
bool capture_broken = false;

namespace {

constexpr size_t kStack = 256 << 10;
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool ended = true;
};
std::vector<Fiber> fibers;
cudaStream_t stream = nullptr;  // current stream
struct Failing {
  std::string call;
  int after;
  cudaError_t error;
};
Failing failing{"", 0, cudaSuccess};
ucontext_t scheduler;
const std::function<void()>* work;
Fiber* current;

void start() {
  (*work)();
  current->ended = true;
  now.moved = true;
}

void run_block() {
  const unsigned threads = now.threads.x;
  if (fibers.size() < threads) fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    fiber.ended = false;
    makecontext(&fiber.context, start, 0);
  }
  for (unsigned left = threads; left;) {
    now.moved = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t].ended) continue;
      now.thread.x = t;
      current = &fibers[t];
      swapcontext(&scheduler, &fibers[t].context);
      left -= fibers[t].ended;
    }
    if (left && !now.moved) {
      std::fprintf(stderr, "cuda shim: %u threads wait for others that have ended\n", left);
      std::abort();
    }
  }
}

}  // namespace

cudaError_t failure(const char* call) {
  if (failing.call != call || failing.after-- > 0) return cudaSuccess;
  failing.call.clear();
  return failing.error;
}

void give_way() {
  const unsigned thread = now.thread.x;
  Fiber* me = current;
  swapcontext(&me->context, &scheduler);
  now.thread.x = thread;
}

void run(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  ++launches;
  blocks += grid.x;
  work = &kernel;
  now.grid = grid;
  now.threads = threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    now.block.x = b;
    run_block();
    end_block();
  }
}

}  // namespace shim

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = shim::stream;
  return 0;
}
// Sets the number of devices. Each has compute capability 9.0 and runs kernels. Device 0 becomes
// current.
EXPORT void shim_devices(int count, int driver) {
  shim::devices.assign(count, {90, cudaSuccess});
  shim::device = 0;
  shim::driver = static_cast<cudaError_t>(driver);
}
EXPORT void shim_device(int device, int capability, int kernels) {
  shim::devices[device] = {capability, static_cast<cudaError_t>(kernels)};
}
// Makes a device and a stream current; stream 0 is the default stream.
EXPORT void shim_select(int device, intptr_t stream) {
  shim::device = device;
  shim::stream = reinterpret_cast<cudaStream_t>(stream);
}
// Makes the function `call` return an error once, after `after` calls that succeed.
EXPORT void shim_fail(const char* call, int after, int error) {
  shim::failing = {call, after, static_cast<cudaError_t>(error)};
}
// The number of launches on a stream that the host has not waited for.
EXPORT int shim_pending(intptr_t stream) {
  int count = 0;
  for (const long launch : shim::streams[reinterpret_cast<cudaStream_t>(stream)])
    count += !shim::ended.count(launch);
  return count;
}
// Moves the launches of a stream to another, as if the first was destroyed and its handle reused.
EXPORT void shim_rename_stream(intptr_t from, intptr_t to) {
  auto& launches = shim::streams[reinterpret_cast<cudaStream_t>(from)];
  shim::streams[reinterpret_cast<cudaStream_t>(to)].swap(launches);
  launches.clear();
}
EXPORT void shim_forget() {
  shim::streams.clear();
  shim::ended.clear();
  shim::wait = {};
  shim::capture_broken = false;
}
EXPORT int shim_events() { return shim::events; }
EXPORT int shim_wait_current() { return shim::wait.current; }
EXPORT int shim_wait_of() { return shim::wait.of; }
EXPORT int shim_capture_broken() { return shim::capture_broken; }
EXPORT int shim_mode() { return shim::mode; }
EXPORT int shim_current_device() { return shim::device; }
EXPORT long shim_launches() { return shim::launches; }
EXPORT long shim_blocks() { return shim::blocks; }
EXPORT long shim_failed_votes() { return shim::failed_votes; }
// Starts a capture of this number, or ends it if the number is 0. Launches are captured; copies are
// torch's own and run immediately.
EXPORT void shim_capture(unsigned long long number) {
  shim::capture = number;
  if (number) shim::graph.clear();
}
EXPORT void shim_replay() {
  for (const auto& kernel : shim::graph) kernel();
}
