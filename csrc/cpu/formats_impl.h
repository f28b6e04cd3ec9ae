// The block formats of a strip, and all formats of a tile, for one instruction set: see
// kernels_impl.h.
#pragma once

#include "floats_impl.h"

namespace onepass::cpu {
namespace {

// --- blocks ---

// The bits of the minimum of 32 values >= 0.
ONEPASS_HD uint32_t least_of(const float* __restrict values) {
  uint32_t least = ~0u;
#pragma omp simd reduction(min : least)
  for (int i = 0; i < kMxBlock; ++i) {
    const uint32_t bits = to_bits(values[i]);
    least = bits < least ? bits : least;
  }
  return least;
}

// The scale of a block.
template <class Code>
ONEPASS_HD uint32_t scale_of(const float* __restrict values, int n) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = max_u32(largest, Code::measure(values[i]));
  if constexpr (Code::kTakesLeast) {
    return Code::scale(largest, n < kMxBlock ? 0 : least_of(values));
  } else {
    return Code::scale(largest);
  }
}

// The codes of a block.
template <class Code>
ONEPASS_HD void encode_block(
    const float* __restrict values, int n, Random random, uint32_t scale,
    uint32_t* __restrict codes) {
  if (__builtin_expect(scale == kNotFinite, 0)) {
    for (int i = 0; i < n; ++i) codes[i] = Code::kNan;
  } else {
    const auto encoder = Code::encoder(scale);
#pragma omp simd
    for (int i = 0; i < n; ++i) codes[i] = Code::encode(values[i], random[i], encoder);
  }
}

// mx8.
template <Kind Of>
struct Mx8State {
  static constexpr bool kDraws = true;
  static constexpr Format kFormat = Format::kMx8;
  using Code = Mx8<Of>;

  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float*) {
    uint32_t codes[kStrip];
    convert(static_cast<const uint8_t*>(at.data) + first, codes, n);
    const uint32_t scale = static_cast<const uint8_t*>(at.extra)[first / kMxBlock];
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = Code::decode(codes[i], scale);
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      float*) {
    const uint32_t scale = scale_of<Code>(values, n);
    uint32_t codes[kStrip];
    encode_block<Code>(values, n, random, scale, codes);
    static_cast<uint8_t*>(at.extra)[first / kMxBlock] = static_cast<uint8_t>(scale);
    convert(codes, static_cast<uint8_t*>(at.data) + first, n);
  }
};

// mx4: two codes per byte, element 2i in the lower half of byte i.
template <Kind Of>
struct Mx4State {
  static constexpr bool kDraws = true;
  static constexpr Format kFormat = Format::kMx4;
  using Code = Mx4<Of>;

  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float* roots) {
    const uint8_t* __restrict bytes = static_cast<const uint8_t*>(at.data) + first / 2;
    const uint32_t scale = static_cast<const uint8_t*>(at.extra)[first / kMxBlock];
    uint8_t nibbles[kStrip];
    uint32_t codes[kStrip];
    split_nibbles(bytes, nibbles, (n + 1) / 2);
    convert(nibbles, codes, n);
    values(codes, scale, n, out, roots);
  }
  // Decodes n codes. A second moment writes root; a relative moment reads it.
  ONEPASS_HD static void values(
      const uint32_t* __restrict codes, uint32_t scale, int n, float* __restrict out,
      float* __restrict root) {
    const auto decoder = Code::decoder(scale);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float value = Code::decode(codes[i], decoder);
      if (Of == kSecond) root[i] = value;
      if (Of == kSecond) out[i] = value * value;
      if (Of == kRelative) out[i] = value * (root[i] == 0.0f ? 1.0f : root[i]);
      if (Of == kFirst) out[i] = value;
    }
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      float* __restrict roots) {
    float scaled[kStrip];
    uint32_t codes[kStrip] = {};
#pragma omp simd
    for (int i = 0; i < n; ++i) scaled[i] = values[i];
    units(scaled, n, roots);
    const uint32_t scale = scale_of<Code>(scaled, n);
    encode_block<Code>(scaled, n, random, scale, codes);
    static_cast<uint8_t*>(at.extra)[first / kMxBlock] = static_cast<uint8_t>(scale);
    if (Of == kSecond) {
      const auto decoder = Code::decoder(scale);
#pragma omp simd
      for (int i = 0; i < n; ++i) roots[i] = Code::decode(codes[i], decoder);
    }
    join_nibbles(codes, static_cast<uint8_t*>(at.data) + first / 2, (n + 1) / 2);
  }
  // Replaces the values by the numbers that the format codes: the square root of a second moment,
  // or a relative moment divided by that root.
  ONEPASS_HD static void units(float* __restrict values, int n, const float* __restrict roots) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      if (Of == kSecond) values[i] = sqrt_rn(values[i]);
      if (Of == kRelative) values[i] = ratio(values[i], roots[i]);
    }
  }
};

