// The ops of the CUDA library. CudaPlan adds tables in device memory to the plan of csrc/plan.h,
// and launches its kernels on the current stream of the plan's device.
#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "../plan_ops.h"
#include "aside.h"
#include "kernels.h"
#include "launch.h"
#include "side_streams.h"

namespace onepass::cuda {
namespace {

constexpr int64_t kWord = sizeof(int64_t);
static_assert(
    sizeof(Chunk) % kWord == 0 && sizeof(Span) == 2 * kWord && sizeof(Norm) == 3 * kWord,
    "tables are of int64");
constexpr int64_t kChunkWords = sizeof(Chunk) / kWord, kSpanWords = sizeof(Span) / kWord;

// The kernels of a rule by its code.
const RuleKernels& kernels_of(int rule) {
#define ONEPASS_KERNELS_OF(CODE, RULE, ARG) &k##RULE##Kernels,
  static const RuleKernels* const all[kRules] = {ONEPASS_FOR_EACH_RULE(ONEPASS_KERNELS_OF, )};
#undef ONEPASS_KERNELS_OF
  return *all[rule];
}

// Bit k: state k of an entry is a weight.
unsigned weights_of(const Entry& entry) { return kRuleInfo[entry.rule].weights; }

// The format of the first state that is not a weight, or of the first state; fp32 without states.
Format held_format(const Entry& entry) {
  Format found = Format::kFp32;
  for (int k = kMaxStates - 1; k >= 0; --k)
    if (entry.has(k)) found = entry.state_formats[k];
  for (int k = kMaxStates - 1; k >= 0; --k)
    if (entry.has(k) && !(weights_of(entry) >> k & 1)) found = entry.state_formats[k];
  return found;
}

// base + bytes; null stays null.
void* offset(void* base, int64_t bytes) {
  return base ? static_cast<char*>(base) + bytes : nullptr;
}

// The starts of the chunks of an entry, followed by its end. A chunk has at most `most` elements,
// or a quarter of that from position `taper` on. It ends where the element index is a multiple of
// 2^32, because the random keys change there.
std::vector<int64_t> cut_chunks(int64_t numel, int64_t first, int64_t most, int64_t taper) {
  constexpr int64_t kHalf = int64_t{1} << 32;
  std::vector<int64_t> cuts;
  for (int64_t at = 0; at < numel;) {
    cuts.push_back(at);
    const int64_t size = at < taper ? most : most / 4;
    const int64_t chunk = (at / size + 1) * size;
    const int64_t half = at + kHalf - (first + at) % kHalf;
    at = std::min(chunk, half);
  }
  cuts.push_back(numel);
  return cuts;
}

// The addresses of the gradients, on the host and in a table on the device.
struct Grads {
  std::vector<int64_t> addresses;
  Tensor table;
};

// The plan of one CUDA device.
struct CudaPlan : Plan {
  std::vector<Chunk> chunks;
  std::vector<Span> spans;                 // of each row; behind the chunks in chunk_table
  bool averages = false, records = false;  // whether any entry has an average, or a record
  std::vector<Format> grad_formats;  // the formats of gradients that the chunks were written with
  Tensor chunk_table;
  Grads grads;
  // A graph has its own gradient table, because eager steps and other graphs have other gradients.
  // Each replay copies the addresses again. The memory that replays use is never freed before the
  // plan (kept), because the plan does not know when the graph is last replayed.
  Grads captured;
  unsigned long long capture = 0;  // the ID of the capture of `captured`
  std::vector<Tensor> kept;
  bool chunks_captured = false;  // whether a graph reads the chunk table
  // The ID of the capture (0 for eager) whose tables hold the gradients that were taken.
  std::optional<unsigned long long> ready_in;
  SweepKernel kernel = nullptr;
  int threads = kTuning.threads;  // per block of that kernel
  void* made_on = nullptr;        // the stream that the tables were allocated on
  bool mixed = false;             // whether some tables were allocated on another stream
  int multiprocessors = 0;
  // The error of the launch that adds the telemetry of the last step, if any. The step itself was
  // launched, so the next step raises it.
  cudaError_t left = cudaSuccess;
  // Declared after the tables so that it is destroyed first: its destructor waits for the launches
  // that read the tables.
  std::optional<SideStreams> side_streams;

  CudaPlan(
      const std::vector<Tensor>& params, const std::vector<Tensor>& states, const Tensor& spec) {
    const Tensor& like = params.empty() ? spec : params[0];
    build(*this, params, states, spec);
    ONEPASS_CUDA(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device.index));
    cut();
    const OnDevice guard(device.index);
    made_on = stream_of(device.index);
    side_streams.emplace(device.index);
    chunk_table = table(like, chunk_words() + static_cast<int64_t>(spans.size()) * kSpanWords);
    grads.table = table(like, static_cast<int64_t>(entries.size()));
  }

