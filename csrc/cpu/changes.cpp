// The op take_changes: the changed weights of a list of parameters on the CPU, from their records
// of changes (Entry::changed).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <unordered_set>
#include <vector>

#include "../prefetch.h"

namespace onepass::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWordBits = 32;
constexpr int64_t kPieceWords = 4096;  // words of a record that a thread takes at once
constexpr int64_t kBlockWords = 256;   // words of a block; see Found
constexpr int64_t kGroupWords = 8;     // words that are tested for zero together
constexpr int kExpected = 2;           // changes in two words that are found without a branch

// Consecutive words of the record of one parameter.
struct Piece {
  uint32_t* words;
  const void* weights;  // the whole parameter
  int64_t param, begin, end, found;
};

// The number of elements from the first to the last one in memory.
int64_t extent_of(const Tensor& tensor) {
  int64_t extent = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  return extent;
}

// Divides the records into pieces and checks every argument. A record that occurs twice, or a bit
// beyond the last weight, would be an access outside of a tensor.
std::vector<Piece> pieces_of(
    const std::vector<Tensor>& records, const std::vector<Tensor>& params, int64_t bytes) {
  STD_TORCH_CHECK(
      records.size() == params.size() && !params.empty(), "onepass: a record for each parameter");
  std::vector<Piece> pieces;
  std::unordered_set<const void*> seen;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t words = (params[i].numel() + kWordBits - 1) / kWordBits;
    STD_TORCH_CHECK(
        records[i].scalar_type() == ScalarType::Int && records[i].is_contiguous() &&
            records[i].numel() == words,
        "onepass: record ", i, " must be a contiguous int32 tensor of ", words, " elements");
    STD_TORCH_CHECK(
        params[i].scalar_type() == params[0].scalar_type() &&
            static_cast<int64_t>(params[i].element_size()) == bytes,
        "onepass: the parameters must have one dtype, float32, bfloat16 or float16");
    if (!words) continue;
    auto* const first = static_cast<uint32_t*>(records[i].mutable_data_ptr());
    const int64_t used = params[i].numel() % kWordBits;
    STD_TORCH_CHECK(
        extent_of(params[i]) == params[i].numel() && first && params[i].const_data_ptr(),
        "onepass: parameter ", i, " must be dense, with memory");
    STD_TORCH_CHECK(
        (!used || !(first[words - 1] >> used)) && seen.insert(first).second, "onepass: record ", i,
        " has bits beyond the last weight, or occurs twice");
    for (int64_t begin = 0; begin < words; begin += kPieceWords)
      pieces.push_back(
          {first, params[i].const_data_ptr(), static_cast<int64_t>(i), begin,
           std::min(begin + kPieceWords, words), 0});
  }
  return pieces;
}

// Calls body(piece) for all pieces, on all threads.
template <class Body>
void for_each(std::vector<Piece>& pieces, const Body& body) {
  const int64_t count = static_cast<int64_t>(pieces.size());
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(pieces[i]);
  };
  if (count <= 1)
    some(0, count);
  else
    torch::stable::parallel_for(0, count, 1, some);
}

// The number of bits that are set in n words, without the instruction that not every x86-64
// processor has.
int64_t count_bits(const uint32_t* words, int64_t n) {
  uint32_t found = 0;  // at most 2^17 bits in a piece
#pragma omp simd reduction(+ : found)
  for (int64_t i = 0; i < n; ++i) {
    uint32_t word = words[i];
    word -= (word >> 1) & 0x55555555u;
    word = (word & 0x33333333u) + ((word >> 2) & 0x33333333u);
    word = (word + (word >> 4)) & 0x0F0F0F0Fu;
    word += word >> 8;
    found += (word + (word >> 16)) & 0x3Fu;
  }
  return found;
}

// The changed weights of a block of a record: offsets from its first weight.
struct Found {
  int64_t first = 0;
  int count = 0;
  uint16_t offsets[kBlockWords * kWordBits + kExpected];
};

