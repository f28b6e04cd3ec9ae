// Every format on at most 32 consecutive elements, and on a tile, for one instruction set: see
// kernels_impl.h. With a constant length the compiler unrolls the loops completely, and values stay
// in registers between formats.
#pragma once

#include "convert.h"

namespace onepass::cpu {
namespace {

// --- floats ---

// Every format has load and store, which convert n elements from element first on to and from fp32.
// The last argument, roots, holds the square roots of second moments, which are the unit of
// relative moments in mx4; the other formats ignore it. kDraws: whether store draws random bits.

// fp32.
struct Fp32 {
  static constexpr bool kDraws = false;
  static constexpr Format kFormat = Format::kFp32;
  struct Code {
    ONEPASS_HD static uint32_t measure(float) { return 0; }
    ONEPASS_HD static uint32_t scale(uint32_t) { return 0; }
  };
  ONEPASS_HD static void units(float*, int, const float*) {}
  ONEPASS_HD static void store_scaled(
      const float* values, const Stored& at, int64_t first, int n, Random random, uint32_t,
      float*) {
    store(values, at, first, n, random, nullptr);
  }
  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float*) {
    const float* __restrict values = static_cast<const float*>(at.data) + first;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = values[i];
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random, float*) {
    float* __restrict out = static_cast<float*>(at.data) + first;
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = values[i];
  }
};

// The codes of bf16 and fp16. Half, Kahan and Master below take one of these as their template
// argument. round returns a code in the upper half of a word; encode returns it in the lower half.

// bf16, rounded to nearest, ties to even.
struct ToBf16 {
  static constexpr bool kDraws = false;
  static constexpr Format kFormat = Format::kBf16;
  ONEPASS_HD static float decode(uint32_t code) { return from_bits(code << 16); }
  ONEPASS_HD static uint32_t round(float value, uint32_t) { return round_bf16(value); }
  ONEPASS_HD static uint32_t encode(float value, uint32_t) { return round_bf16(value) >> 16; }
};
// bf16, rounded stochastically.
struct DitherBf16 : ToBf16 {
  static constexpr bool kDraws = true;
  static constexpr Format kFormat = Format::kBf16Stochastic;
  ONEPASS_HD static uint32_t round(float value, uint32_t random16) {
    return round_bf16_stochastic(value, random16);
  }
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16) {
    return round_bf16_stochastic(value, random16) >> 16;
  }
};
// bf16, rounded to nearest, ties away from zero.
struct AwayBf16 : ToBf16 {
  ONEPASS_HD static uint32_t encode(float value, uint32_t) { return round_half_away(value) >> 16; }
};
// fp16, rounded to nearest, ties to even.
struct ToFp16 {
  static constexpr bool kDraws = false;
  ONEPASS_HD static float decode(uint32_t code) { return decode_fp16(static_cast<uint16_t>(code)); }
  ONEPASS_HD static uint32_t encode(float value, uint32_t) { return encode_fp16(value); }
};
// fp16, rounded stochastically.
struct DitherFp16 : ToFp16 {
  static constexpr bool kDraws = true;
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16) {
    return encode_fp16_stochastic(value, random16 >> 3);
  }
};

// A 16-bit float without a companion.
template <class Code>
struct Half {
  static constexpr bool kDraws = Code::kDraws;
  static constexpr Format kFormat = Code::kFormat;
  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float*) {
    uint32_t codes[kStrip];
    convert(static_cast<const uint16_t*>(at.data) + first, codes, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = Code::decode(codes[i]);
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      float*) {
    uint32_t codes[kStrip];
#pragma omp simd
    for (int i = 0; i < n; ++i) codes[i] = Code::encode(values[i], kDraws ? random[i] : 0);
    convert(codes, static_cast<uint16_t*>(at.data) + first, n);
  }
};

// --- weights with a companion ---

// A 16-bit weight whose companion holds its rounding error in the same dtype.
template <class Code>
struct Kahan {
  static constexpr bool kDraws = false;
  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float*) {
    float rest[kStrip];
    Half<Code>::load(at, first, n, out, nullptr);
    Half<Code>::load({at.extra, nullptr}, first, n, rest, nullptr);
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = out[i] + rest[i];
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      float*) {
    float rest[kStrip];
#pragma omp simd
    for (int i = 0; i < n; ++i)
      rest[i] = left_over(values[i], Code::decode(Code::encode(values[i], 0)));
    Half<Code>::store(values, at, first, n, random, nullptr);
    Half<Code>::store(rest, {at.extra, nullptr}, first, n, random, nullptr);
  }
};

