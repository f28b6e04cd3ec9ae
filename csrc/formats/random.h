// The counter-based generator of the random bits: onepass/numerics/random_bits.py specifies it,
// with known answers in tests/test_reference.py.
#pragma once

#include "../portability.h"

namespace onepass {

struct RandomKey {
  uint32_t k0, k1;
};

// SplitMix64's output function (Steele, Lea, Flood, "Fast splittable pseudorandom number
// generators", 2014).
ONEPASS_HD uint64_t splitmix64(uint64_t z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

ONEPASS_HD uint64_t random_stream(uint64_t seed, uint64_t step, uint64_t param_id) {
  return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ param_id);
}

// The key of 2^32 elements of one stream: high is the index's upper half, word counts the 32-bit
// words drawn for one element.
ONEPASS_HD RandomKey random_key(uint64_t stream, uint32_t high, uint32_t word) {
  const uint64_t key = splitmix64(stream ^ (static_cast<uint64_t>(word) << 32 | high));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// 32 bits for the element whose index has the lower half low: a Weyl sequence, then the shape and
// constants of Wellons' 32-bit hash "lowbias32", with a second key between its multiplications, so
// that two streams are never shifted copies of one sequence. (Without the Weyl step elements 16 or
// 256 apart were measurably dependent.)
constexpr uint32_t kWeyl = 0x9E3779B9u;

// The Weyl sequence: the next element's value is this one's plus kWeyl, which is what loops do.
ONEPASS_HD uint32_t random_start(RandomKey key, uint32_t low) { return low * kWeyl + key.k0; }

ONEPASS_HD uint32_t random_mix(RandomKey key, uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= (x >> 15) ^ key.k1;
  return x * 0x846CA68Bu;
}

}  // namespace onepass