  // Chooses and loads the kernel for the gradients that were taken, and copies the tables to the
  // device.
  void ready() {
    taken = false;
    ready_in.reset();
    const cudaError_t error = std::exchange(left, cudaSuccess);
    STD_TORCH_CHECK(
        error == cudaSuccess, "onepass: adding the telemetry of the last step, which is now NaN: ",
        cudaGetErrorName(error), ", ", cudaGetErrorString(error));
    if (!entries.empty()) {
      const OnDevice guard(device.index);
      const cudaStream_t stream = stream_of(device.index);
      prepare(stream, capture_of(stream));
    }
    taken = true;
  }

  // Launches the sweep.
  void run(const StepArgs& step) {
    if (chunks.empty() && !step.telemetry) return;
    const OnDevice guard(device.index);
    const cudaStream_t stream = stream_of(device.index);
    const unsigned long long now = capture_of(stream);
    const SideStreams::Use use(side_streams_of(stream, now), stream);
    Tables tables = prepare(stream, now);
    tables.step = step;
    tables.aside = averages || step.telemetry;
    tables.extras = tables.aside || records;
    const Grid grid{
        static_cast<unsigned>(chunks.size()), threads, tables.aside ? aside_bytes(threads) : 0};
    // Allocated on the current stream, as the launches are on that stream.
    Tensor partials;
    if (step.telemetry) {
      partials = torch::stable::new_empty(
          chunk_table, {std::max<int64_t>(grid.blocks, 1) * kTelemetryWidth}, ScalarType::Double);
      tables.partials = static_cast<Telemetry*>(partials.mutable_data_ptr());
      if (now) kept.push_back(partials);
      if (grid.blocks)
        launch(
            stream, kTelemetryKernels.skipped,
            Grid{grid.blocks, kTuning.threads, aside_bytes(kTuning.threads)}, tables, rows);
    }
    if (grid.blocks) launch(stream, kernel, grid, tables);
    if (step.telemetry && rows) {
      const auto* table = static_cast<const int64_t*>(chunk_table.data_ptr());
      left = try_launch(
          stream, kTelemetryKernels.total, Grid{static_cast<unsigned>(rows)}, tables,
          reinterpret_cast<const Span*>(table + chunk_words()));
    }
  }

  // Launches the norm kernels; see the op norm in csrc/ops.cpp.
  Tensor norm() {
    STD_TORCH_CHECK(taken, "onepass: norm without refresh");
    const OnDevice guard(device.index);
    const cudaStream_t stream = stream_of(device.index);
    const unsigned long long now = capture_of(stream);
    const SideStreams::Use use(side_streams_of(stream, now), stream);
    const Tables tables = prepare(stream, now);
    const int64_t count = static_cast<int64_t>(chunks.size());
    const int64_t most = int64_t{multiprocessors} * kTuning.norm_blocks_per_sm;
    const int64_t blocks = std::max<int64_t>(1, std::min(count, most));
    // Allocated on the current stream, as the launches are on that stream.
    Tensor partials = torch::stable::new_empty(chunk_table, {blocks * 3}, ScalarType::Double);
    Tensor total = torch::stable::new_empty(chunk_table, {3}, ScalarType::Double);
    if (now) kept.insert(kept.end(), {partials, total});
    auto* partial = static_cast<Norm*>(partials.mutable_data_ptr());
    launch(
        stream, kNormKernels.chunks, Grid{static_cast<unsigned>(blocks)}, tables, count, partial);
    launch(
        stream, kNormKernels.total, Grid{1}, static_cast<const Norm*>(partial), blocks,
        static_cast<Norm*>(total.mutable_data_ptr()));
    return total;
  }

 private:
  int64_t chunk_words() const { return static_cast<int64_t>(chunks.size()) * kChunkWords; }

  static Tensor table(const Tensor& like, int64_t words) {
    return torch::stable::new_empty(like, {std::max<int64_t>(words, 1)}, ScalarType::Long);
  }

