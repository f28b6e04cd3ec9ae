// Decoding and encoding of the eight elements that a thread holds, with the arithmetic of
// csrc/formats.
#pragma once

#include "../formats/table.h"
#include "chunk.h"
#include "dynamic_maps.cuh"
#include "lanes.cuh"

namespace onepass::cuda {

// A format as a type.
template <Format F>
struct Tag {
  static constexpr Format value = F;
};

// Bits of a code.
constexpr int bits_of(Format format) { return static_cast<int>(bytes_of(format, 2) * 4); }
// Bits of the companion of a weight; 0 if the format has none.
constexpr int companion_bits_of(Format format) {
  return block_of(format) > 1 ? 0 : static_cast<int>(extra_bytes_of(format, 1) * 8);
}
// The kind under which a format codes a state of a rule. dynamic8 codes state 0 with its signed map
// even if the state is a second moment.
template <class Rule, int Slot>
constexpr Kind kind_in(Format format) {
  if (format == Format::kDynamic8 && Slot == 0) return kFirst;
  if (Rule::kSecond >> Slot & 1) return kSecond;
  return Rule::kRelative >> Slot & 1 ? kRelative : kFirst;
}

// The format of a state of a rule in a list whose states are in `format`; see state_format.
template <class Rule, int Slot>
constexpr Format format_in(Format format) {
  return state_format(format, Rule::kWeights, Slot);
}

// Draws the 16 random bits of an element for one use: state_use of a slot, or weight_use.
struct Random {
  RandomKey keys[kRandomWords];
  uint32_t low;  // lower half of the index of the warp's first element

