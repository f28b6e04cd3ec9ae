// The formats on whole strips, with two 8-bit or 16-bit values per 32-bit word, for one instruction
// set: see kernels_impl.h. The results are those of codecs_impl.h. Packing two values per word
// halves the arithmetic on codes. Processing a tile of strips at a time amortizes operations across
// lanes, such as the block maxima. Both matter because a division and a square root per element
// leave few execution slots.
#pragma once

#include "codecs_impl.h"

namespace onepass::cpu {
namespace {

// --- scales and codes of blocks ---

// The scale of each strip of a tile, and constants that derive() computes from it for encoding and
// decoding. Broadcasting them from memory avoids the shuffle port, which a broadcast from a general
// register uses.
struct Scales {
  alignas(32) uint32_t scale[kStrips];
  alignas(32) uint32_t base[kStrips];   // the code of the lowest exponent, in both halves
  alignas(32) uint32_t least[kStrips];  // Unsigned: base plus one in the upper half
  alignas(32) uint32_t minus[kStrips];  // Signed: adding it subtracts base in the upper half
  alignas(32) float lowest[kStrips];    // Signed, Root: the lowest power of two
  alignas(32) uint32_t shift[kStrips];  // Root: shift that aligns codes with the upper half
  alignas(32) float per_step[kStrips];  // Ratio: its encoder
};

// lift returns a stochastically rounded code plus base in the upper half of a word. (For a Signed,
// see lift_signed of the primitives.)
template <int Exponent, int Mantissa>
ONEPASS_HD uint32_t
lift(Unsigned<Exponent, Mantissa>, float value, uint32_t random16, const Scales& of, int strip) {
  const uint32_t bits = to_bits(value);
  const uint32_t least = of.least[strip], none = of.base[strip];
  const uint32_t code = (bits >> Unsigned<Exponent, Mantissa>::kRandomShift) + random16;
  const uint32_t kept = max_u32(code, least);
  return bits == 0 ? none : kept;
}
ONEPASS_HD uint32_t lift(Root, float value, uint32_t random16, const Scales& of, int strip) {
  const uint32_t bits = max_u32(to_bits(value), to_bits(of.lowest[strip]));
  return (bits >> of.shift[strip]) + random16;
}
ONEPASS_HD uint32_t lift(Ratio, float value, uint32_t random16, const Scales& of, int strip) {
  const uint32_t sign = (to_bits(value) & ~kMagnitude) >> Ratio::kRandomShift;
  return Ratio::dithered(value, random16, of.per_step[strip]) + sign;
}

// Whether a code is a Signed.
template <int Exponent, int Mantissa>
constexpr bool is_signed(Signed<Exponent, Mantissa>) {
  return true;
}
constexpr bool is_signed(...) { return false; }

// The codes of a strip, in pairs. Signs are above the codes and are not yet in place; see
// fold_signs.
template <class Code>
ONEPASS_HD void lift_strip(
    const float* __restrict values, Random random, const Scales& of, int strip,
    uint32_t* __restrict codes) {
  uint32_t lifted[kStrip];
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) lifted[i] = lift(Code(), values[i], random[i], of, strip);
  simd::join_strip(lifted, codes);
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) codes[i] -= of.base[strip];
}

// The codes of a strip, each in a half of a pair.
template <class Code>
ONEPASS_HD void code_strip(
    const float* __restrict values, Random random, const Scales& of, int strip,
    uint32_t* __restrict codes) {
  if (__builtin_expect(of.scale[strip] == kNotFinite, 0)) {
    for (int i = 0; i < kPairs; ++i) codes[i] = twice(Code::kNan);
    return;
  }
  if constexpr (is_signed(Code()))
    simd::lift_signed<Code>(
        values, random, of.lowest[strip], of.base[strip], of.minus[strip], codes);
  else
    lift_strip<Code>(values, random, of, strip, codes);
  if constexpr (Code::kSign != 0) simd::fold_signs<Code>(codes);
}

