// The optional work of a sweep on the elements of a warp: the average of the weights, telemetry and
// the record of changed weights. It runs after the vote of the fast path and before the stores, so
// that the old weights are still in memory.
#pragma once

#include <cstring>

#include "aside.h"
#include "bulk_copy.cuh"
#include "dispatch.cuh"

namespace onepass::cuda {

template <int Threads>
__device__ __forceinline__ Aside<Threads>& aside() {
#if defined(__CUDA_ARCH__)
  extern __shared__ uint4 dynamic_shared[];
  return *reinterpret_cast<Aside<Threads>*>(dynamic_shared);
#else
  __shared__ Aside<Threads> all;
  return all;
#endif
}

// The address in shared memory of the part of Aside that belongs to a thread. Null if nothing is
// put aside; then put_aside does nothing.
template <int Threads>
struct AsideSlot {
  uint32_t address = 0;

  __device__ __forceinline__ explicit AsideSlot(bool exists) {
    if (!exists) return;
#if defined(__CUDA_ARCH__)
    address = shared_address(aside<Threads>().weights[0][threadIdx.x]);
#else
    address = 1;
#endif
  }
  // Keeps the address in a register, which saves the instructions that would compute it at each
  // use.
  __device__ __forceinline__ void keep() {
#if defined(__CUDA_ARCH__)
    asm("" : "+r"(address));
#endif
  }
};

// Stores the weights of a thread in Aside. The stores have a predicate: a branch would keep the
// compiler from overlapping the arithmetic before it with that after it.
template <int Threads>
__device__ __forceinline__ void put_aside(
    const float (&weights)[kElements], AsideSlot<Threads> slot) {
  static_assert(kElements == 8, "two parts");
#if defined(__CUDA_ARCH__)
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p, %0, 0;"
      "@p st.shared.v4.f32 [%0], {%2, %3, %4, %5};"
      "@p st.shared.v4.f32 [%0 + %1], {%6, %7, %8, %9};}" ::"r"(slot.address),
      "n"(Threads * 16), "f"(weights[0]), "f"(weights[1]), "f"(weights[2]), "f"(weights[3]),
      "f"(weights[4]), "f"(weights[5]), "f"(weights[6]), "f"(weights[7]));
#else
  for (int part = 0; slot.address && part < kElements / 4; ++part)
    memcpy(aside<Threads>().weights[part][threadIdx.x], weights + 4 * part, 4 * sizeof(float));
#endif
}

// The weights in Aside of four consecutive elements, by the position of the first relative to that
// of the warp.
template <class Formats>
__device__ __forceinline__ const float* aside_at(int position) {
  constexpr int kVector = Formats::kVector, kStretch = Lanes<kVector>::kStretch;
  const int lane = position % kStretch / kVector;
  const int part = (position / kStretch * kVector + position % kVector) / 4;
  return aside<Formats::kThreads>()
      .weights[part][static_cast<int>(threadIdx.x) / kWarp * kWarp + lane];
}

// Whether the code and companion of a weight have all bits of the value that they were made from.
constexpr bool is_exact(Format format) {
  return format == Format::kFp32 || format == Format::kSplit16 || format == Format::kMasterBf16 ||
         format == Format::kMasterFp16;
}
// put_aside from new codes and companions of an exact format.
template <Format F, class Formats>
__device__ __forceinline__ void put_aside(const Raw& codes, const Raw& companions) {
  constexpr int kVector = Formats::kVector;
  float weights[kElements];
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    const uint32_t companion = companion_at<F, kVector>(companions, j);
    weights[j] = bits_of(F) == 16 && companion_bits_of(F) == 32
                     ? from_bits(companion)
                     : decode_one<F, false>(Codes<bits_of(F), kVector>::get(codes, j), companion);
  }
  put_aside(weights, AsideSlot<Formats::kThreads>(true));
}

// The same number, in a way that the compiler does not see: it would otherwise compute addresses of
// optional work where they cost time without it.
__device__ __forceinline__ int hidden_from_compiler(int number) {
#if defined(__CUDA_ARCH__)
  asm("" : "+r"(number));
#endif
  return number;
}

// Called at the end of a branch, it keeps the compiler from merging the end with that of the other
// branch. After the merge, registers that only the other branch still has would be loaded again.
__device__ __forceinline__ void keep_apart() {
#if defined(__CUDA_ARCH__)
  asm volatile("");
#endif
}

