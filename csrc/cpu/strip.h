// A strip, 32 consecutive elements: the order of its elements in a buffer, two 16-bit values in one
// 32-bit word, and its random bits.
#pragma once

#include "kernels.h"

namespace onepass::cpu {
namespace {

// The elements of a strip, the strips of a tile, and the pairs of elements of a strip. A strip
// begins at a multiple of 32, so it is one block of mx8 or mx4.
constexpr int kStrip = kMxBlock;
constexpr int kStrips = kTile / kStrip;
constexpr int kPairs = kStrip / 2;

// The order of the fp32 elements of a strip in its buffer; buffer elements i and i + kPairs form
// pair i. kInOrder: as in memory, so the elements of a pair are kPairs apart. kByPairs: pair i has
// the elements 2i and 2i + 1 in memory, so it is a word of a 16-bit tensor.
enum Order { kInOrder, kByPairs };

// --- pairs ---

// Two neighbouring 16-bit elements as one word. Splitting a word and joining the halves cost one
// operation per element, whereas widening and narrowing 16-bit vectors cost permutations.
typedef uint32_t Pair __attribute__((aligned(2), may_alias));
typedef uint16_t Half16 __attribute__((may_alias));  // one half of a pair

// A value in both halves of a word.
constexpr uint32_t twice(uint32_t value) { return value << 16 | value; }

// The bf16 in the lower and in the upper half of a word; join puts the upper halves of two words
// together.
ONEPASS_HD float lower(uint32_t pair) { return from_bits(pair << 16); }
ONEPASS_HD float upper(uint32_t pair) { return from_bits(pair & 0xFFFF0000u); }
ONEPASS_HD uint32_t join(uint32_t low, uint32_t high) { return low >> 16 | (high & 0xFFFF0000u); }

// --- random bits ---

// Draws one random word per element of a strip, or of its first n elements, that begins at position
// offset of the tile.
ONEPASS_HD void draw(
    const TileRandom& random, int word, int offset, int n, uint32_t* __restrict words) {
  const RandomKey key = random.keys[word];
  const uint32_t start = random_start(key, random.low + static_cast<uint32_t>(offset));
#pragma omp simd
  for (int i = 0; i < n; ++i) words[i] = random_mix(key, start + static_cast<uint32_t>(i) * kWeyl);
}
template <Order Of>
ONEPASS_HD void draw_strip(
    const TileRandom& random, int word, int offset, uint32_t* __restrict words) {
  constexpr uint32_t kNext = Of == kByPairs ? 2 * kWeyl : kWeyl;
  constexpr uint32_t kSecond = Of == kByPairs ? kWeyl : kPairs * kWeyl;
  const RandomKey key = random.keys[word];
  const uint32_t start = random_start(key, random.low + static_cast<uint32_t>(offset));
#pragma omp simd
  for (int i = 0; i < kPairs; ++i) {
    const uint32_t at = start + static_cast<uint32_t>(i) * kNext;
    words[i] = random_mix(key, at);
    words[i + kPairs] = random_mix(key, at + kSecond);
  }
}

// The 16 random bits of one use: those of each word from bit `shift` up.
struct Random {
  const uint32_t* words;
  int shift;
  ONEPASS_HD uint32_t operator[](int i) const { return words[i] >> shift & 0xFFFFu; }
};

}  // namespace
}  // namespace onepass::cpu
