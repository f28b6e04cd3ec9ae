// The kernels of one instruction set: included once by each of kernels_{plain,avx2,avx512}.cpp,
// which setup.py compiles with that set's flags. Plain loops over headers that CUDA shares; the
// compiler vectorises them. No other header than ours: an inline function of the standard library
// compiled here could be the copy that the linker keeps for everybody.
#pragma once

#include "kernels.h"

namespace onepass::cpu {
namespace {

template <class Rule>
void apply_rule(
    const float* __restrict row, int n, float* __restrict param, const float* __restrict grad,
    float* const* states) {
  typename Rule::Hyper hyper;
  static_assert(sizeof hyper <= (kHyperWidth - 1) * sizeof(float), "row too narrow");
  const float grad_scale = row[0];
  __builtin_memcpy(&hyper, row + 1, sizeof hyper);
  constexpr bool kHas0 = Rule::kSlots & 1, kHas1 = Rule::kSlots & 2, kHas2 = Rule::kSlots & 4;
  float* __restrict state0 = states[0];
  float* __restrict state1 = states[1];
  float* __restrict state2 = states[2];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    float value0 = 0, value1 = 0, value2 = 0;
    if (kHas0) value0 = state0[i];
    if (kHas1) value1 = state1[i];
    if (kHas2) value2 = state2[i];
    Rule::update(hyper, param[i], grad_scale * grad[i], value0, value1, value2);
    if (kHas0) state0[i] = value0;
    if (kHas1) state1[i] = value1;
    if (kHas2) state2[i] = value2;
  }
}

template <class Rule, bool = Rule::kValid>
struct Pick {
  static constexpr RuleFn fn = apply_rule<Rule>;
};
template <class Rule>
struct Pick<Rule, false> {
  static constexpr RuleFn fn = nullptr;
};

template <float (*Decode)(uint16_t)>
void decode16(const void* src, int64_t first, int n, float* __restrict tile) {
  const uint16_t* __restrict codes = static_cast<const uint16_t*>(src) + first;
#pragma omp simd
  for (int i = 0; i < n; ++i) tile[i] = Decode(codes[i]);
}

template <uint16_t (*Encode)(float)>
void encode16(
    const float* __restrict tile, int64_t first, int n, void* dst, RandomKey, uint32_t, int) {
  uint16_t* __restrict codes = static_cast<uint16_t*>(dst) + first;
#pragma omp simd
  for (int i = 0; i < n; ++i) codes[i] = Encode(tile[i]);
}

void encode_bf16_stochastic_tile(
    const float* __restrict tile, int64_t first, int n, void* dst, RandomKey key, uint32_t low,
    int shift) {
  uint16_t* __restrict codes = static_cast<uint16_t*>(dst) + first;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t random = random_bits(key, low + static_cast<uint32_t>(i)) >> shift & 0xFFFFu;
    codes[i] = encode_bf16_stochastic(tile[i], random);
  }
}

}  // namespace

#define ONEPASS_VARIANTS(CODE, RULE)                                                          \
  {Pick<RULE<0>>::fn,  Pick<RULE<1>>::fn,  Pick<RULE<2>>::fn,  Pick<RULE<3>>::fn,             \
   Pick<RULE<4>>::fn,  Pick<RULE<5>>::fn,  Pick<RULE<6>>::fn,  Pick<RULE<7>>::fn,             \
   Pick<RULE<8>>::fn,  Pick<RULE<9>>::fn,  Pick<RULE<10>>::fn, Pick<RULE<11>>::fn,            \
   Pick<RULE<12>>::fn, Pick<RULE<13>>::fn, Pick<RULE<14>>::fn, Pick<RULE<15>>::fn},

// fp32 has no entry: the rule works on the tensor itself.
#define ONEPASS_KERNELS                                                  \
  {                                                                      \
    {ONEPASS_FOR_EACH_RULE(ONEPASS_VARIANTS)},                           \
        {nullptr, decode16<decode_bf16>, decode16<decode_fp16>,          \
         decode16<decode_bf16>},                                         \
        {nullptr, encode16<encode_bf16>, encode16<encode_fp16>,          \
         encode_bf16_stochastic_tile},                                   \
  }

}  // namespace onepass::cpu
