#include "sweep.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "../prefetch.h"
#include "rounding.h"

namespace onepass::cpu {
namespace {

// fp32 buffers for tensors that are not fp32, small enough that the reads, update and writes of a
// tile overlap.
struct Tiles {
  alignas(64) float param[kTile], grad[kTile], states[kMaxStates][kTile], roots[kTile];
  alignas(64) float before[kTile];    // the weight before the update, for telemetry
  alignas(64) uint32_t codes[kTile];  // its codes, for a record of changes
};

// Whether a state of the entry draws random bits.
bool states_draw(const Entry& entry) {
  bool draw = false;
  for (int k = 0; k < kMaxStates; ++k)
    draw = draw || (entry.has(k) && is_stochastic(entry.state_formats[k]));
  return draw;
}

// The direct kernel for the formats of an entry, or null.
const Direct* direct_kernel(const Kernels& kernels, const Entry& entry) {
  for (const Direct& direct : kernels.direct) {
    bool same = entry.param_format == direct.weight && entry.grad_format == direct.grad;
    for (int k = 0; k < kMaxStates; ++k)
      same = same && (!entry.has(k) || entry.state_formats[k] == direct.state);
    if (same && direct.rules[entry.rule][entry.flags]) return &direct;
  }
  return nullptr;
}

// The address of element index of a tensor and of its scales or companion.
Stored element(const Stored& base, Format format, int64_t index) {
  return {
      static_cast<char*>(base.data) + bytes_of(format, index),
      static_cast<char*>(base.extra) + extra_bytes_of(format, index)};
}

// Updates n elements from first on: decodes, applies the rule, encodes. fp32 tensors are updated in
// place. A non-null telemetry is added to; a skipped step does nothing else.
void sweep_tile(
    const Kernels& kernels, const Entry& entry, int64_t first, int n, const float* row,
    const TileRandom& random, bool skipped, Telemetry* telemetry, Tiles& tiles) {
  const auto open = [&](Format format, Kind kind, const Stored& from, float* tile) {
    if (format == Format::kFp32) return static_cast<float*>(from.data) + first;
    kernels.decode[static_cast<int>(format)][kind](from, first, n, tile, tiles.roots);
    return tile;
  };
  const auto close = [&](Format format, Kind kind, const float* tile, const Stored& to, int use) {
    if (format != Format::kFp32)
      kernels.encode[static_cast<int>(format)][kind](tile, first, n, to, random, use, tiles.roots);
  };
  const Stored grad_at{entry.grad, nullptr};
  float* param = open(entry.param_format, kFirst, entry.param, tiles.param);
  const float* grad = open(entry.grad_format, kFirst, grad_at, tiles.grad);
  if (skipped) {
    if (telemetry) kernels.measure(grad, param, param, n, telemetry);
    return;
  }
  if (telemetry) std::copy_n(param, n, tiles.before);
  const int64_t weight_bytes = bytes_of(entry.param_format, 1);
  char* const weights = static_cast<char*>(entry.param.data) + first * weight_bytes;
  if (entry.changed) std::memcpy(tiles.codes, weights, n * weight_bytes);
  Stored states[kMaxStates] = {};
  for (const int k : entry.order)
    if (entry.has(k))
      states[k].data =
          open(entry.state_formats[k], entry.kinds[k], entry.states[k], tiles.states[k]);
  const RuleFn rule = kernels.direct[0].rules[entry.rule][entry.flags];
  rule(row, n, {param, nullptr}, grad, states, random, nullptr);
  if (telemetry) kernels.measure(grad, tiles.before, param, n, telemetry);
  if (entry.ema) kernels.average(row, param, n, entry.ema + first);
  close(
      entry.param_format, kFirst, param, entry.param,
      weight_use(entry.param_format, states_draw(entry)));
  for (const int k : entry.order)
    if (entry.has(k))
      close(
          entry.state_formats[k], entry.kinds[k], static_cast<float*>(states[k].data),
          entry.states[k], state_use(k));
  if (entry.changed)
    kernels.compare[weight_bytes / 4](tiles.codes, weights, n, first, entry.changed);
}

// The bits of a word of a record of changes.
constexpr int64_t kWordBits = 32;

// The most elements that are updated before their gradients are zeroed, so that the gradients are
// still in the L1 cache.
constexpr int64_t kZeroed = 4096;

// Updates elements [begin, end) of one entry.
void sweep_entry(
    const Kernels& kernels, const Entry& entry, int64_t begin, int64_t end, const StepArgs& step,
    Telemetry* telemetry, Tiles& tiles) {
  const float* row = step.hyper + int64_t{entry.row} * kHyperWidth;
  const int64_t* counters = step.counters + int64_t{entry.row} * 2;
  const bool skipped = counters[1] == 0;
  if (skipped && !step.zero_grads && !telemetry) return;
  const bool plain = !skipped && !entry.ema && !telemetry;
  const Direct* direct = plain ? direct_kernel(kernels, entry) : nullptr;
  const int64_t most = step.zero_grads ? kZeroed : kPiece;
  const bool draws = is_stochastic(entry.param_format) || states_draw(entry);
  const uint32_t words = entry.slots >> 3 ? kRandomWords : 2;
  const uint64_t stream =
      draws ? random_stream(
                  static_cast<uint64_t>(counters[0]), static_cast<uint64_t>(counters[1]),
                  static_cast<uint64_t>(entry.param_id))
            : 0;
  for (int64_t first = begin; first < end;) {
    const bool whole = direct && end - first >= direct->step;
    int64_t n = std::min<int64_t>(whole ? most : kTile, end - first);
    if (whole) n -= n % direct->step;
    TileRandom random{};
    if (draws) {
      const uint64_t index = static_cast<uint64_t>(entry.first + first);
      const uint32_t high = static_cast<uint32_t>(index >> 32);
      random.low = static_cast<uint32_t>(index);
      n = std::min<int64_t>(n, (int64_t{1} << 32) - random.low);
      for (uint32_t word = 0; word < words; ++word)
        random.keys[word] = random_key(stream, high, word);
    }
    // A direct kernel records changes from bit 0 of a word on.
    const bool recordable = !entry.changed || first % kWordBits == 0;
    const bool fused = whole && n % direct->step == 0 && recordable;
    // (Before the index wraps, more than a tile may be left that is not a multiple of step.)
    if (!fused) n = std::min<int64_t>(n, kTile);
    if (fused) {
      Stored states[kMaxStates] = {};
      for (int k = 0; k < kMaxStates; ++k)
        if (entry.has(k)) states[k] = element(entry.states[k], entry.state_formats[k], first);
      const Stored grad = element({entry.grad, nullptr}, entry.grad_format, first);
      direct->rules[entry.rule][entry.flags](
          row, static_cast<int>(n), element(entry.param, entry.param_format, first), grad.data,
          states, random, entry.changed ? entry.changed + first / kWordBits : nullptr);
    } else {
      sweep_tile(
          kernels, entry, first, static_cast<int>(n), row, random, skipped, telemetry, tiles);
    }
    if (step.zero_grads)
      std::memset(
          static_cast<char*>(entry.grad) + bytes_of(entry.grad_format, first), 0,
          bytes_of(entry.grad_format, n));
    first += n;
  }
}

// Small tensors are scattered in memory, so their cache lines are prefetched this many entries
// ahead.
constexpr int64_t kEntriesAhead = 4;

// Prefetches the tensors of an entry of at most one tile.
void prefetch_entry(const Entry& entry) {
  if (entry.numel > kTile) return;
  const auto stored = [&](const Stored& tensor, Format format) {
    prefetch_lines(tensor.data, bytes_of(format, entry.numel));
    prefetch_lines(tensor.extra, extra_bytes_of(format, entry.numel));
  };
  stored(entry.param, entry.param_format);
  prefetch_lines(entry.grad, bytes_of(entry.grad_format, entry.numel));
  for (int k = 0; k < kMaxStates; ++k)
    if (entry.has(k)) stored(entry.states[k], entry.state_formats[k]);
}

}  // namespace

std::vector<Cut> cut_pieces(const std::vector<Entry>& entries) {
  std::vector<Cut> cuts;
  int64_t room = 0;  // the cost that still fits into the current piece
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
    const StepArgs& step) {
  const int64_t pieces = static_cast<int64_t>(cuts.size()) - 1;
  if (pieces <= 0) return;
  const int64_t count = static_cast<int64_t>(entries.size());
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), pieces);
  Runs runs(pieces, threads);
  // Telemetry per piece, in the order of its entries, so that the sums do not depend on which
  // thread took which piece.
  std::vector<std::vector<std::pair<int32_t, Telemetry>>> measured(step.telemetry ? pieces : 0);
  const auto work = [&](int64_t, int64_t) {
    DefaultRounding rounding;
    Tiles tiles;
    runs.work([&](int64_t piece) {
      const int64_t last = std::min(cuts[piece + 1].entry, count - 1);
      for_each_part(entries, cuts, piece, [&](int64_t e, int64_t begin, int64_t end) {
        if (e + kEntriesAhead <= last) prefetch_entry(entries[e + kEntriesAhead]);
        const Entry& entry = entries[e];
        Telemetry* into = nullptr;
        if (step.telemetry) into = &measured[piece].emplace_back(entry.row, Telemetry{}).second;
        sweep_entry(kernels, entry, begin, end, step, into, tiles);
      });
    });
  };
  if (threads == 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, work);
  for (const auto& piece : measured)
    for (const auto& [row, found] : piece) {
      Telemetry& total = step.telemetry[row];
      total.grads += found.grads;
      total.weights += found.weights;
      total.updates += found.updates;
      total.nonfinite += found.nonfinite;
    }
}

}  // namespace onepass::cpu
