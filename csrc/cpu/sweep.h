// The CPU sweep: one walk over the whole parameter list, in pieces of equal cost that the threads
// take in turn. It knows neither algorithms nor formats.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace onepass::cpu {

// Elements of an fp32 tile: five of them (weight, gradient, three states) are 5 KiB of L1. Measured
// on AVX-512, two cores, 2026-11: 256 is the fastest of 64 to 2048.
constexpr int kTile = 256;
// A piece of work: large enough to hide the counter that hands it out, small enough that threads
// on a busy machine end together.
constexpr int64_t kPiece = 65536;
// What an entry costs beside its elements, in elements.
constexpr int64_t kEntryCost = 64;

// Where each piece begins: entry and element, in whole tiles.
struct Cut {
  int64_t entry, element;
};
std::vector<Cut> cut_pieces(const std::vector<Entry>& entries);

// hyper: kHyperWidth floats a row. counters: seed and step of each row.
void sweep(
    const Kernels& kernels, const std::vector<Entry>& entries, const std::vector<Cut>& cuts,
    const float* hyper, const int64_t* counters);

// The kernels of the instruction set in use: the best this machine has unless select_isa asked
// for another.
const Kernels& kernels();
// "auto", "plain", "avx2" or "avx512"; false where this machine or build lacks it.
bool select_isa(const char* name);
const char* isa_name();

}  // namespace onepass::cpu