// code_strip of an Unsigned code for values that all have codes of at least 1. A zero byte in the
// narrowed result means that a value needs code_strip instead.
template <class Code>
ONEPASS_HD void code_above(
    const float* __restrict values, Random random, const Scales& of, int strip,
    uint32_t* __restrict codes) {
  uint32_t lifted[kStrip];
#pragma omp simd
  for (int i = 0; i < kStrip; ++i)
    lifted[i] = (to_bits(values[i]) >> Code::kRandomShift) + random[i];
  simd::join_strip(lifted, codes);
  alignas(64) uint32_t bases[kPairs];
  const uint32_t base = of.base[strip];
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) bases[i] = base;
  Half16* halves = reinterpret_cast<Half16*>(codes);
  const Half16* subtract = reinterpret_cast<const Half16*>(bases);
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) halves[i] = static_cast<Half16>(halves[i] - subtract[i]);
}

// Encodes simd::kNarrowed strips to bytes, from number `strip` of the tile on.
template <class Code, Order Of>
ONEPASS_HD void code_strips(
    const float (*values)[kStrip], const uint32_t (*words)[kStrip], int shift, const Scales& of,
    int strip, uint8_t* bytes) {
  alignas(64) uint32_t codes[simd::kNarrowed][kPairs];
  bool above = Code::kHasZero && simd::kSaturates;
  for (int i = 0; i < simd::kNarrowed; ++i) above = above && of.scale[strip + i] != kNotFinite;
  if (__builtin_expect(above, 1)) {
    for (int i = 0; i < simd::kNarrowed; ++i)
      code_above<Code>(values[i], {words[i], shift}, of, strip + i, codes[i]);
    simd::narrow<Of>(codes, bytes);
    if (__builtin_expect(!simd::has_zero(bytes), 1)) return;
  }
  for (int i = 0; i < simd::kNarrowed; ++i)
    code_strip<Code>(values[i], {words[i], shift}, of, strip + i, codes[i]);
  simd::narrow<Of>(codes, bytes);
}

// Writes simd::kWords partial maxima of the measures of a strip to most.
template <class Code>
ONEPASS_HD void measure_strip(const float* __restrict values, uint32_t* __restrict most) {
  const auto at = [&](int i) { return Code::measure(values[i]); };
#pragma omp simd
  for (int i = 0; i < simd::kWords; ++i) {
    most[i] = max_u32(at(i), at(i + kPairs));
    if (simd::kWords < kPairs)
      most[i] = max_u32(most[i], max_u32(at(i + simd::kWords), at(i + kPairs + simd::kWords)));
  }
}

// derive computes the constants of Scales for one strip.
template <int Exponent, int Mantissa>
ONEPASS_HD void derive(Unsigned<Exponent, Mantissa>, Scales& of, int strip) {
  of.base[strip] = twice(of.scale[strip] << Mantissa);
  of.least[strip] = of.base[strip] + 0x10000u;
}
template <int Exponent, int Mantissa>
ONEPASS_HD void derive(Signed<Exponent, Mantissa>, Scales& of, int strip) {
  of.base[strip] = twice(of.scale[strip] << Mantissa);
  of.minus[strip] = 0u - (of.scale[strip] << (16 + Mantissa));
  of.lowest[strip] = from_bits(of.scale[strip] << 23);
}
ONEPASS_HD void derive(Root, Scales& of, int strip) {
  const Root::Unit unit = Root::decoder(of.scale[strip]);
  of.base[strip] = twice(unit.lowest >> (23 - unit.mantissa));
  of.lowest[strip] = from_bits(unit.lowest);
  of.shift[strip] = 7 - unit.mantissa;
}
ONEPASS_HD void derive(Ratio, Scales& of, int strip) {
  of.base[strip] = 0;
  of.per_step[strip] = Ratio::encoder(of.scale[strip]);
}