// --- averages ---

// Updates the averages of 256 weights. If the vectors of the sweep have eight elements, a thread
// takes other elements here than there, so that each access covers contiguous memory. Full is that
// of load_warp.
template <bool Full, class Formats>
__device__ __forceinline__ void average_warp(
    float* average, const float* decays, const Lanes<Formats::kVector>& of_sweep, int offset) {
  const Lanes<4> lanes{of_sweep.lane, of_sweep.left};
  const float decay = decays[0], one_minus_decay = decays[1];
  // Loops, because their code is short.
  if (Full) {
#pragma unroll 1
    for (int part = 0; part < kElements / 4; ++part) {
      const int position = lanes.at(4 * part);
      float* const at = global(average + offset + position);
      const float* const weights = aside_at<Formats>(position);
      uint32_t words[4];
      Access<16>::template load_from<false>(at, words);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = to_bits(decay * from_bits(words[i]) + one_minus_decay * weights[i]);
      Access<16>::store_global(words, at);
    }
  } else {
#pragma unroll 1
    for (int j = 0; j < kElements; ++j) {
      const int position = lanes.at(j);
      float* const at = global(average + offset + position);
      const float weight = aside_at<Formats>(position / 4 * 4)[position % 4];
      if (lanes.has(j)) *at = decay * *at + one_minus_decay * weight;
    }
  }
}

// --- telemetry ---

// The telemetry of one thread.
struct Measured {
  double grads = 0, weights = 0, updates = 0;
  int nonfinite = 0;

  __device__ __forceinline__ void add(float grad, float before, float after) {
    square(grads, grad), square(weights, after), square(updates, after - before);
    nonfinite += (to_bits(grad) & kMagnitude) >= kInfinity;
  }
  // Adds the telemetry to that of the thread in Aside.
  template <int Threads>
  __device__ __forceinline__ void leave() const {
    double* const to = aside<Threads>().sums[threadIdx.x];
    to[0] += grads, to[1] += weights, to[2] += updates, to[3] += nonfinite;
  }

 private:
  __device__ __forceinline__ static void square(double& sum, float value) {
    // The square of an fp32 is exact in float64, so the fma has only the rounding of the sum.
    const double wide = value;
    sum = __fma_rn(wide, wide, sum);
  }
};

// The weights or gradients from an index of a tensor on: one, or four if the index is a multiple of
// 4 and the tensor starts at a multiple of 16 bytes.
template <Format F, int Count>
__device__ __forceinline__ void elements_at(const Stored& of, int index, float (&values)[Count]) {
  constexpr int kCode = bits_of(F) / 8, kCompanion = companion_bits_of(F) / 8;
  Raw codes, companions;
  Access<Count * kCode>::template load_from<false>(
      global(static_cast<const char*>(of.data) + index * kCode), codes);
  if constexpr (kCompanion > 0)
    Access<Count * kCompanion>::template load_from<false>(
        global(static_cast<const char*>(of.extra) + index * kCompanion), companions);
#pragma unroll
  for (int i = 0; i < Count; ++i)
    values[i] = decode_one<F, false>(
        Codes<bits_of(F), 4>::get(codes, i), companion_at<F, 4>(companions, i));
}

// Measures 256 elements. after(j, before) returns the weight of element j after the step; the
// weight before it is in memory. Full is that of load_warp.
template <bool Full, class Formats, class After>
__device__ __forceinline__ void measure_warp(
    const Formats& formats, const Stored& param, const Stored& grad, int offset,
    const Lanes<Formats::kVector>& lanes, const After& after) {
  constexpr int kTogether = Full ? 4 : 1;
  Measured measured;
  // A loop, because its code is short.
#pragma unroll 1
  for (int j = 0; j < kElements; j += kTogether) {
    if (!Full && !lanes.has(j)) continue;
    const int index = offset + lanes.at(j);
    float grads[kTogether] = {}, weights[kTogether] = {};
    formats.grad([&](auto format) { elements_at<decltype(format)::value>(grad, index, grads); });
    formats.param(
        [&](auto format) { elements_at<decltype(format)::value>(param, index, weights); });
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      measured.add(grads[i], weights[i], after(j + i, weights[i]));
  }
  measured.leave<Formats::kThreads>();
}

