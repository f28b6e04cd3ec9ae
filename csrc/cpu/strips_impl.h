// The formats on whole strips, and states on a tile of strips at a time, for one instruction set:
// see kernels_impl.h. The results are those of csrc/formats, computed with two values per word.
#pragma once

#include "scales_impl.h"

namespace onepass::cpu {
namespace {

// --- weights and gradients ---

// A strip of a weight or gradient. open decodes it, if necessary into buffer, and returns a pointer
// to its fp32 values. store encodes it; for a format that draws random bits, store_dithered encodes
// kNarrowed strips instead.
template <class Format, Order Of>
struct Strip {
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
  ONEPASS_HD static float* open(const Stored& at, int64_t first, float*) {
    return static_cast<float*>(at.data) + first;
  }
  ONEPASS_HD static void store(const float*, const Stored&, int64_t) {}
};

// The 16-bit elements from element first on, as pairs.
ONEPASS_HD Pair* pairs_at(const Stored& at, int64_t first) {
  return reinterpret_cast<Pair*>(static_cast<uint16_t*>(at.data) + first);
}

// Adds drawn(k, i) to the bits of each value of kNarrowed strips. NaNs, which are rare, become the
// word nan.
template <class Drawn>
ONEPASS_HD void dither(
    const float (*values)[kStrip], const Drawn& drawn, uint32_t nan, uint32_t (*kept)[kStrip]) {
  for (int k = 0; k < kNarrowed; ++k) {
#pragma omp simd
    for (int i = 0; i < kStrip; ++i) kept[k][i] = to_bits(values[k][i]) + drawn(k, i);
  }
  if (__builtin_expect(are_ordered(values), 1)) return;
  for (int k = 0; k < kNarrowed; ++k) {
#pragma omp simd
    for (int i = 0; i < kStrip; ++i) kept[k][i] = values[k][i] != values[k][i] ? nan : kept[k][i];
  }
}

// bf16: a pair is one word of the tensor.
template <class Code>
struct Strip<Half<Code>, kByPairs> {
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
    join_strip(codes, pairs_at(at, first));
  }
  ONEPASS_HD static void store_dithered(
      const float (*values)[kStrip], const Stored& at, int64_t first,
      const uint32_t (*words)[kStrip], int shift) {
    uint32_t kept[kNarrowed][kStrip];
    const auto drawn = [=](int k, int i) { return Random{words[k], shift}[i]; };
    dither(values, drawn, kBf16Nan, kept);
    for (int k = 0; k < kNarrowed; ++k) join_strip(kept[k], pairs_at(at, first + k * kStrip));
  }
};

// split8.
template <>
struct Strip<Split8Weight, kByPairs> {
  ONEPASS_HD static float* open(const Stored& at, int64_t first, float* __restrict buffer) {
    const Pair* pairs = pairs_at(at, first);
    const int8_t* companion = static_cast<const int8_t*>(at.extra) + first;
    alignas(64) int16_t low[kStrip];
    widen(companion, low);
#if defined(__AVX512BW__)
    const __m512i weight = load_512(pairs), any = load_512(low);
    const __mmask32 zero = _mm512_testn_epi16_mask(weight, all_of(twice(0x7FFF)));
    const __m512i kept = _mm512_mask_max_epi16(any, zero, any, all_of(0));  // as in joined()
    const __m512i even = _mm512_madd_epi16(kept, all_of(256)), above = all_of(0xFFFF0000u);
    const __m512i odd = _mm512_madd_epi16(kept, all_of(256 << 16));
    store_512(buffer, _mm512_add_epi32(_mm512_maskz_slli_epi32(kAll, weight, 16), even));
    store_512(buffer + kPairs, _mm512_add_epi32(_mm512_and_si512(weight, above), odd));
#elif defined(__AVX2__)
    const __m256i least = all_of(twice(0x8000)), above = all_of(0xFFFF0000u);
    for (int i = 0; i < kPairs; i += kWords) {
      const __m256i weight = load_256(pairs + i), any = load_256(low + 2 * i);
      const __m256i zero = _mm256_cmpeq_epi16(_mm256_add_epi16(weight, weight), all_of(0));
      const __m256i kept = _mm256_max_epi16(any, _mm256_andnot_si256(zero, least));
      const __m256i even = _mm256_madd_epi16(kept, all_of(256));
      const __m256i odd = _mm256_madd_epi16(kept, all_of(256 << 16));
      store_256(buffer + i, _mm256_add_epi32(_mm256_slli_epi32(weight, 16), even));
      store_256(buffer + kPairs + i, _mm256_add_epi32(_mm256_and_si256(weight, above), odd));
    }
#else
    const uint16_t* __restrict weight = static_cast<const uint16_t*>(at.data) + first;
#pragma omp simd
    for (int i = 0; i < kStrip; ++i) {  // as in joined()
      const int16_t positive = low[i] > 0 ? low[i] : static_cast<int16_t>(0);
      low[i] = (weight[i] & 0x7FFF) == 0 ? positive : low[i];
    }
    const Pair* lows = reinterpret_cast<const Pair*>(low);
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t even = static_cast<uint32_t>(static_cast<int32_t>(lows[i] << 16) >> 8);
      const uint32_t odd = static_cast<uint32_t>(static_cast<int32_t>(lows[i] & ~0xFFFFu) >> 8);
      buffer[i] = from_bits((pairs[i] << 16) + even);
      buffer[i + kPairs] = from_bits((pairs[i] & 0xFFFF0000u) + odd);
    }
#endif
    return buffer;
  }
  // Half a unit of the weight (kUp) is added to the bits. This rounds the weight, and inverts the
  // sign bit of the companion, which second_bytes inverts back.
  ONEPASS_HD static void store_dithered(
      const float (*values)[kStrip], const Stored& at, int64_t first,
      const uint32_t (*words)[kStrip], int shift) {
    constexpr uint32_t kUp = 0x8000;
    uint32_t kept[kNarrowed][kStrip];
    const auto drawn = [=](int k, int i) { return (Random{words[k], shift}[i] & 0xFF) | kUp; };
    dither(values, drawn, kBf16Nan + kUp, kept);
    for (int k = 0; k < kNarrowed; ++k) join_strip(kept[k], pairs_at(at, first + k * kStrip));
    second_bytes(kept, kUp >> 8, static_cast<uint8_t*>(at.extra) + first);
  }
};