  // Divides the entries into chunks. Those that fill the device for the last time are shorter, so
  // that all blocks end at about the same time.
  void cut() {
    int64_t left = 0;  // elements from the current entry on
    for (const Entry& entry : entries) left += entry.numel;
    for (size_t e = 0; e < entries.size(); ++e) {
      const Entry& entry = entries[e];
      const Format held = held_format(entry);
      const auto format_of = [&](int k) { return state_format(held, weights_of(entry), k); };
      averages = averages || entry.ema;
      records = records || entry.changed;
      const int64_t block = block_of(held);
      for (int k = 0; k < kMaxStates; ++k)
        STD_TORCH_CHECK(
            !entry.has(k) || entry.state_formats[k] == format_of(k),
            "onepass: the states of a parameter must have the same format", at(e));
      const int64_t most = held == Format::kFp32 ? kTuning.wide_chunk : kTuning.chunk;
      const int64_t wave =
          int64_t{multiprocessors} * shape_of(entry.param_format, held).blocks_per_sm;
      const int64_t tapered = kTuning.taper * wave * (most / 4);
      const auto cuts = cut_chunks(entry.numel, entry.first, most, left - tapered);
      left -= entry.numel;
      for (size_t c = 0; c + 1 < cuts.size(); ++c) {
        const int64_t start = cuts[c];
        Chunk chunk{};
        chunk.param = {
            offset(entry.param.data, bytes_of(entry.param_format, start)),
            offset(entry.param.extra, extra_bytes_of(entry.param_format, start))};
        for (int k = 0; k < kMaxStates; ++k)
          if (entry.has(k))
            chunk.states[k] = {
                offset(entry.states[k].data, bytes_of(format_of(k), start)),
                offset(entry.states[k].extra, extra_bytes_of(format_of(k), start / block * block))};
        chunk.average = entry.ema ? entry.ema + start : nullptr;
        chunk.changed = entry.changed ? entry.changed + start / 32 : nullptr;
        chunk.start = start;
        chunk.index = static_cast<uint64_t>(entry.first + start);
        chunk.param_id = entry.param_id;
        chunk.entry = static_cast<int32_t>(e);
        chunk.row = entry.row;
        chunk.count = static_cast<int32_t>(cuts[c + 1] - start);
        chunk.flags = static_cast<uint8_t>(entry.flags);
        chunk.param_format = entry.param_format;
        chunk.state_format = held;
        chunks.push_back(chunk);
      }
      STD_TORCH_CHECK(
          entry.rule == entries[0].rule,
          "onepass: all parameters of a launch must have the same rule", at(e));
    }
    STD_TORCH_CHECK(
        chunks.size() < 1u << 31, "onepass: the list has ", chunks.size(),
        " chunks; a launch has at most 2147483647 blocks");
    spans.assign(rows, Span{0, 0});
    for (int64_t c = 0; c < static_cast<int64_t>(chunks.size()); ++c) {
      Span& span = spans[chunks[c].row];
      if (span.end == 0) span.first = c;
      span.end = c + 1;
    }
  }

  // Returns null if freeing the plan need not wait for launches on the stream. That is the case on
  // the stream of the allocations, because torch reuses the memory in the order of that stream. It
  // is also the case during a capture, where a recorded event would belong to the graph: the owner
  // of the graph keeps the plan alive.
  SideStreams* side_streams_of(cudaStream_t stream, unsigned long long capture_now) {
    return capture_now || (stream == made_on && !mixed) ? nullptr : &*side_streams;
  }

  // Updates the tables on the device for the gradients that were taken, and returns them. now is
  // the ID of the capture of the stream, or 0.
  Tables prepare(cudaStream_t stream, unsigned long long now) {
    if (ready_in == now) return tables_in(now);
    if (now) {
      STD_TORCH_CHECK(
          same_grad_formats(),
          "onepass: a captured step needs a step before it with gradients of these dtypes");
      chunks_captured = true;
      if (now != capture) captured = {};
      capture = now;
      if (!same_grads(captured)) {
        captured.table = table(grads.table, static_cast<int64_t>(entries.size()));
        kept.push_back(captured.table);
        upload_grads(captured, true);
      }
    } else if (const bool formats = same_grad_formats(); !formats || !same_grads(grads)) {
      const SideStreams::Use use(side_streams_of(stream, now), stream);
      if (!formats) bind_grad_formats(stream);
      upload_grads(grads, false);
    }
    ready_in = now;
    return tables_in(now);
  }

  Tables tables_in(unsigned long long now) const {
    Tables tables{};
    tables.chunks = static_cast<const Chunk*>(chunk_table.data_ptr());
    tables.grads = static_cast<const void* const*>((now ? captured : grads).table.data_ptr());
    return tables;
  }

  bool same_grad_formats() const {
    if (grad_formats.size() != entries.size()) return false;
    for (size_t e = 0; e < entries.size(); ++e)
      if (grad_formats[e] != entries[e].grad_format) return false;
    return true;
  }

  // Chooses the kernel and uploads the chunks. It runs in the first step, and when a gradient
  // changes its dtype.
  void bind_grad_formats(cudaStream_t stream) {
    grad_formats.clear();  // so that the next step tries again after an error
    if (!chunks.empty()) kernel = choose_kernel();
    upload_chunks(stream);
    for (const Entry& entry : entries) grad_formats.push_back(entry.grad_format);
  }

