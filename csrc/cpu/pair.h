// bf16 elements two at a time.
#pragma once

#include "../portability.h"

namespace onepass::cpu {
namespace {

// Two neighbours in one word: taking the word apart and together again costs one operation each,
// where widening and narrowing 16-bit vectors costs permutations.
typedef uint32_t Pair __attribute__((aligned(2), may_alias));

ONEPASS_HD float lower(uint32_t pair) { return from_bits(pair << 16); }
ONEPASS_HD float upper(uint32_t pair) { return from_bits(pair & 0xFFFF0000u); }
ONEPASS_HD uint32_t join(uint32_t low, uint32_t high) { return low >> 16 | (high & 0xFFFF0000u); }

}  // namespace
}  // namespace onepass::cpu