// --- tiles ---

// Decodes and encodes a tile strip by strip: DecodeFn and EncodeFn of kernels.h.
template <class Format>
void load_tile(const Stored& src, int64_t first, int n, float* __restrict tile, float* roots) {
  int i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    Format::load(src, first + i, kStrip, tile + i, roots + i);
  }
  if (i < n) Format::load(src, first + i, n - i, tile + i, roots + i);
}

template <class Format>
void store_tile(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom& random,
    int use, float* roots) {
  uint32_t words[kStrip];
  int i = 0;
  for (; i + kStrip <= n; i += kStrip) {
    if (Format::kDraws) draw(random, use / 2, i, kStrip, words);
    Format::store(tile + i, dst, first + i, kStrip, {words, use % 2 * 16}, roots + i);
  }
  if (i < n) {
    if (Format::kDraws) draw(random, use / 2, i, n - i, words);
    Format::store(tile + i, dst, first + i, n - i, {words, use % 2 * 16}, roots + i);
  }
}

// dynamic8: a block is a whole tile.
constexpr DynamicMap kDynamicSigned = dynamic_map(true), kDynamicUnsigned = dynamic_map(false);

template <const DynamicMap& Map>
void load_dynamic8(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint8_t* __restrict codes = static_cast<const uint8_t*>(src.data) + first;
  const float scale = static_cast<const float*>(src.extra)[first / kDynamicBlock];
  uint32_t wide[kTile];
  convert(codes, wide, n);
#pragma omp simd
  for (int i = 0; i < n; ++i) tile[i] = Map.values[static_cast<int32_t>(wide[i])] * scale;
}

template <const DynamicMap& Map>
void store_dynamic8(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom&, int,
    float*) {
  uint8_t* __restrict codes = static_cast<uint8_t*>(dst.data) + first;
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = max_u32(largest, to_bits(tile[i]) & kMagnitude);
  const bool finite = largest < kInfinity;
  static_cast<float*>(dst.extra)[first / kDynamicBlock] = from_bits(finite ? largest : 0x7FC00000u);
  const float divisor = largest == 0 ? 1.0f : from_bits(largest);
  if (!finite) {
    __builtin_memset(codes, 0, n);
    return;
  }
  int32_t wide[kTile];
#pragma omp simd
  for (int i = 0; i < n; ++i) wide[i] = encode_dynamic(div_rn(tile[i], divisor), Map);
  convert(wide, codes, n);
}

}  // namespace

// The table of decode or encode functions; FN is load or store. Rows are in the order of Format,
// and columns are kFirst, kSecond and kRelative; weights and gradients use kFirst. The row of fp32
// is empty, because the rule works directly on the tensor.
#define ONEPASS_ALIKE(FN) {FN, FN, FN}
#define ONEPASS_FORMATS(FN)                                                                        \
  {                                                                                                \
      {},                                                                                          \
      ONEPASS_ALIKE(FN##_tile<Half<ToBf16>>),                                                      \
      ONEPASS_ALIKE(FN##_tile<Half<ToFp16>>),                                                      \
      ONEPASS_ALIKE(FN##_tile<Half<DitherBf16>>),                                                  \
      ONEPASS_ALIKE(FN##_tile<Half<DitherFp16>>),                                                  \
      {FN##_tile<Mx8State<kFirst>>, FN##_tile<Mx8State<kSecond>>, FN##_tile<Mx8State<kFirst>>},    \
      {FN##_tile<Mx4State<kFirst>>, FN##_tile<Mx4State<kSecond>>, FN##_tile<Mx4State<kRelative>>}, \
      {FN##_dynamic8<kDynamicSigned>, FN##_dynamic8<kDynamicUnsigned>,                             \
       FN##_dynamic8<kDynamicSigned>},                                                             \
      {FN##_tile<Kahan<ToBf16>>},                                                                  \
      {FN##_tile<Kahan<ToFp16>>},                                                                  \
      {FN##_tile<Master<AwayBf16>>},                                                               \
      {FN##_tile<Master<ToFp16>>},                                                                 \
      {FN##_tile<Split16Weight>},                                                                  \
      {FN##_tile<Split8Weight>},                                                                   \
  }

}  // namespace onepass::cpu
