// What is used of DLPack 1, the standard by which tensors describe themselves to C. torch's own
// copy of its header is not among those that the stable ABI allows.
#pragma once

#include <cstdint>

namespace onepass {

enum DLDeviceType : int32_t { kDLCPU = 1, kDLCUDA = 2 };
enum DLDataTypeCode : uint8_t { kDLFloat = 2, kDLBfloat = 4 };

struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  const int64_t *shape, *strides;  // in elements
  uint64_t byte_offset;
};

}  // namespace onepass