// Finds the changed weights of words [begin, end) of a record, prefetches them and clears the
// words. Whether a word has a change is unpredictable when one weight in a hundred has changed, so
// there is no branch for each word and each change.
template <class Code>
void find(uint32_t* words, const Code* weights, int64_t begin, int64_t end, Found& found) {
  found.first = begin * kWordBits;
  int count = 0;
  const auto take = [&](uint64_t bits, int64_t first) {
    for (int i = 0; i < kExpected; ++i) {
      found.offsets[count] =
          static_cast<uint16_t>(first + __builtin_ctzll(bits | uint64_t{1} << 63));
      count += bits != 0;
      bits &= bits - 1;
    }
    for (; __builtin_expect(bits != 0, 0); bits &= bits - 1)
      found.offsets[count++] = static_cast<uint16_t>(first + __builtin_ctzll(bits));
  };
  int64_t word = begin;
  for (; word + kGroupWords <= end; word += kGroupWords) {
    uint64_t pairs[kGroupWords / 2], any = 0;
    std::memcpy(pairs, words + word, sizeof pairs);
    for (const uint64_t pair : pairs) any |= pair;
    if (!any) continue;
    for (int i = 0; i < kGroupWords / 2; ++i) take(pairs[i], (word - begin + 2 * i) * kWordBits);
  }
  for (; word < end; ++word) take(words[word], (word - begin) * kWordBits);
  std::fill(words + begin, words + end, 0);
  found.count = count;
  for (int i = 0; i < count; ++i) prefetch_lines(weights + found.first + found.offsets[i], 1);
}

// Writes the positions and codes of the changed weights of a piece, and clears its bits. The codes
// of a block are read when the next block has been searched: most are in different cache lines,
// which arrive in the meantime.
template <class Code, class Position>
void take_piece(const Piece& piece, Position* positions, Code* codes) {
  const Code* const weights = static_cast<const Code*>(piece.weights);
  Found blocks[2];
  int now = 0;
  for (int64_t word = piece.begin; word < piece.end + kBlockWords; word += kBlockWords) {
    Found& last = blocks[1 - now];
    blocks[now].count = 0;
    if (word < piece.end)
      find(piece.words, weights, word, std::min(word + kBlockWords, piece.end), blocks[now]);
    for (int i = 0; i < last.count; ++i) {
      const int64_t at = last.first + last.offsets[i];
      *positions++ = static_cast<Position>(at);
      *codes++ = weights[at];
    }
    now = 1 - now;
  }
}

// The op take_changes.
std::tuple<Tensor, Tensor, Tensor> take_changes(
    std::vector<Tensor> records, std::vector<Tensor> params, bool wide) {
  const int64_t bytes = params.empty() ? 0 : static_cast<int64_t>(params[0].element_size());
  STD_TORCH_CHECK(bytes == 2 || bytes == 4, "onepass: weights must have 2 or 4 bytes");
  std::vector<Piece> pieces = pieces_of(records, params, bytes);
  for_each(pieces, [](Piece& piece) {
    piece.found = count_bits(piece.words + piece.begin, piece.end - piece.begin);
  });
  const int64_t count = static_cast<int64_t>(params.size());
  Tensor counts = torch::stable::new_empty(records[0], {count}, ScalarType::Long);
  auto* const of_param = counts.mutable_data_ptr<int64_t>();
  std::fill_n(of_param, count, 0);
  int64_t total = 0;
  for (Piece& piece : pieces) {
    of_param[piece.param] += piece.found;
    total += piece.found;
    piece.found = total - piece.found;  // from here on, the number of changes before the piece
  }
  Tensor positions =
      torch::stable::new_empty(records[0], {total}, wide ? ScalarType::Long : ScalarType::Int);
  Tensor values = torch::stable::new_empty(params[0], {total});
  const auto take = [&](auto code, auto position) {
    using Code = decltype(code);
    using Position = decltype(position);
    auto* const to = static_cast<Position*>(positions.mutable_data_ptr());
    auto* const codes = static_cast<Code*>(values.mutable_data_ptr());
    for_each(pieces, [&](const Piece& piece) {
      take_piece<Code, Position>(piece, to + piece.found, codes + piece.found);
    });
  };
  const auto take_codes = [&](auto code) { wide ? take(code, int64_t{}) : take(code, int32_t{}); };
  bytes == 2 ? take_codes(uint16_t{}) : take_codes(uint32_t{});
  return {counts, positions, values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, m) { m.impl("take_changes", TORCH_BOX(&take_changes)); }

}  // namespace onepass::cpu