// Sets the telemetry of every thread to zero.
template <int Threads>
__device__ __forceinline__ void clear_telemetry() {
#pragma unroll
  for (int i = 0; i < kTelemetryWidth; ++i) aside<Threads>().sums[threadIdx.x][i] = 0;
}

// Adds the telemetry of all threads, in a fixed order, and writes it.
template <int Threads>
__device__ __forceinline__ void leave_telemetry(Telemetry* to) {
  static_assert(kTelemetryWidth <= kWarp && sizeof(Telemetry) == kTelemetryWidth * sizeof(double));
  // First the threads whose numbers differ by a multiple of kWarp, then the rest.
  const unsigned column = threadIdx.x % kTelemetryWidth, first = threadIdx.x / kTelemetryWidth;
  auto& sums = aside<Threads>().sums;
  __syncthreads();
  double sum = 0;
  if (first < kWarp) {
#pragma unroll 1
    for (unsigned t = first; t < Threads; t += kWarp) sum += sums[t][column];
    sums[first][column] = sum;
  }
  __syncthreads();
  if (first != 0) return;
#pragma unroll 1
  for (unsigned t = 1; t < kWarp; ++t) sum += sums[t][column];
  *global(reinterpret_cast<double*>(to) + column) = sum;
}

// --- changed weights ---

// Bit j is set if code j differs.
template <int Bits, int Vector>
ONEPASS_HD uint32_t differences(const Raw& before, const Raw& after) {
  using C = Codes<Bits, Vector>;
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < kElements; ++j) {
    const int bit = j % Vector * Bits, word = j / Vector * C::kWords + bit / 32;
    const uint32_t differs = (before[word] ^ after[word]) >> (bit % 32) & C::kMask;
    bits |= static_cast<uint32_t>(differs != 0) << j;
  }
  return bits;
}

// Sets the bits of 256 elements in the record of a parameter. bits has bit j for element j of the
// thread.
template <int Vector>
__device__ __forceinline__ void record_warp(
    const Chunk& chunk, const Lanes<Vector>& lanes, int offset, uint32_t bits) {
  const unsigned lane = lanes.lane;
  unsigned word;   // of the warp
  uint32_t found;  // its bits
  bool leads;      // whether this lane writes it
  if constexpr (Vector == 8) {
    found = bits << lane % 4 * 8;
    found |= __shfl_xor_sync(~0u, found, 1);
    found |= __shfl_xor_sync(~0u, found, 2);
    word = lane / 4, leads = lane % 4 == 0;
  } else {
    // Bits of the first vector in the lower half, of the second in the upper half.
    uint32_t both = ((bits & 0xFu) | bits >> 4 << 16) << lane % 4 * 4;
    both |= __shfl_xor_sync(~0u, both, 1);
    both |= __shfl_xor_sync(~0u, both, 2);
    const uint32_t other = __shfl_xor_sync(~0u, both, 4);
    const bool second = lane & 4;
    found = second ? select_bytes(other, both, 0x7632) : select_bytes(both, other, 0x5410);
    word = lane / 8 + (second ? 4 : 0), leads = lane % 4 == 0;
  }
  if (!leads || found == 0) return;
  // A chunk that starts at a multiple of 2^32 of an unsharded parameter may start inside a word,
  // which it then shares with the chunk before.
  uint32_t* to = global(chunk.changed + (static_cast<unsigned>(offset) / 32 + word));
  const unsigned shift = static_cast<unsigned>(chunk.start) % 32;
  atomicOr(to, found << shift);
  if (shift && found >> (32 - shift)) atomicOr(to + 1, found >> (32 - shift));
}

// Records which weights of a warp change. after has their new codes, which are not stored yet.
template <bool Full, class Formats>
__device__ __forceinline__ void record_changes(
    const Formats& formats, const Chunk& chunk, int offset, const Lanes<Formats::kVector>& lanes,
    const Raw& after) {
  formats.param([&](auto format) {
    constexpr int kBits = bits_of(decltype(format)::value), kVector = Formats::kVector;
    Raw before;
    using C = Codes<kBits, kVector>;
    C::template load<Full>(
        C::template address<Full>(chunk.param.data, offset, lanes), lanes, before);
    uint32_t bits = differences<kBits, kVector>(before, after);
    if (!Full) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) bits &= lanes.has(j) ? ~0u : ~(1u << j);
    }
    record_warp(chunk, lanes, offset, bits);
  });
}

}  // namespace onepass::cuda
