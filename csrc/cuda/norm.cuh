// The norm of the gradients in a chunk table: the sum of squares, the largest magnitude and the
// number of non-finite elements. Blocks take the chunks in a grid-stride loop, and the number of
// blocks depends only on the table and the device. All additions have a fixed order, so every run
// on one device gives the same bits.
#pragma once

#include "codecs.cuh"

namespace onepass::cuda {

// The partial result of one thread. largest holds the bits of a magnitude and ignores NaN; squares
// and nonfinite do not. There are two sums of squares so that consecutive additions are
// independent.
struct Found {
  double squares[2] = {};
  uint32_t largest = 0, nonfinite = 0;

  __device__ __forceinline__ void add(const float (&values)[kElements]) {
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      // The square of an fp32 is exact in float64, so the fma has only the rounding of the sum.
      const double wide = values[j];
      squares[j % 2] = __fma_rn(wide, wide, squares[j % 2]);
      most = max_u32(most, to_bits(values[j]) & kMagnitude);
    }
    if (most >= kInfinity) {
      most = 0;
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        const uint32_t magnitude = to_bits(values[j]) & kMagnitude;
        nonfinite += magnitude >= kInfinity;
        most = magnitude > kInfinity ? most : max_u32(most, magnitude);
      }
    }
    largest = max_u32(largest, most);
  }
  __device__ __forceinline__ Norm norm() const {
    return {
        squares[0] + squares[1], static_cast<double>(from_bits(largest)),
        static_cast<double>(nonfinite)};
  }
};

// Adds other to norm.
__device__ __forceinline__ void add_to(Norm& norm, const Norm& other) {
  norm.squares = norm.squares + other.squares;
  norm.largest = other.largest > norm.largest ? other.largest : norm.largest;
  norm.nonfinite = norm.nonfinite + other.nonfinite;
}

// Adds the norms of all threads of a block; thread 0 gets the result.
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

constexpr int kBatch = 4;  // loads that each thread issues before it uses the first

// Adds the gradient elements of one chunk.
template <Format F>
__device__ __forceinline__ void norm_chunk(const Chunk& chunk, const void* grads, Found& found) {
  constexpr int kBits = bits_of(F), kVector = 128 / kBits;
  constexpr int kRound = kTuning.threads * kElements;
  using C = Codes<kBits, kVector>;
  const char* grad = static_cast<const char*>(grads) + chunk.start * kBits / 8;
  const bool aligned = reinterpret_cast<uintptr_t>(grad) % 16 == 0;
  const auto lanes = [&](int offset) {
    return Lanes<kVector>{threadIdx.x % kWarp, chunk.count - offset};
  };
  const auto at = [&](int offset) {
    return C::template address<false>(grad, offset, lanes(offset));
  };
  const auto add = [&](const Raw& codes) {
    float values[kElements];
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = decode_one<F, false>(C::get(codes, j), 0);
    found.add(values);
  };
  int offset = static_cast<int>(threadIdx.x) / kWarp * kWarpElements;
#pragma unroll 1
  for (; aligned && offset + (kBatch - 1) * kRound + kWarpElements <= chunk.count;
       offset += kBatch * kRound) {
    Raw codes[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      C::template load<true>(at(offset + i * kRound), lanes(offset), codes[i]);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) add(codes[i]);
  }
#pragma unroll 1
  for (; offset < chunk.count; offset += kRound) {
    Raw codes;
    if (aligned && offset + kWarpElements <= chunk.count)
      C::template load<true>(at(offset), lanes(offset), codes);
    else
      C::template load<false>(at(offset), lanes(offset), codes);  // zeros beyond the end
    add(codes);
  }
}

// Block b of the grid takes chunks b, b + grid, ... and writes partial b.
__global__ void __launch_bounds__(kTuning.threads)
    norm_chunks(Tables tables, int64_t chunks, Norm* partials) {
  Found found;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const Chunk& chunk = tables.chunks[c];
    const void* grad = tables.grads[chunk.entry];
    switch (chunk.grad_format) {
      case Format::kFp32:
        norm_chunk<Format::kFp32>(chunk, grad, found);
        break;
      case Format::kBf16:
        norm_chunk<Format::kBf16>(chunk, grad, found);
        break;
      default:
        norm_chunk<Format::kFp16>(chunk, grad, found);
    }
  }
  Norm norm = found.norm();
  add_block(norm);
  if (threadIdx.x == 0) partials[blockIdx.x] = norm;
}

// Adds the partials; launched with one block.
__global__ void __launch_bounds__(kTuning.threads)
    norm_total(const Norm* partials, int64_t count, Norm* total) {
  Norm norm{0, 0, 0};
  for (int64_t p = threadIdx.x; p < count; p += kTuning.threads) add_to(norm, partials[p]);
  add_block(norm);
  if (threadIdx.x == 0) *total = norm;
}

}  // namespace onepass::cuda