  // at: position of the element, counted from the warp's first.
  ONEPASS_HD Random16 draw(int use, int at) const {
    const RandomKey key = use < 32 ? keys[0] : use < 64 ? keys[1] : keys[2];
    const uint32_t start = random_start(key, low + static_cast<uint32_t>(at));
    return {random_mix(key, start), use % 32};
  }
};

// --- weights and gradients ---

// Single codes in the lower half of a word, from and to fp32.
ONEPASS_HD uint32_t code_bf16(float value) { return round_bf16(value) >> 16; }
ONEPASS_HD uint32_t code_half_away(float value) { return round_half_away(value) >> 16; }
ONEPASS_HD uint32_t code_fp16(float value) { return encode_fp16(value); }
ONEPASS_HD float from_bf16(uint32_t code) { return decode_bf16(static_cast<uint16_t>(code)); }
ONEPASS_HD float from_fp16(uint32_t code) { return decode_fp16(static_cast<uint16_t>(code)); }

// The companion of element j, as decode_one takes it.
template <Format F, int Vector>
ONEPASS_HD uint32_t companion_at(const Raw& raw, int j) {
  constexpr int kBits = companion_bits_of(F);
  if constexpr (kBits == 0) return 0;
  // split8: a signed byte times 256.
  else if constexpr (F == Format::kSplit8)
    return select_bytes(raw[j / 4], 0, (j % 4) * 0x1110u | 0x8804u);
  else
    return Codes<kBits, Vector>::get(raw, j);
}

// Decodes a weight or gradient. Quick omits special cases; Quick::note_finite of fast_path.cuh
// detects them afterwards.
template <Format F, bool Quick>
ONEPASS_HD float decode_one(uint32_t code, uint32_t companion) {
  switch (F) {
    case Format::kFp32:
      return from_bits(code);
    case Format::kFp16:
    case Format::kFp16Stochastic:
      return from_fp16(code);
    case Format::kKahanBf16:
      return from_bf16(code) + from_bf16(companion);
    case Format::kKahanFp16:
      return from_fp16(code) + from_fp16(companion);
    // A weight that differs from its rounded master was changed outside onepass and takes
    // precedence.
    case Format::kMasterBf16:
      return code_half_away(from_bits(companion)) == code ? from_bits(companion) : from_bf16(code);
    case Format::kMasterFp16:
      return code_fp16(from_bits(companion)) == code ? from_bits(companion) : from_fp16(code);
    case Format::kSplit16: {
      const int32_t low = static_cast<int16_t>(companion);
      return Quick ? joined_plain(code, low) : decode_split16(code, low);
    }
    case Format::kSplit8: {
      const int32_t low = static_cast<int32_t>(companion);
      return Quick ? joined_plain(code, low) : joined(code, low);
    }
    default:
      return from_bf16(code);
  }
}

// The position of the lowest bit of the code and of the companion in the words of encode_one.
constexpr int code_bit(Format format) { return bits_of(format) == 16 ? 16 : 0; }
constexpr int companion_bit(Format format) {
  const bool kahan = format == Format::kKahanBf16 || format == Format::kKahanFp16;
  return kahan ? 16 : format == Format::kSplit8 ? 8 : 0;
}

// Words that hold the code and the companion of one weight.
struct Pair {
  uint32_t code, companion;
};

// Encodes a weight. draw is called if the format draws. Quick requires a finite value.
template <Format F, bool Quick, class Draw>
ONEPASS_HD Pair encode_one(float value, const Draw& draw) {
  const uint32_t bits = to_bits(value);
  switch (F) {
    case Format::kFp32:
      return {bits, 0};
    case Format::kFp16:
      return {code_fp16(value) << 16, 0};
    case Format::kFp16Stochastic:
      return {uint32_t{encode_fp16_stochastic(value, value16(draw()) >> 3)} << 16, 0};
    case Format::kBf16Stochastic:
      return {
          Quick ? add_random(bits, draw(), 0) : round_bf16_stochastic(value, value16(draw())), 0};
    case Format::kKahanBf16: {
      const uint32_t code = round_bf16(value);
      return {code, round_bf16(left_over(value, from_bf16(code >> 16)))};
    }
    case Format::kKahanFp16: {
      const uint32_t code = code_fp16(value);
      return {code << 16, code_fp16(left_over(value, from_fp16(code))) << 16};
    }
    case Format::kMasterBf16:
      return {Quick ? bits + 0x8000u : round_half_away(value), bits};
    case Format::kMasterFp16:
      return {code_fp16(value) << 16, bits};
    case Format::kSplit16: {
      if (Quick) return {bits + 0x8000u, bits};
      const Split split = encode_split16(value);
      return {split.weight << 16, split.low};
    }
    case Format::kSplit8: {
      if (Quick) {
        const uint32_t rounded = add_random8(bits, draw());
        return {rounded + 0x8000u, rounded};
      }
      const Split split = encode_split8(value, value16(draw()));
      return {split.weight << 16, split.low << 8};
    }
    default:
      return {Quick ? bits + (0x7FFFu + (bits >> 16 & 1u)) : round_bf16(value), 0};
  }
}

// --- states with one scale per block of elements ---

// The arithmetic of the codes of a block format.
template <Format F, Kind K>
struct Block;
template <Kind K>
struct Block<Format::kMx8, K> {
  using Code = Mx8<K>;
};
template <Kind K>
struct Block<Format::kMx4, K> {
  using Code = Mx4<K>;
};

// The number that the format codes for a value. mx4 codes the square root of a second moment, and a
// relative moment divided by that root.
template <Format F, Kind K, class Math>
ONEPASS_HD float to_units(float value, float root, Math& math) {
  if (F != Format::kMx4 || K == kFirst) return value;
  if constexpr (Math::kQuick)  // a ratio is clamped later, and its root is not zero
    return K == kSecond ? math.sqrt_of_code(value) : math.div_by_code(value, root);
  else
    return K == kSecond ? math.sqrt(value) : ratio(value, root);
}
// The inverse of to_units; a second moment in mx4 also writes *root.
template <Format F, Kind K, bool Quick>
ONEPASS_HD float from_units(float units, float* root) {
  if (F != Format::kMx4 || K == kFirst) return units;
  if (K == kRelative) return units * (!Quick && *root == 0.0f ? 1.0f : *root);
  *root = units;
  return units * units;
}

// The codes and scales of the elements of one state that a thread holds in registers.
template <int Vector>
struct State {
  Raw raw;
  uint32_t scales[Lanes<Vector>::kVectors];
};

// Loads, decodes, encodes and stores a state.
template <Format F, Kind K, int Vector>
struct StateCodec {
  using L = Lanes<Vector>;
  using C = Codes<bits_of(F), Vector>;
  static constexpr int kBlock = block_of(F);
  static constexpr bool kScaled = kBlock > 1;
  static constexpr bool kDynamic = F == Format::kDynamic8;
  // Whether the codes are ratios that Quick decodes from the nibbles of one word.
  template <class Math>
  static constexpr bool kLifted =
      Math::kQuick && F == Format::kMx4 && K == kRelative && C::kNibbles;
  static constexpr bool kSigned = K != kSecond;                        // of the map of dynamic8
  static constexpr int kLanes = kDynamic ? kWarp : kMxBlock / Vector;  // lanes per scale
  static constexpr int kScales = kScaled ? (kDynamic ? 1 : L::kVectors) : 0;  // scales per thread

  using Scale = std::conditional_t<kDynamic, uint32_t, uint8_t>;