template <class Code>
ONEPASS_HD void derive_scales(Scales& of) {
#pragma omp simd
  for (int i = 0; i < kStrips; ++i) derive(Code(), of, i);
}
// Reads the scales of a tile from memory.
template <class Code>
ONEPASS_HD void read_scales(const Stored& at, int64_t first, Scales& of) {
  const uint8_t* bytes = static_cast<const uint8_t*>(at.extra) + first / kMxBlock;
  simd::widen_scales(bytes, of.scale);
  derive_scales<Code>(of);
}
// Chooses the scales of a tile from the results of measure_strip and writes them to memory.
template <class Code>
ONEPASS_HD void choose_scales(
    const uint32_t (*most)[simd::kWords], const uint32_t* least, const Stored& at, int64_t first,
    Scales& of) {
  alignas(64) uint32_t largest[kStrips];
  simd::largest_of(most, largest);
#pragma omp simd
  for (int i = 0; i < kStrips; ++i) {
    if constexpr (Code::kTakesLeast)
      of.scale[i] = Code::scale(largest[i], least[i]);
    else
      of.scale[i] = Code::scale(largest[i]);
  }
  derive_scales<Code>(of);
  uint8_t* bytes = static_cast<uint8_t*>(at.extra) + first / kMxBlock;
  simd::narrow_scales(of.scale, bytes);
}

// --- weights and gradients ---

// A strip of a weight or gradient. open decodes it, if necessary into buffer, and returns a pointer
// to its fp32 values; values returns that pointer again. store encodes it; for a format that draws
// random bits, store_dithered encodes simd::kNarrowed strips instead.
template <class Format, Order Of>
struct Strip {
  ONEPASS_HD static float* values(const Stored&, int64_t, float* buffer) { return buffer; }
  ONEPASS_HD static float* open(const Stored& at, int64_t first, float* buffer) {
    Format::load(at, first, kStrip, buffer, nullptr);
    return buffer;
  }
  ONEPASS_HD static void store(const float* values, const Stored& at, int64_t first) {
    Format::store(values, at, first, kStrip, {}, nullptr);
  }
};

// fp32 in place. (The compiler turns a copy into a memcpy with narrow stores, which cannot be
// forwarded to the wide loads that follow.)
template <>
struct Strip<Fp32, kInOrder> {
  ONEPASS_HD static float* values(const Stored& at, int64_t first, float*) {
    return static_cast<float*>(at.data) + first;
  }
  ONEPASS_HD static float* open(const Stored& at, int64_t first, float*) {
    return static_cast<float*>(at.data) + first;
  }
  ONEPASS_HD static void store(const float*, const Stored&, int64_t) {}
};

// The 16-bit elements from element first on, as pairs.
ONEPASS_HD Pair* pairs_at(const Stored& at, int64_t first) {
  return reinterpret_cast<Pair*>(static_cast<uint16_t*>(at.data) + first);
}

// Adds drawn(k, i) to the bits of each value of simd::kNarrowed strips. NaNs, which are rare,
// become the word nan.
template <class Drawn>
ONEPASS_HD void dither(
    const float (*values)[kStrip], const Drawn& drawn, uint32_t nan, uint32_t (*kept)[kStrip]) {
  for (int k = 0; k < simd::kNarrowed; ++k) {
#pragma omp simd
    for (int i = 0; i < kStrip; ++i) kept[k][i] = to_bits(values[k][i]) + drawn(k, i);
  }
  if (__builtin_expect(simd::are_ordered(values), 1)) return;
  for (int k = 0; k < simd::kNarrowed; ++k) {
#pragma omp simd
    for (int i = 0; i < kStrip; ++i) kept[k][i] = values[k][i] != values[k][i] ? nan : kept[k][i];
  }
}

// bf16: a pair is one word of the tensor.
template <class Code>
struct Strip<Half<Code>, kByPairs> {
  ONEPASS_HD static float* values(const Stored&, int64_t, float* buffer) { return buffer; }
  ONEPASS_HD static float* open(const Stored& at, int64_t first, float* __restrict buffer) {
    const Pair* pairs = pairs_at(at, first);
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) {
      buffer[i] = lower(pairs[i]);
      buffer[i + kPairs] = upper(pairs[i]);
    }
    return buffer;
  }
  ONEPASS_HD static void store(const float* __restrict values, const Stored& at, int64_t first) {
    uint32_t codes[kStrip];
#pragma omp simd
    for (int i = 0; i < kStrip; ++i) codes[i] = Code::round(values[i], 0);
    simd::join_strip(codes, pairs_at(at, first));
  }
  ONEPASS_HD static void store_dithered(
      const float (*values)[kStrip], const Stored& at, int64_t first,
      const uint32_t (*words)[kStrip], int shift) {
    uint32_t kept[simd::kNarrowed][kStrip];
    const auto drawn = [=](int k, int i) { return Random{words[k], shift}[i]; };
    dither(values, drawn, kBf16Nan, kept);
    for (int k = 0; k < simd::kNarrowed; ++k)
      simd::join_strip(kept[k], pairs_at(at, first + k * kStrip));
  }
};

