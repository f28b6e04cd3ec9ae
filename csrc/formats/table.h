// The list of formats, with a row for each. Python names a format by this number
// (onepass/formats/<name>.py).
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

// Element types of torch, as far as formats have them.
enum class Dtype : uint8_t { kNone, kFloat, kBFloat16, kHalf, kShort, kChar, kByte };

constexpr int bytes_of(Dtype type) {
  switch (type) {
    case Dtype::kNone:
      return 0;
    case Dtype::kFloat:
      return 4;
    case Dtype::kChar:
    case Dtype::kByte:
      return 1;
    default:
      return 2;
  }
}

// What the sweeps and the plan need to know of a format.
struct FormatInfo {
  Dtype codes;      // of the tensor itself
  Dtype extra;      // of what lies beside it: scales, or the companion of a weight
  int block;        // elements that share a scale; 1 where there is none
  int packed;       // codes in an element of the tensor
  bool stochastic;  // whether it draws random bits
  bool state;       // whether it stores states
  bool weight;      // whether it stores weights
};

// A switch and no array: kernels call it with constants, and an array would be the host's.
constexpr FormatInfo info_of(Format format) {
  using D = Dtype;
  switch (format) {  //              codes         extra        block packed stochastic state weight
    case Format::kFp32:
      return {D::kFloat, D::kNone, 1, 1, false, true, true};
    case Format::kBf16:
      return {D::kBFloat16, D::kNone, 1, 1, false, false, true};
    case Format::kFp16:
      return {D::kHalf, D::kNone, 1, 1, false, false, true};
    case Format::kBf16Stochastic:
      return {D::kBFloat16, D::kNone, 1, 1, true, true, true};
    case Format::kFp16Stochastic:
      return {D::kHalf, D::kNone, 1, 1, true, false, true};
    case Format::kMx8:
      return {D::kByte, D::kByte, kMxBlock, 1, true, true, false};
    case Format::kMx4:
      return {D::kChar, D::kByte, kMxBlock, 2, true, true, false};
    case Format::kDynamic8:
      return {D::kByte, D::kFloat, kDynamicBlock, 1, false, true, false};
    case Format::kKahanBf16:
      return {D::kBFloat16, D::kBFloat16, 1, 1, false, false, true};
    case Format::kKahanFp16:
      return {D::kHalf, D::kHalf, 1, 1, false, false, true};
    case Format::kMasterBf16:
      return {D::kBFloat16, D::kFloat, 1, 1, false, false, true};
    case Format::kMasterFp16:
      return {D::kHalf, D::kFloat, 1, 1, false, false, true};
    case Format::kSplit16:
      return {D::kBFloat16, D::kShort, 1, 1, false, false, true};
    case Format::kSplit8:
      return {D::kBFloat16, D::kChar, 1, 1, true, false, true};
  }
  return {};
}

constexpr int block_of(Format format) { return info_of(format).block; }
constexpr bool is_stochastic(Format format) { return info_of(format).stochastic; }

// The format of a weight's own dtype.
constexpr Format native_of(Format format) {
  const Dtype codes = info_of(format).codes;
  if (codes == Dtype::kFloat) return Format::kFp32;
  return codes == Dtype::kHalf ? Format::kFp16 : Format::kBf16;
}

// Bytes of n elements of the tensor itself.
constexpr int64_t bytes_of(Format format, int64_t n) {
  const FormatInfo info = info_of(format);
  return (n + info.packed - 1) / info.packed * bytes_of(info.codes);
}

// Bytes of what lies beside n elements.
constexpr int64_t extra_bytes_of(Format format, int64_t n) {
  const FormatInfo info = info_of(format);
  return (n + info.block - 1) / info.block * bytes_of(info.extra);
}

// Which 16 random bits of an element are used for what: use u is half u % 2 of word u / 2. split8
// needs 8 bits: the lowest of state 0's, which hardly decide how that state is rounded.
constexpr int kRandomWords = 3;
constexpr int weight_use(Format format) { return format == Format::kSplit8 ? 0 : 3; }
constexpr int state_use(int k) { return k < 3 ? k : k + 1; }

}  // namespace onepass
