// The formats over a strip of at most 32 elements, for one instruction set: see kernels_impl.h.
// Strips begin at multiples of 32, so that one is a block of mx8 or mx4. A length that is a
// constant leaves fully unrolled vector code, which works in registers where several formats meet.
#pragma once

#include "kernels.h"

namespace onepass::cpu {
namespace {

constexpr int kStrip = kMxBlock;

// --- narrow codes ---

// Apart from the arithmetic: a vectoriser fills its widest vectors with the narrowest type of a
// loop, and takes everything else apart to match.
template <class To, class From>
ONEPASS_HD void convert(const From* __restrict from, To* __restrict to, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

// --- random bits ---

// The words of the generator for a strip that begins offset elements into the tile.
ONEPASS_HD void draw(
    const TileRandom& random, int word, int offset, int n, uint32_t* __restrict words) {
  const RandomKey key = random.keys[word];
  const uint32_t start = random_start(key, random.low + static_cast<uint32_t>(offset));
#pragma omp simd
  for (int i = 0; i < n; ++i) words[i] = random_mix(key, start + static_cast<uint32_t>(i) * kWeyl);
}

// The 16 bits of one use: its half of the words.
struct Random {
  const uint32_t* words;
  int shift;
  ONEPASS_HD uint32_t operator[](int i) const { return words[i] >> shift & 0xFFFFu; }
};

// --- floats ---

// Every format has load and store: n elements from element first on, to and from fp32. roots is
// what mx4 measures first moments in.
struct Fp32 {
  static constexpr bool kDraws = false;
  static constexpr Format kFormat = Format::kFp32;
  struct Code {
    ONEPASS_HD static uint32_t measure(float) { return 0; }
    ONEPASS_HD static uint32_t scale(uint32_t) { return 0; }
  };
  ONEPASS_HD static void store_scaled(
      const float* values, const Stored& at, int64_t first, int n, Random random, uint32_t) {
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

struct ToBf16 {
  static constexpr bool kDraws = false;
  static constexpr Format kFormat = Format::kBf16;
  ONEPASS_HD static float decode(uint32_t code) { return from_bits(code << 16); }
  ONEPASS_HD static uint32_t encode(float value, uint32_t) { return round_bf16(value) >> 16; }
};
struct DitherBf16 : ToBf16 {
  static constexpr bool kDraws = true;
  static constexpr Format kFormat = Format::kBf16Stochastic;
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16) {
    return round_bf16_stochastic(value, random16) >> 16;
  }
};
struct AwayBf16 : ToBf16 {
  ONEPASS_HD static uint32_t encode(float value, uint32_t) { return round_half_away(value) >> 16; }
};
struct ToFp16 {
  static constexpr bool kDraws = false;
  ONEPASS_HD static float decode(uint32_t code) { return decode_fp16(static_cast<uint16_t>(code)); }
  ONEPASS_HD static uint32_t encode(float value, uint32_t) { return encode_fp16(value); }
};
struct DitherFp16 : ToFp16 {
  static constexpr bool kDraws = true;
  ONEPASS_HD static uint32_t encode(float value, uint32_t random16) {
    return encode_fp16_stochastic(value, random16 >> 3);
  }
};

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
      // A weight that is no longer its rounded master was changed from outside, and counts.
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

// The scale of a block.
template <class Code>
ONEPASS_HD uint32_t scale_of(const float* __restrict values, int n) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = max_u32(largest, Code::measure(values[i]));
  return Code::scale(largest);
}

// The codes of a block.
template <class Code>
ONEPASS_HD void encode_block(
    const float* __restrict values, int n, Random random, uint32_t scale,
    uint32_t* __restrict codes) {
  if (__builtin_expect(scale == kNotFinite, 0)) {
    for (int i = 0; i < n; ++i) codes[i] = Code::not_finite(values[i]);
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) codes[i] = Code::encode(values[i], random[i], scale);
  }
}

template <Kind Of>
struct Mx8State {
  static constexpr bool kDraws = true;
  static constexpr Format kFormat = Format::kMx8;
  using Code = Mx8<Of == kSecond>;

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
    store_scaled(values, at, first, n, random, scale_of<Code>(values, n));
  }
  ONEPASS_HD static void store_scaled(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      uint32_t scale) {
    uint32_t codes[kStrip];
    encode_block<Code>(values, n, random, scale, codes);
    static_cast<uint8_t*>(at.extra)[first / kMxBlock] = static_cast<uint8_t>(scale);
    convert(codes, static_cast<uint8_t*>(at.data) + first, n);
  }
};

// Two codes in a byte, element 2i in the lower half of byte i.
template <Kind Of>
struct Mx4State {
  static constexpr bool kDraws = true;
  static constexpr Format kFormat = Format::kMx4;
  using Code = Mx4<Of == kSecond>;

