// Fibers for cuda_runtime.h beside this file, and the one function that torch's CUDA build has.
#include <ucontext.h>

#include <memory>
#include <vector>

#include "cuda_runtime.h"

namespace shim {

Block now;
long launches = 0;
unsigned long long capture = 0;
std::vector<std::function<void()>> graph;
std::vector<Device> devices{{90, cudaSuccess}};
int device = 0;
cudaError_t driver = cudaSuccess;

namespace {

constexpr size_t kStack = 256 << 10;
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool ended = true;
};
std::vector<Fiber> fibers;
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

void give_way() {
  const unsigned thread = now.thread.x;
  Fiber* me = current;
  swapcontext(&me->context, &scheduler);
  now.thread.x = thread;
}

void run(dim3 grid, dim3 threads, const std::function<void()>& kernel) {
  ++launches;
  work = &kernel;
  now.grid = grid;
  now.threads = threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    now.block.x = b;
    run_block();
  }
}

}  // namespace shim

#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
// Sets the number of devices; each has capability 9.0 and runs kernels. Device 0 is the current
// one.
EXPORT void shim_devices(int count, int driver) {
  shim::devices.assign(count, {90, cudaSuccess});
  shim::device = 0;
  shim::driver = static_cast<cudaError_t>(driver);
}
EXPORT void shim_device(int device, int capability, int kernels) {
  shim::devices[device] = {capability, static_cast<cudaError_t>(kernels)};
}
EXPORT int shim_current_device() { return shim::device; }
EXPORT long shim_launches() { return shim::launches; }
// Captures launches, not copies: those are torch's own, and done at once.
EXPORT void shim_capture(unsigned long long number) {
  shim::capture = number;
  if (number) shim::graph.clear();
}
EXPORT void shim_replay() {
  for (const auto& kernel : shim::graph) kernel();
}
