// The one list of formats. Python names a format by this number (onepass/formats/__init__.py).
#pragma once

#include "bf16.h"
#include "blocks.h"
#include "dynamic8.h"
#include "fp16.h"
#include "random.h"
#include "weights.h"

namespace onepass {

enum class Format : uint8_t {
  kFp32 = 0,
  kBf16 = 1,            // nearest: weights, gradients
  kFp16 = 2,            // nearest: weights, gradients
  kBf16Stochastic = 3,  // states, weights
  kFp16Stochastic = 4,  // weights
  kMx8 = 5,             // states, with a scale for each block
  kMx4 = 6,
  kDynamic8 = 7,
  kKahanBf16 = 8,  // weights, with a companion
  kKahanFp16 = 9,
  kMasterBf16 = 10,
  kMasterFp16 = 11,
  kSplit16 = 12,
  kSplit8 = 13,
};

constexpr int kFormats = 14;

// Elements that share a scale; 1 where there is none.
constexpr int block_of(Format format) {
  if (format == Format::kDynamic8) return kDynamicBlock;
  return format == Format::kMx8 || format == Format::kMx4 ? kMxBlock : 1;
}

// The format of a weight's own dtype.
constexpr Format native_of(Format format) {
  switch (format) {
    case Format::kFp32:
      return Format::kFp32;
    case Format::kFp16:
    case Format::kFp16Stochastic:
    case Format::kKahanFp16:
    case Format::kMasterFp16:
      return Format::kFp16;
    default:
      return Format::kBf16;
  }
}

// Bytes of n elements of the tensor itself.
constexpr int64_t bytes_of(Format format, int64_t n) {
  switch (format) {
    case Format::kFp32:
      return 4 * n;
    case Format::kMx8:
    case Format::kDynamic8:
      return n;
    case Format::kMx4:
      return (n + 1) / 2;
    default:
      return 2 * n;
  }
}

// Bytes of what lies beside n elements: scales, or the companion of a weight.
constexpr int64_t extra_bytes_of(Format format, int64_t n) {
  switch (format) {
    case Format::kMx8:
    case Format::kMx4:
      return (n + kMxBlock - 1) / kMxBlock;
    case Format::kDynamic8:
      return (n + kDynamicBlock - 1) / kDynamicBlock * 4;
    case Format::kKahanBf16:
    case Format::kKahanFp16:
    case Format::kSplit16:
      return 2 * n;
    case Format::kMasterBf16:
    case Format::kMasterFp16:
      return 4 * n;
    case Format::kSplit8:
      return n;
    default:
      return 0;
  }
}

// Which 16 random bits of an element are used for what: use u is half u % 2 of word u / 2. split8
// needs 8 bits: the lowest of state 0's, which hardly decide how that state is rounded.
constexpr int kRandomWords = 3;
constexpr int weight_use(Format format) { return format == Format::kSplit8 ? 0 : 3; }
constexpr int state_use(int k) { return k < 3 ? k : k + 1; }

constexpr bool is_stochastic(Format format) {
  return format == Format::kBf16Stochastic || format == Format::kFp16Stochastic ||
         format == Format::kMx8 || format == Format::kMx4 || format == Format::kSplit8;
}

}  // namespace onepass
