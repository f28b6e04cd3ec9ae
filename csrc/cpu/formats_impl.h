// The formats over a tile, for one instruction set: see kernels_impl.h.
#pragma once

#include "kernels.h"

namespace onepass::cpu {
namespace {

// The random bits of a tile's elements for one use: 16 of them from the words of the generator.
struct Draw {
  RandomKey key;
  int shift;
  uint32_t start;

  ONEPASS_HD Draw(const TileRandom& random, int use)
      : key(random.keys[use / 2]), shift(use % 2 * 16), start(random_start(key, random.low)) {}
  ONEPASS_HD uint32_t operator[](int i) const {
    return random_mix(key, start + static_cast<uint32_t>(i) * kWeyl) >> shift & 0xFFFFu;
  }
};

template <class T>
T* codes_of(const Stored& tensor, int64_t first) {
  return static_cast<T*>(tensor.data) + first;
}
template <class T>
T* extra_of(const Stored& tensor, int64_t first) {
  return static_cast<T*>(tensor.extra) + first;
}

// --- one code an element ---

template <float (*Decode)(uint16_t)>
void decode16(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  // The hardware does not see a stream in the short reads of a tile: each line asks for one ahead.
  constexpr int kLine = 32, kAhead = 512;
  const uint16_t* __restrict codes = codes_of<uint16_t>(src, first);
  int line = 0;
  for (; line + kLine <= n; line += kLine) {
    __builtin_prefetch(codes + line + kAhead);
#pragma omp simd
    for (int i = line; i < line + kLine; ++i) tile[i] = Decode(codes[i]);
  }
  for (int i = line; i < n; ++i) tile[i] = Decode(codes[i]);
}

template <uint16_t (*Encode)(float)>
void encode16(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom&, int,
    float*) {
  uint16_t* __restrict codes = codes_of<uint16_t>(dst, first);
#pragma omp simd
  for (int i = 0; i < n; ++i) codes[i] = Encode(tile[i]);
}

ONEPASS_HD uint16_t encode_bf16(float value) {
  return static_cast<uint16_t>(round_bf16(value) >> 16);
}
ONEPASS_HD uint16_t dither_bf16(float value, uint32_t random16) {
  return static_cast<uint16_t>(round_bf16_stochastic(value, random16) >> 16);
}
ONEPASS_HD uint16_t dither_fp16(float value, uint32_t random16) {
  return encode_fp16_stochastic(value, random16 >> 3);
}

template <uint16_t (*Encode)(float, uint32_t)>
void dither16(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom& random,
    int use, float*) {
  uint16_t* __restrict codes = codes_of<uint16_t>(dst, first);
  const Draw draw(random, use);
#pragma omp simd
  for (int i = 0; i < n; ++i) codes[i] = Encode(tile[i], draw[i]);
}

// --- weights with a companion ---

template <float (*Decode)(uint16_t)>
void decode_kahan(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint16_t* __restrict codes = codes_of<uint16_t>(src, first);
  const uint16_t* __restrict rest = extra_of<uint16_t>(src, first);
#pragma omp simd
  for (int i = 0; i < n; ++i) tile[i] = Decode(codes[i]) + Decode(rest[i]);
}

template <float (*Decode)(uint16_t), uint16_t (*Encode)(float)>
void encode_kahan(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom&, int,
    float*) {
  uint16_t* __restrict codes = codes_of<uint16_t>(dst, first);
  uint16_t* __restrict rest = extra_of<uint16_t>(dst, first);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint16_t code = Encode(tile[i]);
    codes[i] = code;
    rest[i] = Encode(left_over(tile[i], Decode(code)));
  }
}

ONEPASS_HD uint16_t encode_half_away(float value) {
  return static_cast<uint16_t>(round_half_away(value) >> 16);
}

// A weight that is no longer its rounded master was changed from outside, and counts.
template <float (*Decode)(uint16_t), uint16_t (*Encode)(float)>
void decode_master(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint16_t* __restrict codes = codes_of<uint16_t>(src, first);
  const float* __restrict master = extra_of<float>(src, first);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint16_t code = codes[i];
    const float value = master[i];
    tile[i] = Encode(value) == code ? value : Decode(code);
  }
}

template <uint16_t (*Encode)(float)>
void encode_master(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom&, int,
    float*) {
  uint16_t* __restrict codes = codes_of<uint16_t>(dst, first);
  float* __restrict master = extra_of<float>(dst, first);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    codes[i] = Encode(tile[i]);
    master[i] = tile[i];
  }
}

template <class Low, float (*Decode)(uint16_t, Low)>
void decode_split(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint16_t* __restrict codes = codes_of<uint16_t>(src, first);
  const Low* __restrict low = extra_of<Low>(src, first);
#pragma omp simd
  for (int i = 0; i < n; ++i) tile[i] = Decode(codes[i], low[i]);
}

