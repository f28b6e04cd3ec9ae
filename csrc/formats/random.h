// The counter-based random number generator. onepass/numerics/random_bits.py specifies it, and
// tests/test_reference.py has its known answers.
#pragma once

#include "../portability.h"

namespace onepass {

// The two 32-bit keys that select a sequence of random words.
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

// The stream of one parameter at one step; param_id identifies the parameter.
ONEPASS_HD uint64_t random_stream(uint64_t seed, uint64_t step, uint64_t param_id) {
  return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ param_id);
}

// The key of 2^32 elements of one stream. high is the upper half of their element index; word
// numbers the 32-bit words of one element.
ONEPASS_HD RandomKey random_key(uint64_t stream, uint32_t high, uint32_t word) {
  const uint64_t key = splitmix64(stream ^ (static_cast<uint64_t>(word) << 32 | high));
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// The 32 random bits of an element are random_mix(key, random_start(key, low)), where low is the
// lower half of its index: a Weyl sequence, then the structure and constants of Wellons' 32-bit
// hash "lowbias32". A second key between the multiplications of the hash keeps two streams from
// being shifted copies of one sequence. (Without the Weyl step, elements 16 or 256 apart were
// measurably dependent.)
constexpr uint32_t kWeyl = 0x9E3779B9u;

// The Weyl sequence at index low. Loops add kWeyl to get the value of the next element.
ONEPASS_HD uint32_t random_start(RandomKey key, uint32_t low) { return low * kWeyl + key.k0; }

// The hash of a value of the Weyl sequence.
ONEPASS_HD uint32_t random_mix(RandomKey key, uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= (x >> 15) ^ key.k1;
  return x * 0x846CA68Bu;
}

// 16 random bits: those of a word from bit `shift` up. Functions that take them also take a
// uint32_t below 2^16.
struct Random16 {
  uint32_t word;
  int shift;  // 0, 8 or 16; a constant wherever the compiler sees it
};
ONEPASS_HD uint32_t value16(uint32_t random16) { return random16; }
ONEPASS_HD uint32_t value16(Random16 random) { return random.word >> random.shift & 0xFFFFu; }

// bits + (random << shift), for a shift of at most 7. A GPU selects, shifts and adds a half in one
// instruction: a dot product of the two halves with two bytes.
template <class Random>
ONEPASS_HD uint32_t add_random(uint32_t bits, Random random, int shift) {
  return bits + (value16(random) << shift);
}
#if defined(__CUDA_ARCH__)
template <>
ONEPASS_HD uint32_t add_random(uint32_t bits, Random16 random, int shift) {
  if (random.shift == 8) return bits + (__byte_perm(random.word, 0, 0x4421) << shift);
  return __dp2a_lo(random.word, (random.shift == 0 ? 1u : 256u) << shift, bits);
}
#endif
// bits + the lower 8 of the random bits.
ONEPASS_HD uint32_t add_random8(uint32_t bits, Random16 random) {
#if defined(__CUDA_ARCH__)
  return __dp4a(random.word, 1u << random.shift, bits);
#else
  return bits + (value16(random) & 0xFFu);
#endif
}

}  // namespace onepass