// split8.
template <>
struct Strip<Split8Weight, kByPairs> {
  ONEPASS_HD static float* values(const Stored&, int64_t, float* buffer) { return buffer; }
  ONEPASS_HD static float* open(const Stored& at, int64_t first, float* __restrict buffer) {
    const int8_t* companion = static_cast<const int8_t*>(at.extra) + first;
    simd::join_split8(pairs_at(at, first), companion, buffer);
    return buffer;
  }
  // Half a unit of the weight (kUp) is added to the bits. This rounds the weight, and inverts the
  // sign bit of the companion, which simd::second_bytes inverts back.
  ONEPASS_HD static void store_dithered(
      const float (*values)[kStrip], const Stored& at, int64_t first,
      const uint32_t (*words)[kStrip], int shift) {
    constexpr uint32_t kUp = 0x8000;
    uint32_t kept[simd::kNarrowed][kStrip];
    const auto drawn = [=](int k, int i) { return (Random{words[k], shift}[i] & 0xFF) | kUp; };
    dither(values, drawn, kBf16Nan + kUp, kept);
    for (int k = 0; k < simd::kNarrowed; ++k)
      simd::join_strip(kept[k], pairs_at(at, first + k * kStrip));
    simd::second_bytes(kept, kUp >> 8, static_cast<uint8_t*>(at.extra) + first);
  }
};

// --- states in blocks ---

// A tile of a state. begin is called first. For each strip, open decodes it, opened returns its
// fp32 values, and measure is called after the update. choose then chooses the scales of all
// strips, and write encodes simd::kNarrowed strips.
template <Order Of, class State>
struct Tile;

// fp32 in place.
template <>
struct Tile<kInOrder, Fp32> {
  ONEPASS_HD void begin(const Stored&, int64_t) {}
  ONEPASS_HD float* opened(const Stored& at, int64_t first, int) {
    return static_cast<float*>(at.data) + first;
  }
  ONEPASS_HD void open(const Stored&, int64_t, int, float*) {}
  ONEPASS_HD void measure(int) {}
  ONEPASS_HD void choose(
      const Stored&, int64_t, const uint32_t (*)[kStrip], int, float (*)[kStrip]) {}
  ONEPASS_HD void write(const Stored&, int64_t, const uint32_t (*)[kStrip], int, int) {}
};

// mx8.
template <Order Of, Kind Is>
struct Tile<Of, Mx8State<Is>> {
  using Code = typename Mx8State<Is>::Code;
  alignas(64) float values[kStrips][kStrip];
  alignas(64) uint32_t most[kStrips][simd::kWords];
  Scales scales;

