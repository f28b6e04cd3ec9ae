// Bulk copies from global to shared memory, and the mbarriers that say when they have arrived: PTX
// of compute capability 9.0. A bulk copy is one instruction of one thread, and needs no registers
// for its data.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace onepass::cuda {

// The PTX is empty for older architectures, whose kernels do not call it.
#if defined(__CUDACC__)
#define ONEPASS_PTX(...) asm volatile(__VA_ARGS__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#undef ONEPASS_PTX
#define ONEPASS_PTX(...)
#endif

__device__ __forceinline__ uint32_t shared_address(const void* in_shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(in_shared));
}
#endif

// The same address in shared memory, in a register: the compiler would compute it anew at each use,
// which takes four instructions.
template <class T>
__device__ __forceinline__ T* keep_address(T* in_shared) {
#if defined(__CUDACC__)
  uint32_t address = shared_address(in_shared);
  asm("" : "+r"(address));
  return static_cast<T*>(__cvta_shared_to_generic(address));
#else
  return in_shared;
#endif
}

// A barrier in shared memory. A phase ends when the expected number of arrivals has come and all
// bytes that arrivals announced have been copied; then the next phase begins.
struct Mbarrier {
  uint64_t state;

  // Sets the number of arrivals per phase. One thread calls it, then fence_async(), before a
  // __syncthreads() that precedes every other use.
  __device__ __forceinline__ void init(unsigned arrivals) {
#if defined(__CUDACC__)
    ONEPASS_PTX(
        "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
        "r"(arrivals) : "memory");
#else
    shim::init_barrier(this, arrivals);
#endif
  }
  __device__ __forceinline__ void arrive() {
#if defined(__CUDACC__)
    ONEPASS_PTX("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
#else
    shim::arrive(this, 0);
#endif
  }
  // Announces the bytes of the copies that signal this barrier in the current phase, and arrives.
  __device__ __forceinline__ void arrive_expecting(unsigned bytes) {
#if defined(__CUDACC__)
    ONEPASS_PTX(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
        "r"(bytes) : "memory");
#else
    shim::arrive(this, bytes);
#endif
  }
  // Waits for the end of a phase: parity is the number of the phase modulo 2. Only the current and
  // the previous phase can be waited for.
  __device__ __forceinline__ void wait(unsigned parity) {
#if defined(__CUDACC__)
    uint32_t done = 1;
    do {
      ONEPASS_PTX(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}" : "=r"(done) : "r"(shared_address(this)),
          "r"(parity) : "memory");
    } while (!done);
#else
    shim::wait_for(this, parity);
#endif
  }
};

// Orders the accesses of this thread to shared memory, also to an Mbarrier, before later bulk
// copies into it.
__device__ __forceinline__ void fence_async() {
#if defined(__CUDACC__)
  ONEPASS_PTX("fence.proxy.async.shared::cta;" :: : "memory");
#else
  shim::fence_async();
#endif
}

// Copies bytes to shared memory; both addresses and the number must be multiples of 16. The end of
// the copy counts for a phase of the barrier that expects it.
__device__ __forceinline__ void copy_bulk(
    void* to, const void* from, unsigned bytes, Mbarrier& barrier) {
#if defined(__CUDACC__)
  ONEPASS_PTX(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(&barrier)) : "memory");
#else
  shim::copy_bulk(to, from, bytes, &barrier);
#endif
}

}  // namespace onepass::cuda
