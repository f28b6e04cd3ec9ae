// The norm of the gradients in a chunk table: sum of squares, largest magnitude, and how many are
// not finite. Blocks take the chunks in turn, a number of them that only the device decides, and
// everything is added in one order: the same bits at every run on one device.
#pragma once

#include "codecs.cuh"

namespace onepass::cuda {

// A NaN is passed over by the largest; it shows in the other two.
__device__ __forceinline__ void add_to(Norm& norm, float value) {
  const double wide = value;
  const float magnitude = from_bits(to_bits(value) & kMagnitude);
  norm.squares = norm.squares + wide * wide;
  norm.largest = magnitude > norm.largest ? magnitude : norm.largest;
  norm.nonfinite += is_finite(value) ? 0 : 1;
}

__device__ __forceinline__ void add_to(Norm& norm, const Norm& other) {
  norm.squares = norm.squares + other.squares;
  norm.largest = other.largest > norm.largest ? other.largest : norm.largest;
  norm.nonfinite = norm.nonfinite + other.nonfinite;
}

// The sum of what all threads of a block have, in thread 0.
__device__ __forceinline__ void add_block(Norm& norm) {
  __shared__ Norm warps[kTuning.threads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int distance = kWarp / 2; distance; distance /= 2) {
    const Norm other{
        __shfl_xor_sync(~0u, norm.squares, distance), __shfl_xor_sync(~0u, norm.largest, distance),
        __shfl_xor_sync(~0u, norm.nonfinite, distance)};
    add_to(norm, other);
  }
  if (lane == 0) warps[warp] = norm;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kTuning.threads / kWarp; ++w) add_to(norm, warps[w]);
}

template <Format F>
__device__ __forceinline__ void norm_chunk(const Chunk& chunk, const void* grads, Norm& norm) {
  constexpr int kBits = bits_of(F), kVector = 128 / kBits;
  using C = Codes<kBits, kVector>;
  const char* grad = static_cast<const char*>(grads) + chunk.start * kBits / 8;
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int offset = warp * kWarpElements; offset < chunk.count;
       offset += kTuning.threads * kElements) {
    const Lanes<kVector> lanes{static_cast<int>(threadIdx.x) % kWarp, chunk.count - offset};
    const char* at = grad + int64_t{offset} * kBits / 8;
    Raw codes;
    if (aligned && lanes.left >= kWarpElements)
      C::template load<true>(at, lanes, codes);
    else
      C::template load<false>(at, lanes, codes);  // zeros beyond the end
#pragma unroll
    for (int j = 0; j < kElements; ++j) add_to(norm, decode_one<F>(C::get(codes, j), 0));
  }
}

// Block b of the grid takes chunks b, b + grid, ... and writes partial b.
__global__ void __launch_bounds__(kTuning.threads)
    norm_chunks(Tables tables, int64_t chunks, Norm* partials) {
  Norm norm{0, 0, 0};
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const Chunk& chunk = tables.chunks[c];
    const void* grad = tables.grads[chunk.entry];
    switch (chunk.grad_format) {
      case Format::kFp32:
        norm_chunk<Format::kFp32>(chunk, grad, norm);
        break;
      case Format::kBf16:
        norm_chunk<Format::kBf16>(chunk, grad, norm);
        break;
      default:
        norm_chunk<Format::kFp16>(chunk, grad, norm);
    }
  }
  add_block(norm);
  if (threadIdx.x == 0) partials[blockIdx.x] = norm;
}

// One block adds the partials.
__global__ void __launch_bounds__(kTuning.threads)
    norm_total(const Norm* partials, int64_t count, Norm* total) {
  Norm norm{0, 0, 0};
  for (int64_t p = threadIdx.x; p < count; p += kTuning.threads) add_to(norm, partials[p]);
  add_block(norm);
  if (threadIdx.x == 0) *total = norm;
}

}  // namespace onepass::cuda
