#include "sweep.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#if defined(ONEPASS_X86)
#include <xmmintrin.h>
#endif

namespace onepass::cpu {
namespace {

// The contract keeps denormals and rounds to nearest, whatever torch.set_flush_denormal says.
class DefaultRounding {
#if defined(ONEPASS_X86)
 public:
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

struct Tiles {
  alignas(64) float param[kTile], grad[kTile], states[kMaxStates][kTile];
};

// Elements [begin, end) of one entry, tile by tile: decode, rule, encode. fp32 tensors are worked
// on where they are.
void sweep_entry(
    const Kernels& kernels, const Entry& entry, int64_t begin, int64_t end, const float* row,
    const int64_t* counters, Tiles& tiles) {
  const RuleFn rule = kernels.rules[entry.rule][entry.flags];
  const auto in_place = [](Format format) { return format == Format::kFp32; };
  const auto decode = [&](Format format, const void* src, int64_t first, int n, float* tile) {
    kernels.decode[static_cast<int>(format)](src, first, n, tile);
  };
  bool random = false;
  for (int k = 0; k < kMaxStates; ++k)
    random |= entry.has(k) && entry.state_formats[k] == Format::kBf16Stochastic;
  uint64_t stream = 0;
  if (random)
    stream = random_stream(
        static_cast<uint64_t>(counters[0]), static_cast<uint64_t>(counters[1]),
        static_cast<uint64_t>(entry.param_id));

  for (int64_t first = begin; first < end; first += kTile) {
    const int n = static_cast<int>(std::min<int64_t>(kTile, end - first));
    float* param = static_cast<float*>(entry.param) + first;
    if (!in_place(entry.param_format))
      decode(entry.param_format, entry.param, first, n, param = tiles.param);
    const float* grad = static_cast<const float*>(entry.grad) + first;
    if (!in_place(entry.grad_format)) {
      decode(entry.grad_format, entry.grad, first, n, tiles.grad);
      grad = tiles.grad;
    }
    float* states[kMaxStates] = {};
    for (int k = 0; k < kMaxStates; ++k) {
      if (!entry.has(k)) continue;
      states[k] = static_cast<float*>(entry.states[k]) + first;
      if (!in_place(entry.state_formats[k]))
        decode(entry.state_formats[k], entry.states[k], first, n, states[k] = tiles.states[k]);
    }

    rule(row, n, param, grad, states);

    const auto encode = [&](Format format, const float* tile, void* dst, int slot) {
      const uint64_t index = static_cast<uint64_t>(entry.first + first);
      RandomKey key{};
      if (random) key = random_key(stream, static_cast<uint32_t>(index >> 32), slot / 2);
      kernels.encode[static_cast<int>(format)](
          tile, first, n, dst, key, static_cast<uint32_t>(index), slot % 2 * 16);
    };
    if (!in_place(entry.param_format)) encode(entry.param_format, param, entry.param, 0);
    for (int k = 0; k < kMaxStates; ++k)
      if (entry.has(k) && !in_place(entry.state_formats[k]))
        encode(entry.state_formats[k], states[k], entry.states[k], k);
  }
}

}  // namespace

std::vector<Cut> cut_pieces(const std::vector<Entry>& entries) {
  std::vector<Cut> cuts;
  int64_t room = 0;  // cost that the current piece still takes
  for (int64_t e = 0; e < static_cast<int64_t>(entries.size()); ++e) {
    const int64_t numel = entries[e].numel;
    for (int64_t element = 0; element < numel;) {
      if (room <= 0) {
        cuts.push_back({e, element});
        room = kPiece;
      }
      const int64_t tiles = std::max<int64_t>(1, (room - kEntryCost) / kTile);
      const int64_t taken = std::min(numel - element, tiles * kTile);
      element += taken;
      room -= taken + kEntryCost;
    }
  }
  cuts.push_back({static_cast<int64_t>(entries.size()), 0});
  return cuts;
}

void sweep(
    const Kernels& kernels, const std::vector<Entry>& entries, const std::vector<Cut>& cuts,
    const float* hyper, const int64_t* counters) {
  const int64_t pieces = static_cast<int64_t>(cuts.size()) - 1;
  if (pieces <= 0) return;
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    DefaultRounding rounding;
    Tiles tiles;
    for (int64_t piece = next++; piece < pieces; piece = next++) {
      const Cut from = cuts[piece], to = cuts[piece + 1];
      for (int64_t e = from.entry; e <= to.entry && e < static_cast<int64_t>(entries.size()); ++e) {
        const Entry& entry = entries[e];
        const int64_t begin = e == from.entry ? from.element : 0;
        const int64_t end = e == to.entry ? to.element : entry.numel;
        if (begin < end)
          sweep_entry(
              kernels, entry, begin, end, hyper + entry.row * kHyperWidth,
              counters + entry.row * 2, tiles);
      }
    }
  };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces);
  if (threads == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, work);
}

}  // namespace onepass::cpu
