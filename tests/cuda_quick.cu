// Checks on a GPU that the square roots and quotients of csrc/cuda/fast_path.cuh have the bits of
// the compiler's correctly rounded ones if Quick::right() is true. Built and run by bench/gpu.sh.
#include <cstdio>

#include "../csrc/cuda/fast_path.cuh"

using onepass::from_bits;
using onepass::splitmix64;
using onepass::to_bits;
using Quick = onepass::cuda::Quick<false>;

namespace {

enum Kind { kRoots, kWithin, kFewBits, kAny, kByCodes, kKinds };
const char* const kNames[kKinds] = {
    "roots, all there are", "quotients within the bounds", "of few or nearly all bits",
    "of any bits at all", "by roots of mx4"};

__device__ unsigned long long tested[kKinds], wrong[kKinds];
__device__ uint32_t example[kKinds][2];

__device__ void report(Kind kind, bool same, uint32_t x, uint32_t y) {
  if (same) return;
  atomicAdd(&wrong[kind], 1ull);
  example[kind][0] = x, example[kind][1] = y;
}

__device__ uint64_t thread() { return blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; }
__device__ uint64_t threads() { return uint64_t{gridDim.x} * blockDim.x; }

__global__ void roots() {
  unsigned long long count = 0;
  for (uint64_t bits = thread(); bits <= 0xFFFFFFFFu; bits += threads()) {
    Quick quick;
    const float x = from_bits(static_cast<uint32_t>(bits)), root = quick.sqrt(x);
    // Rules divide by the root. The division makes right() false if the root is NaN.
    quick.div_by_root(1.0f, root);
    if (!quick.right()) continue;
    ++count;
    report(kRoots, to_bits(root) == to_bits(__fsqrt_rn(x)), to_bits(x), 0);
  }
  atomicAdd(&tested[kRoots], count);
}

// The bits with the exponent replaced by a random one between the lower bound of Quick and `most`.
__device__ uint32_t bounded(uint32_t bits, uint64_t random, uint32_t most) {
  constexpr uint32_t kFirst = (Quick::kLeast >> 23) + 1;
  const uint32_t span = (most >> 23) - kFirst;
  return (bits & 0x807FFFFFu) | (kFirst + static_cast<uint32_t>(random % span)) << 23;
}

// The bits with a random number of the lowest mantissa bits all set or all cleared.
__device__ uint32_t plain(uint32_t bits, uint64_t random) {
  const uint32_t lowest = (1u << (random & 31)) - 1 & 0x7FFFFFu;
  return random & 32 ? bits | lowest : bits & ~lowest;
}

__global__ void quotients(Kind kind, uint64_t pairs) {
  unsigned long long count = 0;
  for (uint64_t i = thread(); i < pairs; i += threads()) {
    const uint64_t both = splitmix64(i * kKinds + kind), more = splitmix64(~both);
    uint32_t x = static_cast<uint32_t>(both), y = static_cast<uint32_t>(both >> 32);
    if (kind == kFewBits) x = plain(x, more), y = plain(y, more >> 6);
    const uint32_t divisors = to_bits(Quick::kMostEps);
    y = y & 0x7FFFFFFFu;
    if (kind != kAny)
      x = bounded(x, more >> 12, Quick::kMost), y = bounded(y, more >> 36, divisors);
    // The other bounds of a divisor are those that Quick::covers tests.
    if (!Quick::covers(from_bits(y))) continue;
    Quick quick;
    const float quotient = quick.div_by_root(from_bits(x), from_bits(y));
    // A quotient that overflows makes the weight infinite or a NaN.
    if (!quick.right() || !isfinite(quotient)) continue;
    ++count;
    report(kind, to_bits(quotient) == to_bits(__fdiv_rn(from_bits(x), from_bits(y))), x, y);
  }
  atomicAdd(&tested[kind], count);
}

// Every number, divided by a random root that mx4 decodes: a power of two times 1 to 1.75.
__global__ void by_codes() {
  unsigned long long count = 0;
  for (uint64_t bits = thread(); bits <= 0xFFFFFFFFu; bits += threads()) {
    const uint64_t random = splitmix64(bits);
    const uint32_t exponent = onepass::kLowestRoot + static_cast<uint32_t>(random >> 8) % 94;
    const float x = from_bits(static_cast<uint32_t>(bits));
    const float y = from_bits(exponent << 23 | static_cast<uint32_t>(random & 3) << 21);
    Quick quick;
    const float quotient = quick.div_by_code(x, y);
    if (!quick.right()) continue;
    ++count;
    report(kByCodes, to_bits(quotient) == to_bits(__fdiv_rn(x, y)), to_bits(x), to_bits(y));
  }
  atomicAdd(&tested[kByCodes], count);
}

}  // namespace

int main() {
  constexpr int kBlocks = 1024, kThreads = 256;
  roots<<<kBlocks, kThreads>>>();
  by_codes<<<kBlocks, kThreads>>>();
  for (Kind kind : {kWithin, kFewBits, kAny})
    quotients<<<kBlocks, kThreads>>>(kind, uint64_t{1} << 36);
  unsigned long long counts[kKinds] = {}, errors[kKinds] = {};
  uint32_t bits[kKinds][2] = {};
  cudaError_t error = cudaDeviceSynchronize();
  if (error == cudaSuccess) error = cudaMemcpyFromSymbol(counts, tested, sizeof counts);
  if (error == cudaSuccess) error = cudaMemcpyFromSymbol(errors, wrong, sizeof errors);
  if (error == cudaSuccess) error = cudaMemcpyFromSymbol(bits, example, sizeof bits);
  if (error != cudaSuccess) {
    std::printf("%s\n", cudaGetErrorString(error));
    return 1;
  }
  bool passed = true;
  for (int kind = 0; kind < kKinds; ++kind) {
    std::printf("%s: %llu, wrong %llu", kNames[kind], counts[kind], errors[kind]);
    if (errors[kind]) std::printf(", as of %08x and %08x", bits[kind][0], bits[kind][1]);
    std::printf("\n");
    passed = passed && counts[kind] > 0 && errors[kind] == 0;
  }
  return passed ? 0 : 1;
}