void encode_split16_tile(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom&, int,
    float*) {
  uint16_t* __restrict codes = codes_of<uint16_t>(dst, first);
  int16_t* __restrict low = extra_of<int16_t>(dst, first);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Split16 split = encode_split16(tile[i]);
    codes[i] = split.weight;
    low[i] = split.low;
  }
}

void encode_split8_tile(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom& random,
    int use, float*) {
  uint16_t* __restrict codes = codes_of<uint16_t>(dst, first);
  int8_t* __restrict low = extra_of<int8_t>(dst, first);
  const Draw draw(random, use);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Split8 split = encode_split8(tile[i], draw[i] >> 8);
    codes[i] = split.weight;
    low[i] = split.low;
  }
}

// --- blocks ---

// Calls with the start, length and number of each block; the length is a constant where it can be.
template <int Block, class Work>
ONEPASS_HD void for_blocks(int n, const Work& work) {
  int start = 0;
  for (; start + Block <= n; start += Block) work(start, Block, start / Block);
  if (start < n) work(start, n - start, start / Block);
}

ONEPASS_HD uint32_t largest_of(const float* __restrict values, int n) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = max_u32(largest, to_bits(values[i]) & kMagnitude);
  return largest;
}

template <class Code>
void decode_mx8(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint8_t* __restrict codes = codes_of<uint8_t>(src, first);
  const uint8_t* __restrict scales = extra_of<uint8_t>(src, first / kMxBlock);
  for_blocks<kMxBlock>(n, [=](int start, int count, int block) {
    const uint32_t scale = scales[block];
#pragma omp simd
    for (int i = start; i < start + count; ++i) tile[i] = Code::decode(codes[i], scale);
  });
}

template <class Code>
void encode_mx8(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom& random,
    int use, float*) {
  uint8_t* __restrict codes = codes_of<uint8_t>(dst, first);
  uint8_t* __restrict scales = extra_of<uint8_t>(dst, first / kMxBlock);
  const Draw draw(random, use);
  for_blocks<kMxBlock>(n, [=](int start, int count, int block) {
    const uint32_t scale = Code::scale(largest_of(tile + start, count));
    scales[block] = static_cast<uint8_t>(scale);
#pragma omp simd
    for (int i = start; i < start + count; ++i)
      codes[i] = static_cast<uint8_t>(Code::encode(tile[i], draw[i], scale));
  });
}

// Two codes in a byte, element 2i in the lower half of byte i; first is even.
template <class Code>
ONEPASS_HD void unpack_block(
    const uint8_t* __restrict bytes, uint32_t scale, int count, float* __restrict values) {
#pragma omp simd
  for (int i = 0; i < count; ++i)
    values[i] = Code::decode(bytes[i / 2] >> (i % 2 * 4) & 15u, scale);
}

template <Kind Of>
void decode_mx4(const Stored& src, int64_t first, int n, float* __restrict tile, float* roots) {
  const uint8_t* __restrict bytes = codes_of<uint8_t>(src, first / 2);
  const uint8_t* __restrict scales = extra_of<uint8_t>(src, first / kMxBlock);
  for_blocks<kMxBlock>(n, [=](int start, int count, int block) {
    float* __restrict values = tile + start;
    float* __restrict root = roots + start;
    if (Of == kSecond) {
      unpack_block<Mx4::Second>(bytes + start / 2, scales[block], count, root);
#pragma omp simd
      for (int i = 0; i < count; ++i) values[i] = root[i] * root[i];
    } else {
      unpack_block<Mx4::First>(bytes + start / 2, scales[block], count, values);
#pragma omp simd
      for (int i = 0; i < count; ++i)
        if (Of == kRelative) values[i] = values[i] * (root[i] == 0.0f ? 1.0f : root[i]);
    }
  });
}

template <Kind Of>
void encode_mx4(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom& random,
    int use, float* roots) {
  using Code = typename Mx4::Of<Of == kSecond>::Code;
  uint8_t* __restrict bytes = codes_of<uint8_t>(dst, first / 2);
  uint8_t* __restrict scales = extra_of<uint8_t>(dst, first / kMxBlock);
  const Draw draw(random, use);
  for_blocks<kMxBlock>(n, [=](int start, int count, int block) {
    float units[kMxBlock];
    uint32_t codes[kMxBlock] = {};
    const float* __restrict values = tile + start;
    float* __restrict root = roots + start;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      if (Of == kSecond) units[i] = sqrt_rn(values[i]);
      if (Of == kRelative) units[i] = div_rn(values[i], root[i] == 0.0f ? 1.0f : root[i]);
      if (Of == kFirst) units[i] = values[i];
    }
    const uint32_t scale = Code::scale(largest_of(units, count));
    scales[block] = static_cast<uint8_t>(scale);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      codes[i] = Code::encode(units[i], draw[start + i], scale);
      if (Of == kSecond) root[i] = Code::decode(codes[i], scale);
    }
    for (int i = 0; i < (count + 1) / 2; ++i)
      bytes[start / 2 + i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  });
}

