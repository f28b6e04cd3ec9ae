// Telemetry besides the sweep. A sweep measures the chunks that it updates: see extras.cuh. These
// kernels measure the chunks of skipped rows before the sweep, which may zero their gradients, and
// add the chunks of each row after it. All additions have a fixed order.
#pragma once

#include "extras.cuh"

namespace onepass::cuda {

// Measures the chunk of each block if its row is skipped. It also sets the telemetry of all rows to
// NaN, which total_telemetry overwrites.
__global__ void __launch_bounds__(kTuning.threads) measure_skipped(Tables tables, int64_t rows) {
  for (int64_t row = blockIdx.x; row < rows && threadIdx.x == 0; row += gridDim.x) {
    const double nan = __builtin_nan("");
    tables.step.telemetry[row] = {nan, nan, nan, nan};
  }
  const Chunk& chunk = tables.chunks[blockIdx.x];
  if (tables.step.counters[2 * static_cast<int64_t>(chunk.row) + 1] != 0) return;
  const Any formats(chunk);
  char* grad = static_cast<char*>(const_cast<void*>(tables.grads[chunk.entry]));
  formats.grad([&](auto format) { grad += chunk.start * bits_of(decltype(format)::value) / 8; });
  clear_telemetry<kTuning.threads>();
#pragma unroll 1
  for (int offset = static_cast<int>(threadIdx.x) / kWarp * kWarpElements; offset < chunk.count;
       offset += kTuning.threads * kElements) {
    const Lanes<Any::kVector> lanes{threadIdx.x % kWarp, chunk.count - offset};
    measure_warp<false>(
        formats, chunk.param, {grad, nullptr}, offset, lanes,
        [](int, float before) { return before; });
  }
  leave_telemetry<kTuning.threads>(tables.partials + blockIdx.x);
}

// Adds the telemetry of the chunks of a row; launched with one block per row.
__global__ void __launch_bounds__(kTuning.threads)
    total_telemetry(Tables tables, const Span* spans) {
  const Span span = spans[blockIdx.x];
  const int row = static_cast<int>(blockIdx.x);
  constexpr int kTogether = kTuning.threads / kTelemetryWidth;  // chunks that are added at once
  const int column = static_cast<int>(threadIdx.x) % kTelemetryWidth;
  const auto* partials = reinterpret_cast<const double*>(tables.partials) + column;
  double sum = 0;
#pragma unroll 4
  for (int64_t c = span.first + threadIdx.x / kTelemetryWidth; c < span.end; c += kTogether)
    if (tables.chunks[c].row == row) sum += partials[c * kTelemetryWidth];
  __shared__ double sums[kTuning.threads];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kTelemetryWidth) return;
  for (int i = 1; i < kTogether; ++i) sum += sums[i * kTelemetryWidth + column];
  reinterpret_cast<double*>(tables.step.telemetry + row)[column] = sum;
}

}  // namespace onepass::cuda
