// Two bf16 elements in one 32-bit word.
#pragma once

#include "../portability.h"

namespace onepass::cpu {
namespace {

// Two neighbouring 16-bit elements as one word. Splitting a word and joining the halves cost one
// operation per element, whereas widening and narrowing 16-bit vectors cost permutations.
typedef uint32_t Pair __attribute__((aligned(2), may_alias));

// The bf16 in the lower and in the upper half of a word; join puts the upper halves of two words
// together.
ONEPASS_HD float lower(uint32_t pair) { return from_bits(pair << 16); }
ONEPASS_HD float upper(uint32_t pair) { return from_bits(pair & 0xFFFF0000u); }
ONEPASS_HD uint32_t join(uint32_t low, uint32_t high) { return low >> 16 | (high & 0xFFFF0000u); }

}  // namespace
}  // namespace onepass::cpu