// A 16-bit weight whose companion is an fp32 master weight.
template <class Code>
struct Master {
  static constexpr bool kDraws = false;
  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float*) {
    uint32_t codes[kStrip];
    convert(static_cast<const uint16_t*>(at.data) + first, codes, n);
    const float* __restrict master = static_cast<const float*>(at.extra) + first;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      // A weight that differs from its rounded master was changed outside onepass and takes
      // precedence.
      const bool kept = (Code::encode(master[i], 0) & 0xFFFFu) == codes[i];
      out[i] = kept ? master[i] : Code::decode(codes[i]);
    }
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      float*) {
    Half<Code>::store(values, at, first, n, random, nullptr);
    Fp32::store(values, {at.extra, nullptr}, first, n, random, nullptr);
  }
};

// split16 and split8: a bf16 weight whose companion holds the lower bits of the fp32 value.
struct Split16Weight {
  static constexpr bool kDraws = false;
  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float*) {
    uint32_t codes[kStrip];
    int32_t low[kStrip];
    convert(static_cast<const uint16_t*>(at.data) + first, codes, n);
    convert(static_cast<const int16_t*>(at.extra) + first, low, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = decode_split16(codes[i], low[i]);
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random, float*) {
    uint32_t codes[kStrip];
    int32_t low[kStrip];
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const Split split = encode_split16(values[i]);
      codes[i] = split.weight;
      low[i] = static_cast<int32_t>(split.low);
    }
    convert(codes, static_cast<uint16_t*>(at.data) + first, n);
    convert(low, static_cast<int16_t*>(at.extra) + first, n);
  }
};

struct Split8Weight {
  static constexpr bool kDraws = true;
  static constexpr Format kFormat = Format::kSplit8;
  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float*) {
    uint32_t codes[kStrip];
    int32_t low[kStrip];
    convert(static_cast<const uint16_t*>(at.data) + first, codes, n);
    convert(static_cast<const int8_t*>(at.extra) + first, low, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) out[i] = decode_split8(codes[i], low[i]);
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      float*) {
    uint32_t codes[kStrip];
    int32_t low[kStrip];
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const Split split = encode_split8(values[i], random[i]);
      codes[i] = split.weight;
      low[i] = static_cast<int32_t>(split.low);
    }
    convert(codes, static_cast<uint16_t*>(at.data) + first, n);
    convert(low, static_cast<int8_t*>(at.extra) + first, n);
  }
};

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
    if (Format::kDraws) draw(random, use / 32, i, kStrip, words);
    Format::store(tile + i, dst, first + i, kStrip, {words, use % 32}, roots + i);
  }
  if (i < n) {
    if (Format::kDraws) draw(random, use / 32, i, n - i, words);
    Format::store(tile + i, dst, first + i, n - i, {words, use % 32}, roots + i);
  }
}

// dynamic8: a block is a whole tile.
template <bool Signed>
constexpr DynamicMap kDynamicMap = dynamic_map(Signed);

template <bool Signed>
void load_dynamic8(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint8_t* __restrict codes = static_cast<const uint8_t*>(src.data) + first;
  const float scale = static_cast<const float*>(src.extra)[first / kDynamicBlock];
  uint32_t wide[kTile];
  convert(codes, wide, n);
#pragma omp simd
  for (int i = 0; i < n; ++i)
    tile[i] = kDynamicMap<Signed>.values[static_cast<int32_t>(wide[i])] * scale;
}

template <bool Signed>
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
  uint32_t wide[kTile];
#pragma omp simd
  for (int i = 0; i < n; ++i)
    wide[i] = encode_dynamic<Signed>(div_rn(tile[i], divisor), kDynamicMap<Signed>);
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
      {FN##_dynamic8<true>, FN##_dynamic8<false>, FN##_dynamic8<true>},                            \
      {FN##_tile<Kahan<ToBf16>>},                                                                  \
      {FN##_tile<Kahan<ToFp16>>},                                                                  \
      {FN##_tile<Master<AwayBf16>>},                                                               \
      {FN##_tile<Master<ToFp16>>},                                                                 \
      {FN##_tile<Split16Weight>},                                                                  \
      {FN##_tile<Split8Weight>},                                                                   \
  }

}  // namespace onepass::cpu
