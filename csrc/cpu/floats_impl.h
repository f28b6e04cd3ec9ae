// The float formats of a strip, at most 32 consecutive elements, for one instruction set: see
// kernels_impl.h. A strip begins at a multiple of 32, so it is one block of mx8 or mx4. With a
// constant length the compiler unrolls the loops completely, and values stay in registers between
// formats.
#pragma once

#include "convert.h"
#include "kernels.h"

namespace onepass::cpu {
namespace {

constexpr int kStrip = kMxBlock;

// --- random bits ---

// Draws one random word per element of a strip that begins at position offset of the tile.
ONEPASS_HD void draw(
    const TileRandom& random, int word, int offset, int n, uint32_t* __restrict words) {
  const RandomKey key = random.keys[word];
  const uint32_t start = random_start(key, random.low + static_cast<uint32_t>(offset));
#pragma omp simd
  for (int i = 0; i < n; ++i) words[i] = random_mix(key, start + static_cast<uint32_t>(i) * kWeyl);
}

// The 16 random bits of one use: one half of each word.
struct Random {
  const uint32_t* words;
  int shift;
  ONEPASS_HD uint32_t operator[](int i) const { return words[i] >> shift & 0xFFFFu; }
};

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

}  // namespace
}  // namespace onepass::cpu