  ONEPASS_HD static void load(
      const Stored& at, int64_t first, int n, float* __restrict out, float* roots) {
    const uint8_t* __restrict bytes = static_cast<const uint8_t*>(at.data) + first / 2;
    const uint32_t scale = static_cast<const uint8_t*>(at.extra)[first / kMxBlock];
    float* __restrict root = roots;
    uint8_t twice[kStrip];
    uint32_t codes[kStrip];
    for (int i = 0; i < (n + 1) / 2; ++i) {
      twice[2 * i] = bytes[i] & 15u;
      twice[2 * i + 1] = bytes[i] >> 4;
    }
    convert(twice, codes, n);
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const float value = Code::decode(codes[i], scale);
      if (Of == kSecond) root[i] = value;
      if (Of == kSecond) out[i] = value * value;
      if (Of == kRelative) out[i] = value * (root[i] == 0.0f ? 1.0f : root[i]);
      if (Of == kFirst) out[i] = value;
    }
  }
  ONEPASS_HD static void store(
      const float* __restrict values, const Stored& at, int64_t first, int n, Random random,
      float* roots) {
    float units[kStrip];
    uint32_t codes[kStrip] = {};
    float* __restrict root = roots;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      if (Of == kSecond) units[i] = sqrt_rn(values[i]);
      if (Of == kRelative) units[i] = div_rn(values[i], root[i] == 0.0f ? 1.0f : root[i]);
      if (Of == kFirst) units[i] = values[i];
    }
    const uint32_t scale = scale_of<Code>(units, n);
    encode_block<Code>(units, n, random, scale, codes);
    static_cast<uint8_t*>(at.extra)[first / kMxBlock] = static_cast<uint8_t>(scale);
    if (Of == kSecond) {
#pragma omp simd
      for (int i = 0; i < n; ++i) root[i] = Code::decode(codes[i], scale);
    }
    uint8_t* __restrict bytes = static_cast<uint8_t*>(at.data) + first / 2;
    uint8_t single[kStrip] = {};
    convert(codes, single, n);
    for (int i = 0; i < (n + 1) / 2; ++i)
      bytes[i] = static_cast<uint8_t>(single[2 * i] | single[2 * i + 1] << 4);
  }
};

// --- tiles ---

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

// dynamic8's blocks are whole tiles.
constexpr DynamicMap kDynamicSigned = dynamic_map(true), kDynamicUnsigned = dynamic_map(false);

template <const DynamicMap& Map>
void load_dynamic8(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint8_t* __restrict codes = static_cast<const uint8_t*>(src.data) + first;
  const float scale = static_cast<const float*>(src.extra)[first / kDynamicBlock];
  for (int i = 0; i < n; ++i) tile[i] = Map.values[codes[i]] * scale;
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
  for (int i = 0; i < n; ++i) {
    const uint32_t code = encode_dynamic(div_rn(tile[i], divisor), Map.edges);
    codes[i] = static_cast<uint8_t>(finite ? code : 0u);
  }
}

}  // namespace

// In the order of Format, each for a first, a second and a relative moment; weights and gradients
// are first. fp32 needs no entry: the rule works on the tensor itself. FN is load or store.
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
