// The tables of dynamic8 on the device.
#pragma once

#include <cuda_runtime.h>

#include "../formats/dynamic8.h"

namespace onepass::cuda {

// In global memory, because lanes read different entries: constant memory would serialize the
// reads.
__device__ const DynamicMap kDynamicMaps[2] = {dynamic_map(false), dynamic_map(true)};

// The copy of a map in shared memory, which kernels with fixed formats make at their start and
// Quick reads.
template <bool Signed>
__device__ __forceinline__ DynamicMap& shared_map() {
  __shared__ DynamicMap map;
  return map;
}
// Makes that copy with a block of Threads threads. A __syncthreads() must follow.
template <bool Signed, int Threads>
__device__ __forceinline__ void share_map() {
  const auto* from = reinterpret_cast<const uint4*>(&kDynamicMaps[Signed]);
  auto* to = reinterpret_cast<uint4*>(&shared_map<Signed>());
  for (unsigned i = threadIdx.x; i < sizeof(DynamicMap) / sizeof(uint4); i += Threads)
    to[i] = from[i];
}
// The map that a sweep with this arithmetic reads.
template <bool Signed, bool Quick>
__device__ __forceinline__ const DynamicMap& map_of() {
  if constexpr (Quick)
    return shared_map<Signed>();
  else
    return kDynamicMaps[Signed];
}

}  // namespace onepass::cuda