constexpr DynamicMap kDynamicSigned = dynamic_map(true), kDynamicUnsigned = dynamic_map(false);

template <const DynamicMap& Map>
void decode_dynamic8(const Stored& src, int64_t first, int n, float* __restrict tile, float*) {
  const uint8_t* __restrict codes = codes_of<uint8_t>(src, first);
  const float* __restrict scales = extra_of<float>(src, first / kDynamicBlock);
  for_blocks<kDynamicBlock>(n, [=](int start, int count, int block) {
    const float scale = scales[block];
#pragma omp simd
    for (int i = start; i < start + count; ++i) tile[i] = Map.values[codes[i]] * scale;
  });
}

template <const DynamicMap& Map>
void encode_dynamic8(
    const float* __restrict tile, int64_t first, int n, const Stored& dst, const TileRandom&, int,
    float*) {
  uint8_t* __restrict codes = codes_of<uint8_t>(dst, first);
  float* __restrict scales = extra_of<float>(dst, first / kDynamicBlock);
  for_blocks<kDynamicBlock>(n, [=](int start, int count, int block) {
    const uint32_t largest = largest_of(tile + start, count);
    const bool finite = largest < kInfinity;
    scales[block] = from_bits(finite ? largest : 0x7FC00000u);
    const float divisor = largest == 0 ? 1.0f : from_bits(largest);
#pragma omp simd
    for (int i = start; i < start + count; ++i) {
      const uint32_t code = encode_dynamic(div_rn(tile[i], divisor), Map.edges);
      codes[i] = static_cast<uint8_t>(finite ? code : 0u);
    }
  });
}

}  // namespace

// In the order of Format, each for a first, a second and a relative moment; weights and gradients
// take the first. fp32 needs no entry: the rule works on the tensor itself. dynamic8 has its
// unsigned map for second moments.
#define ONEPASS_ALIKE(FN) {FN, FN, FN}
#define ONEPASS_DECODERS                                                         \
  {                                                                              \
      {},                                                                        \
      ONEPASS_ALIKE(decode16<decode_bf16>),                                      \
      ONEPASS_ALIKE(decode16<decode_fp16>),                                      \
      ONEPASS_ALIKE(decode16<decode_bf16>),                                      \
      ONEPASS_ALIKE(decode16<decode_fp16>),                                      \
      {decode_mx8<Mx8::First>, decode_mx8<Mx8::Second>, decode_mx8<Mx8::First>}, \
      {decode_mx4<kFirst>, decode_mx4<kSecond>, decode_mx4<kRelative>},          \
      {decode_dynamic8<kDynamicSigned>, decode_dynamic8<kDynamicUnsigned>,       \
       decode_dynamic8<kDynamicSigned>},                                         \
      {decode_kahan<decode_bf16>},                                               \
      {decode_kahan<decode_fp16>},                                               \
      {decode_master<decode_bf16, encode_half_away>},                            \
      {decode_master<decode_fp16, encode_fp16>},                                 \
      {decode_split<int16_t, decode_split16>},                                   \
      {decode_split<int8_t, decode_split8>},                                     \
  }
#define ONEPASS_ENCODERS                                                         \
  {                                                                              \
      {},                                                                        \
      ONEPASS_ALIKE(encode16<encode_bf16>),                                      \
      ONEPASS_ALIKE(encode16<encode_fp16>),                                      \
      ONEPASS_ALIKE(dither16<dither_bf16>),                                      \
      ONEPASS_ALIKE(dither16<dither_fp16>),                                      \
      {encode_mx8<Mx8::First>, encode_mx8<Mx8::Second>, encode_mx8<Mx8::First>}, \
      {encode_mx4<kFirst>, encode_mx4<kSecond>, encode_mx4<kRelative>},          \
      {encode_dynamic8<kDynamicSigned>, encode_dynamic8<kDynamicUnsigned>,       \
       encode_dynamic8<kDynamicSigned>},                                         \
      {encode_kahan<decode_bf16, encode_bf16>},                                  \
      {encode_kahan<decode_fp16, encode_fp16>},                                  \
      {encode_master<encode_half_away>},                                         \
      {encode_master<encode_fp16>},                                              \
      {encode_split16_tile},                                                     \
      {encode_split8_tile},                                                      \
  }

}  // namespace onepass::cpu