  ONEPASS_HD void begin(const Stored& at, int64_t first) {
    if (Of == kByPairs) read_scales<Code>(at, first, scales);
  }
  ONEPASS_HD float* opened(const Stored&, int64_t, int strip) { return values[strip]; }
  ONEPASS_HD void open(const Stored& at, int64_t first, int strip, float*) {
    float* __restrict out = values[strip];
    if (Of == kInOrder) {
      Mx8State<Is>::load(at, first, kStrip, out, nullptr);
      return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(at.data) + first;
    const uint32_t base = scales.base[strip];
    if constexpr (Is == kSecond) {
      alignas(64) uint16_t words[kStrip];
      alignas(64) uint32_t bases[kPairs];
      simd::widen(codes, words);
#pragma omp simd
      for (int i = 0; i < kPairs; ++i) bases[i] = base;
      const Half16* add = reinterpret_cast<const Half16*>(bases);
#pragma omp simd
      for (int i = 0; i < kStrip; ++i) {
        const uint16_t word = static_cast<uint16_t>((words[i] + add[i]) << Code::kRandomShift);
        words[i] = words[i] == 0 ? static_cast<uint16_t>(0) : word;
      }
      const Pair* pairs = reinterpret_cast<const Pair*>(words);
#pragma omp simd
      for (int i = 0; i < kPairs; ++i) {
        out[i] = lower(pairs[i]);
        out[i + kPairs] = upper(pairs[i]);
      }
    } else {
      alignas(64) int16_t words[kStrip];
      simd::widen(reinterpret_cast<const int8_t*>(codes), words);
      const float lowest = scales.lowest[strip];
      const Pair* pairs = reinterpret_cast<const Pair*>(words);
#pragma omp simd
      for (int i = 0; i < kPairs; ++i) {
        const uint32_t pair = pairs[i];
        const uint32_t lifted = ((pair & twice(Code::kSign - 1)) + base) << Code::kRandomShift;
        const float even = lower(lifted) - lowest, odd = upper(lifted) - lowest;
        out[i] = from_bits(to_bits(even) | (pair << 16 & ~kMagnitude));
        out[i + kPairs] = from_bits(to_bits(odd) | (pair & ~kMagnitude));
      }
    }
  }
  ONEPASS_HD void measure(int strip) { measure_strip<Code>(values[strip], most[strip]); }
  ONEPASS_HD void choose(
      const Stored& at, int64_t first, const uint32_t (*)[kStrip], int, float (*)[kStrip]) {
    choose_scales<Code>(most, nullptr, at, first, scales);
  }
  ONEPASS_HD void write(
      const Stored& at, int64_t first, const uint32_t (*words)[kStrip], int shift, int strip) {
    uint8_t* bytes = static_cast<uint8_t*>(at.data) + first + strip * kStrip;
    code_strips<Code, Of>(values + strip, words + strip, shift, scales, strip, bytes);
  }
};

// mx4. choose does the work of measure and write too, because relative moments are divided by the
// square root of the second moment as it is stored, which choose of that moment computes.
template <Kind Is>
struct Tile<kByPairs, Mx4State<Is>> {
  using State = Mx4State<Is>;
  using Code = typename State::Code;
  alignas(64) float values[kStrips][kStrip];

  ONEPASS_HD void begin(const Stored&, int64_t) {}
  ONEPASS_HD float* opened(const Stored&, int64_t, int strip) { return values[strip]; }
  ONEPASS_HD void open(const Stored& at, int64_t first, int strip, float* roots) {
    const uint32_t scale = static_cast<const uint8_t*>(at.extra)[first / kMxBlock];
    uint32_t bytes[kPairs], codes[kStrip];
    convert(static_cast<const uint8_t*>(at.data) + first / 2, bytes, kPairs);
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) {
      codes[i] = bytes[i] & 0xF;
      codes[i + kPairs] = bytes[i] >> 4;
    }
    State::values(codes, scale, kStrip, values[strip], roots);
  }
  ONEPASS_HD void measure(int) {}
  ONEPASS_HD void choose(
      const Stored& at, int64_t first, const uint32_t (*words)[kStrip], int shift,
      float (*__restrict roots)[kStrip]) {
    alignas(64) uint32_t most[kStrips][simd::kWords];
    uint32_t least[kStrips];
    Scales scales;
    for (int strip = 0; strip < kStrips; ++strip) {
      State::units(values[strip], kStrip, roots[strip]);
      measure_strip<Code>(values[strip], most[strip]);
      if (Code::kTakesLeast) least[strip] = least_of(values[strip]);
    }
    choose_scales<Code>(most, least, at, first, scales);
    uint8_t* bytes = static_cast<uint8_t*>(at.data) + first / 2;
    for (int strip = 0; strip < kStrips; ++strip) {
      uint32_t codes[kPairs];
      code_strip<Code>(values[strip], {words[strip], shift}, scales, strip, codes);
      float* __restrict root = roots[strip];
      const auto decoder = Code::decoder(scales.scale[strip]);
#pragma omp simd
      for (int i = 0; i < kPairs; ++i) {
        if (Is == kSecond) root[i] = Code::decode(codes[i] & 0xFFFF, decoder);
        if (Is == kSecond) root[i + kPairs] = Code::decode(codes[i] >> 16, decoder);
        codes[i] |= codes[i] >> 12;
      }
      convert(codes, bytes + strip * kPairs, kPairs);
    }
  }
  ONEPASS_HD void write(const Stored&, int64_t, const uint32_t (*)[kStrip], int, int) {}
};

}  // namespace
}  // namespace onepass::cpu