  // The addresses of the codes and of the first scale of the thread. offset: position of the warp's
  // first element behind the addresses of `base`. Near is that of offset_by.
  template <bool Near>
  __device__ __forceinline__ static Stored place(const Stored& base, int offset, const L& lanes) {
    constexpr bool kNear = Near && !kDynamic;
    Stored at{C::template address<Near>(base.data, offset, lanes), nullptr};
    if (kScaled) {
      const unsigned block = static_cast<unsigned>(offset + lanes.at(0)) / kBlock;
      at.extra = offset_by<kNear>(base.extra, block * sizeof(Scale));
    }
    return at;
  }
  // The scale of a vector, at the address that place returned.
  __device__ __forceinline__ static Scale* scale_at(const Stored& at, int v) {
    return static_cast<Scale*>(at.extra) + v * L::kStretch / kBlock;
  }

  // Loads from the addresses that place returned. Full and Shared are those of Codes::load.
  template <bool Full, bool Shared>
  __device__ __forceinline__ static void load(
      const Stored& from, const L& lanes, State<Vector>& state) {
    C::template load<Full, Shared>(from.data, lanes, state.raw);
#pragma unroll
    for (int v = 0; v < kScales; ++v) {
      state.scales[v] = 0;
      if (Full || lanes.at(v * Vector) < lanes.left)
        state.scales[v] = *global_unless<Shared>(static_cast<const Scale*>(scale_at(from, v)));
    }
  }

  // Prefetches what load<true> reads Ahead elements later.
  template <int Ahead>
  __device__ __forceinline__ static void fetch(const Stored& from) {
    C::template fetch<Ahead>(from.data);
    if (kScaled) fetch_ahead(scale_at(from, 0) + Ahead / kBlock);
  }

  template <class Math>
  __device__ __forceinline__ static void decode(
      const State<Vector>& state, float (&values)[kElements], float (&roots)[kElements],
      Math& math) {
    if constexpr (F == Format::kMx8 && K == kSecond) {
#pragma unroll
      for (int w = 0; w < kElements / 4; ++w)
        math.note_codes(state.raw[w], state.scales[w / (Vector / 4)]);
    }
    if constexpr (F == Format::kMx4 && K == kSecond) {
#pragma unroll
      for (int v = 0; v < kScales; ++v) math.note_roots(state.scales[v] == 0);
    }
    static_assert(!Math::kQuick || F != Format::kMx4 || C::kNibbles, "Quick needs eight codes");
    if constexpr (kLifted<Math>) math.note_ratios(state.raw[0]);
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      if constexpr (kLifted<Math>) {
        // 2^23 + the lower three bits of the code, and a word with the sign in its uppermost bit.
        const unsigned byte = static_cast<unsigned>(j / 2);
        const uint32_t steps = C::nibbles(state.raw, j % 2 != 0) & 0x07070707u;
        const uint32_t lifted = select_bytes(steps, 0x4B000000u, 0x7440u | byte);
        const uint32_t above = j % 2 != 0 ? state.raw[0] : state.raw[0] << 4;
        const uint32_t sign = select_bytes(above, 0, byte << 12 | 0x444u) & ~kMagnitude;
        const float step = Ratio::decoder(state.scales[0]);
        const float size = Ratio::decode_lifted(from_bits(lifted), step);
        values[j] = from_bits(to_bits(size) | sign) * roots[j];
        continue;
      }
      if constexpr (F == Format::kMx8) {
        using Code = typename Block<F, K>::Code;
        const uint32_t upper = select_bytes(state.raw[j / 4], 0, j % 4 << 12 | 0x444);
        const uint32_t scale = state.scales[j / Vector];
        if constexpr (Math::kQuick && K == kSecond)
          values[j] = Code::decode_upper_normal(upper, scale);
        else
          values[j] = Code::decode_upper(upper, scale);
        continue;
      }
      const uint32_t code = C::get(state.raw, j);
      if constexpr (kDynamic) {
        values[j] = map_of<kSigned, Math::kQuick>().values[code] * from_bits(state.scales[0]);
      } else if constexpr (kScaled) {
        using Code = typename Block<F, K>::Code;
        const float units = Code::decode(code, Code::decoder(state.scales[j / Vector]));
        values[j] = from_units<F, K, Math::kQuick>(units, &roots[j]);
      } else {
        values[j] = decode_one<F, Math::kQuick>(code, 0);
      }
    }
  }

