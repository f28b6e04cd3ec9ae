// The table of formats. Python identifies a format by the same number (onepass/formats/<name>.py).
#pragma once

#include "bf16.h"
#include "blocks.h"
#include "dynamic8.h"
#include "fp16.h"
#include "random.h"
#include "weights.h"

namespace onepass {

// How a tensor stores its elements.
enum class Format : uint8_t {
  kFp32 = 0,
  kBf16 = 1,            // weights and gradients, rounded to nearest
  kFp16 = 2,            // weights and gradients, rounded to nearest
  kBf16Stochastic = 3,  // states and weights, rounded stochastically
  kFp16Stochastic = 4,  // weights, rounded stochastically
  kMx8 = 5,             // from here: states with one scale per block
  kMx4 = 6,
  kDynamic8 = 7,
  kKahanBf16 = 8,  // from here: weights with a companion
  kKahanFp16 = 9,
  kMasterBf16 = 10,
  kMasterFp16 = 11,
  kSplit16 = 12,
  kSplit8 = 13,
};

constexpr int kFormats = 14;

// The torch dtypes that formats use.
enum class Dtype : uint8_t { kNone, kFloat, kBFloat16, kHalf, kShort, kChar, kByte };

// The size of an element in bytes; 0 for kNone.
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

// The properties of a format.
struct FormatInfo {
  Dtype codes;      // dtype of the tensor of codes
  Dtype extra;      // dtype of the second tensor (scales, or the companion of a weight)
  int block;        // elements that share a scale; 1 if there are no scales
  int packed;       // codes per element of the tensor
  bool stochastic;  // whether encoding draws random bits
  bool state;       // whether it stores states
  bool weight;      // whether it stores weights
};

// The properties of each format. A switch rather than an array, because a constexpr array would be
// host memory, which kernels cannot read.
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

// Shorthands for two properties of a format.
constexpr int block_of(Format format) { return info_of(format).block; }
constexpr bool is_stochastic(Format format) { return info_of(format).stochastic; }

// The format of state k of a parameter whose states are in `format`. Bit k of weights says that the
// state is a weight, which is stored in fp32 instead of a format with blocks.
constexpr Format state_format(Format format, unsigned weights, int k) {
  return (weights >> k & 1) && block_of(format) > 1 ? Format::kFp32 : format;
}

// The format of the dtype that a weight in this format has in torch.
constexpr Format native_of(Format format) {
  const Dtype codes = info_of(format).codes;
  if (codes == Dtype::kFloat) return Format::kFp32;
  return codes == Dtype::kHalf ? Format::kFp16 : Format::kBf16;
}

// Bytes of the codes of n elements.
constexpr int64_t bytes_of(Format format, int64_t n) {
  const FormatInfo info = info_of(format);
  return (n + info.packed - 1) / info.packed * bytes_of(info.codes);
}

// Bytes of the scales or companions of n elements.
constexpr int64_t extra_bytes_of(Format format, int64_t n) {
  const FormatInfo info = info_of(format);
  return (n + info.block - 1) / info.block * bytes_of(info.extra);
}

// Each element has kRandomWords random words of 32 bits. A use is 16 of these bits, named by the
// position of the lowest: bit use % 32 of word use / 32. States have bits of their own. A weight
// takes bits of word 0 if a state draws too, because a second word would cost a second hash. Each
// bit that it shares with a state is one of the lower 8 of either use, where it hardly affects the
// rounding. split8 reads only the lower 8 of its bits.
constexpr int kRandomWords = 3;
constexpr int state_use(int k) { return k < 3 ? 16 * k : 64; }
constexpr int weight_use(Format format, bool states_draw) {
  if (format == Format::kSplit8) return 0;
  return states_draw ? 8 : 48;
}

}  // namespace onepass