  // Writes the formats of the gradients into the chunks, and loads the kernel for them. Sets
  // threads.
  SweepKernel choose_kernel() {
    const Chunk& first = chunks[0];
    bool one = true, one_flags = true;
    for (Chunk& chunk : chunks) {
      chunk.grad_format = entries[chunk.entry].grad_format;
      one_flags = one_flags && chunk.flags == first.flags;
      one = one && one_flags && chunk.param_format == first.param_format &&
            chunk.grad_format == first.grad_format && chunk.state_format == first.state_format;
    }
    const RuleKernels& kernels = kernels_of(entries[0].rule);
    SweepKernel found =
        one ? kernels.fixed(first.flags, first.param_format, first.grad_format, first.state_format)
            : nullptr;
    threads = found ? shape_of(first.param_format, first.state_format).threads : kTuning.threads;
    if (!found && one_flags) found = kernels.formats(first.flags);
    if (!found) found = kernels.any;
    STD_TORCH_CHECK(
        found,
        "onepass: this CUDA library has only some of the kernels (a variant of bench.tuning, or a "
        "sample for tests), and none for this list");
    const Relaxed mode;  // loading may allocate while another thread captures a graph
    ONEPASS_CUDA(verify(found));
    if (kTuning.ring > 0) {
      ONEPASS_CUDA(prefer_shared(found));
      ONEPASS_CUDA(allow_shared(found, aside_bytes(kTuning.threads)));
    }
    return found;
  }

  void upload_chunks(cudaStream_t stream) {
    if (chunks_captured) {
      kept.push_back(chunk_table);
      chunk_table = table(chunk_table, chunk_table.numel());
      mixed = mixed || stream != made_on;
      chunks_captured = false;
    }
    const int64_t words = chunk_words();
    upload(chunk_table, chunk_table.numel(), false, [&](int64_t* to) {
      std::memcpy(to, chunks.data(), chunks.size() * sizeof(Chunk));
      std::memcpy(to + words, spans.data(), spans.size() * sizeof(Span));
    });
  }

  // Whether a table holds the addresses of the gradients that were taken.
  bool same_grads(const Grads& known) const {
    if (known.addresses.size() != entries.size()) return false;
    for (size_t e = 0; e < entries.size(); ++e)
      if (known.addresses[e] != reinterpret_cast<int64_t>(entries[e].grad)) return false;
    return true;
  }

  void upload_grads(Grads& to, bool capturing) {
    std::vector<int64_t> addresses;
    addresses.swap(to.addresses);  // to.addresses stays empty after an error
    addresses.clear();
    for (const Entry& entry : entries) addresses.push_back(reinterpret_cast<int64_t>(entry.grad));
    upload(to.table, static_cast<int64_t>(entries.size()), capturing, [&](int64_t* words) {
      std::memcpy(words, addresses.data(), addresses.size() * kWord);
    });
    to.addresses.swap(addresses);
  }

  // Copies host data into a table asynchronously. Each copy has its own pinned buffer, which torch
  // reuses when the copy is done. The buffer of a captured copy is kept, because every replay reads
  // it.
  template <class Fill>
  void upload(Tensor& table, int64_t words, bool capturing, const Fill& fill) {
    const bool pinned = table.is_cuda();
    const auto make = [&] {
      return torch::stable::new_empty(
          table, {std::max<int64_t>(words, 1)}, ScalarType::Long, std::nullopt,
          torch::stable::Device(torch::headeronly::DeviceType::CPU), pinned);
    };
    const auto allowed = [&] {
      const Relaxed mode;
      return make();
    };
    Tensor source = capturing ? allowed() : make();
    fill(source.mutable_data_ptr<int64_t>());
    torch::stable::copy_(table, source, true);
    if (capturing) kept.push_back(source);
  }
};

// Overloads take_gradients of csrc/plan.h. It also prepares the launch, so that errors are raised
// here, before the step is counted.
template <class Tensors>
bool take_gradients(CudaPlan& plan, size_t params, size_t grads, const Tensors& tensors) {
  if (!onepass::take_gradients(static_cast<Plan&>(plan), params, grads, tensors)) return false;
  plan.ready();
  return true;
}

// The op norm.
Tensor norm_of_plan(Tensor handle) { return Registry<CudaPlan>::find(handle)->norm(); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CUDA, m) {
  m.impl("sweep_", TORCH_BOX(&sweep_<CudaPlan>));
  m.impl("make_plan", TORCH_BOX(&make_plan<CudaPlan>));
  m.impl("refresh", &refresh_plan<CudaPlan>);
  m.impl("run", TORCH_BOX(&run_plan<CudaPlan>));
  m.impl("norm", TORCH_BOX(&norm_of_plan));
  m.impl("free_plan", TORCH_BOX(&free_plan<CudaPlan>));
}

}  // namespace onepass::cuda