  template <bool Full, class Math>
  __device__ __forceinline__ static void encode(
      const float (&values)[kElements], const Random& random, int use, const L& lanes,
      State<Vector>& state, float (&roots)[kElements], Math& math) {
    uint32_t words[kElements];
    if constexpr (!kScaled) {
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        if constexpr (F != Format::kFp32) math.note_finite(values[j]);
        const auto draw = [&] { return random.draw(use, lanes.at(j)); };
        words[j] = encode_one<F, Math::kQuick>(values[j], draw).code;
      }
      C::template pack<code_bit(F)>(words, state.raw);
    } else {
      uint32_t largest[kScales] = {}, least[kScales];
#pragma unroll
      for (int v = 0; v < kScales; ++v) least[v] = ~0u;
      float units[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        units[j] = Full || lanes.has(j) ? to_units<F, K>(values[j], roots[j], math) : 0.0f;
        const int v = kDynamic ? 0 : j / Vector;
        const uint32_t bits = to_bits(units[j]);
        largest[v] = max_u32(largest[v], measure<Math::kQuick>(units[j]));
        least[v] = bits < least[v] ? bits : least[v];  // removed by the compiler if unused
      }
#pragma unroll
      for (int v = 0; v < kScales; ++v) {
        if constexpr (Math::kQuick && F == Format::kMx4 && K == kSecond)
          math.note_largest_root(largest[v]);
        else
          math.note_largest(largest[v]);
        largest[v] = largest_in<kLanes>(largest[v]);
        if constexpr (F == Format::kMx8 && K == kSecond) math.note_seconds(least[v], largest[v]);
      }
      if constexpr (kDynamic) {
        const bool finite = Math::kQuick || largest[0] < kInfinity;
        const float divisor = largest[0] == 0 ? 1.0f : from_bits(largest[0]);
        state.scales[0] = finite ? largest[0] : kNan32;
        math.note_divisor(largest[0]);
        const DynamicMap& map = map_of<kSigned, Math::kQuick>();
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          const float quotient = math.div_in_range(units[j], divisor);
          words[j] = finite ? encode_dynamic_upper<kSigned>(quotient, map) : 0u;
        }
        C::template pack<24>(words, state.raw);
      } else {
        using Code = typename Block<F, K>::Code;
#pragma unroll
        for (int v = 0; v < kScales; ++v) {
          if constexpr (Code::kTakesLeast)
            state.scales[v] = Code::scale(largest[v], ~largest_in<kLanes>(~least[v]));
          else
            state.scales[v] = Code::scale(largest[v], math);
        }
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          const uint32_t scale = state.scales[j / Vector];
          const Random16 bits = random.draw(use, lanes.at(j));
          if constexpr (Math::kQuick && F == Format::kMx8) {
            if constexpr (K == kSecond)
              words[j] = Code::encode_from(largest[j / Vector] != 0, units[j], bits, scale);
            else
              words[j] = Code::encode_magnitude(units[j], bits, scale);
          } else if constexpr (kLifted<Math>) {
            words[j] = Code::dithered(Ratio::clamped(units[j]), bits, Code::encoder(scale, math));
          } else {
            const uint32_t finite = Code::encode(units[j], bits, Code::encoder(scale, math));
            const uint32_t code = !Math::kQuick && scale == kNotFinite ? Code::kNan : finite;
            // mx4 packs two elements into a byte; the second may be past the end of the chunk.
            words[j] = Full || lanes.has(j) ? code : 0u;
            if constexpr (K == kSecond && F == Format::kMx4) {
              const auto unit = Code::decoder(scale);
              roots[j] = Code::decode(code, Math::kQuick ? Code::divisor(unit, scale) : unit);
            }
          }
        }
        C::template pack<kLifted<Math> ? 16 : 0>(words, state.raw);
        if constexpr (kLifted<Math>) {
#pragma unroll
          for (int j = 0; j < kElements; ++j) words[j] = to_bits(units[j]);
          const uint32_t even = C::template four<3>(words, 0), odd = C::template four<3>(words, 1);
          state.raw[0] |= (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
        }
        if constexpr (Math::kQuick && F == Format::kMx8 && K != kSecond) {
          Raw signs;
#pragma unroll
          for (int j = 0; j < kElements; ++j) words[j] = to_bits(units[j]);
          C::template pack<24>(words, signs);
#pragma unroll
          for (int w = 0; w < kElements / 4; ++w) state.raw[w] |= signs[w] & 0x80808080u;
        }
      }
    }
  }

  // The bits whose block maximum determines the scale.
  template <bool Quick>
  ONEPASS_HD static uint32_t measure(float units) {
    if constexpr (kDynamic)
      return to_bits(units) & kMagnitude;
    else if constexpr (Quick && F == Format::kMx4 && K == kRelative)
      return to_bits(Ratio::clamped(units));
    else
      return Block<F, K>::Code::measure(units);
  }

  // Stores to the addresses that place returned.
  template <bool Full>
  __device__ __forceinline__ static void store(
      const Stored& to, const L& lanes, const State<Vector>& state) {
    C::template store<Full>(to.data, lanes, state.raw);
#pragma unroll
    for (int v = 0; v < kScales; ++v)
      if (lanes.lane % kLanes == 0 && (Full || lanes.at(v * Vector) < lanes.left))
        *global(scale_at(to, v)) = static_cast<Scale>(state.scales[v]);
  }
};

}  // namespace onepass::cuda