// --- states in blocks ---

// A tile of a state. The methods are called in this order: begin once per tile; open (as in Strip)
// and, after the update, measure for each strip; choose once, which chooses the scales of all
// strips; and write, which encodes kNarrowed strips.
template <Order Of, class State>
struct Tile;

// fp32 in place.
template <>
struct Tile<kInOrder, Fp32> {
  ONEPASS_HD void begin(const Stored&, int64_t) {}
  ONEPASS_HD float* open(const Stored& at, int64_t first, int, float*) {
    return static_cast<float*>(at.data) + first;
  }
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
  alignas(64) uint32_t most[kStrips][kWords];
  Scales scales;

  ONEPASS_HD void begin(const Stored& at, int64_t first) {
    if (Of == kByPairs) read_scales<Code>(at, first, scales);
  }
  ONEPASS_HD float* open(const Stored& at, int64_t first, int strip, float*) {
    float* __restrict out = values[strip];
    if (Of == kInOrder) {
      Mx8State<Is>::load(at, first, kStrip, out, nullptr);
      return out;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(at.data) + first;
    const uint32_t base = scales.base[strip];
    if constexpr (Is == kSecond) {
      alignas(64) uint16_t words[kStrip];
      alignas(64) uint32_t bases[kPairs];
      widen(codes, words);
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
      widen(reinterpret_cast<const int8_t*>(codes), words);
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
    return out;
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
  ONEPASS_HD float* open(const Stored& at, int64_t first, int strip, float* roots) {
    const uint32_t scale = static_cast<const uint8_t*>(at.extra)[first / kMxBlock];
    uint32_t bytes[kPairs], codes[kStrip];
    convert(static_cast<const uint8_t*>(at.data) + first / 2, bytes, kPairs);
#pragma omp simd
    for (int i = 0; i < kPairs; ++i) {
      codes[i] = bytes[i] & 0xF;
      codes[i + kPairs] = bytes[i] >> 4;
    }
    State::values(codes, scale, kStrip, values[strip], roots);
    return values[strip];
  }
  ONEPASS_HD void measure(int) {}
  ONEPASS_HD void choose(
      const Stored& at, int64_t first, const uint32_t (*words)[kStrip], int shift,
      float (*__restrict roots)[kStrip]) {
    alignas(64) uint32_t most[kStrips][kWords];
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
