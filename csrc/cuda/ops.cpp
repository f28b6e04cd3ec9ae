// The ops of the CUDA library: the plan of csrc/plan.h with its tables on the device, and the
// launches, on the current stream of the plan's device.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstring>

#include "../plan_ops.h"
#include "kernels.h"
#include "tuning.h"

namespace onepass::cuda {
namespace {

#define ONEPASS_CUDA(CALL)                                                           \
  do {                                                                               \
    const cudaError_t error = (CALL);                                                \
    STD_TORCH_CHECK(                                                                 \
        error == cudaSuccess, "onepass: " #CALL ": ", cudaGetErrorName(error), ", ", \
        cudaGetErrorString(error));                                                  \
  } while (0)

class OnDevice {
 public:
  explicit OnDevice(int device) {
    ONEPASS_CUDA(cudaGetDevice(&before_));
    ONEPASS_CUDA(cudaSetDevice(device));
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

constexpr int64_t kWord = sizeof(int64_t);
static_assert(sizeof(Chunk) % kWord == 0 && sizeof(Norm) == 3 * kWord, "tables are of int64");
constexpr int64_t kChunkWords = sizeof(Chunk) / kWord;
constexpr int64_t kHyperWords = kHyperWidth * sizeof(float) / kWord, kCounterWords = 2;

const RuleKernels& kernels_of(int rule) {
#define ONEPASS_KERNELS_OF(CODE, RULE, ARG) &k##RULE##Kernels,
  static const RuleKernels* const all[kRules] = {ONEPASS_FOR_EACH_RULE(ONEPASS_KERNELS_OF, )};
#undef ONEPASS_KERNELS_OF
  return *all[rule];
}

Format state_format(const Entry& entry) {
  for (int k = 0; k < kMaxStates; ++k)
    if (entry.has(k)) return entry.state_formats[k];
  return Format::kFp32;
}

void* offset(void* base, int64_t bytes) {
  return base ? static_cast<char*>(base) + bytes : nullptr;
}

// Where the chunks of an entry start, and its end: every kTuning.chunk elements, and at multiples
// of 2^32 of the index, where the keys of the random bits change.
std::vector<int64_t> cut_chunks(int64_t numel, int64_t first) {
  constexpr int64_t kHalf = int64_t{1} << 32;
  std::vector<int64_t> cuts;
  for (int64_t at = 0; at < numel;) {
    cuts.push_back(at);
    const int64_t chunk = (at / kTuning.chunk + 1) * kTuning.chunk;
    const int64_t half = at + kHalf - (first + at) % kHalf;
    at = std::min(chunk, half);
  }
  cuts.push_back(numel);
  return cuts;
}

struct CudaPlan : Plan {
  std::vector<Chunk> chunks;
  std::vector<int64_t> grads;        // addresses on the device now
  std::vector<Format> grad_formats;  // that the chunks have now
  Tensor chunk_table, grad_table, numbers;
  SweepKernel kernel = nullptr;
  void* made_on = nullptr;  // the stream whose memory the tables are
  bool elsewhere = false;   // whether a step ran on another
  int multiprocessors = 0;

  CudaPlan(std::vector<Tensor> params, std::vector<Tensor> states, const Tensor& spec) {
    const Tensor like = params.empty() ? spec : params[0];
    build(*this, std::move(params), std::move(states), spec);
    cut();
    const OnDevice guard(device_index);
    made_on = stream();
    ONEPASS_CUDA(
        cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_index));
    const auto table = [&](int64_t words) {
      return torch::stable::new_empty(like, {std::max<int64_t>(words, 1)}, ScalarType::Long);
    };
    chunk_table = table(static_cast<int64_t>(chunks.size()) * kChunkWords);
    grad_table = table(static_cast<int64_t>(entries.size()));
    numbers = table(rows * (kHyperWords + kCounterWords));
  }

  // torch hands memory that is freed to the stream that it was made on, where nothing waits for
  // steps on other streams.
  ~CudaPlan() {
    if (elsewhere) cudaDeviceSynchronize();
  }

  void run(const float* hyper, const int64_t* counters, bool zero_grads, Telemetry* telemetry) {
    if (chunks.empty()) return;
    const OnDevice guard(device_index);
    prepare();
    upload(numbers, rows * (kHyperWords + kCounterWords), [&](int64_t* to) {
      std::memcpy(to, hyper, rows * kHyperWords * kWord);
      std::memcpy(to + rows * kHyperWords, counters, rows * kCounterWords * kWord);
    });
    launch(kernel, static_cast<unsigned>(chunks.size()), tables());
  }

  Tensor norm() {
    STD_TORCH_CHECK(taken == entries.size(), "onepass: norm without refresh");
    const OnDevice guard(device_index);
    prepare();
    const int64_t count = static_cast<int64_t>(chunks.size());
    const int64_t most = int64_t{multiprocessors} * kTuning.norm_blocks_per_sm;
    const int64_t blocks = std::max<int64_t>(1, std::min(count, most));
    // Of the current stream's memory, as the launches are.
    Tensor partials = torch::stable::new_empty(numbers, {blocks * 3}, ScalarType::Double);
    Tensor total = torch::stable::new_empty(numbers, {3}, ScalarType::Double);
    auto* partial = static_cast<Norm*>(partials.mutable_data_ptr());
    launch(kNormKernels.chunks, static_cast<unsigned>(blocks), tables(), count, partial);
    launch(
        kNormKernels.total, 1u, static_cast<const Norm*>(partial), blocks,
        static_cast<Norm*>(total.mutable_data_ptr()));
    return total;
  }

 private:
  cudaStream_t stream() const {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &current));
    return static_cast<cudaStream_t>(current);
  }

  void cut() {
    for (size_t e = 0; e < entries.size(); ++e) {
      const Entry& entry = entries[e];
      const Format held = state_format(entry);
      const int64_t block = block_of(held);
      for (int k = 0; k < kMaxStates; ++k)
        STD_TORCH_CHECK(
            !entry.has(k) || entry.state_formats[k] == held,
            "onepass: states of one parameter in two formats", at(e));
      const std::vector<int64_t> cuts = cut_chunks(entry.numel, entry.first);
      for (size_t c = 0; c + 1 < cuts.size(); ++c) {
        const int64_t start = cuts[c];
        Chunk chunk{};
        chunk.param = {
            offset(entry.param.data, bytes_of(entry.param_format, start)),
            offset(entry.param.extra, extra_bytes_of(entry.param_format, start))};
        for (int k = 0; k < kMaxStates; ++k)
          if (entry.has(k))
            chunk.states[k] = {
                offset(entry.states[k].data, bytes_of(held, start)),
                offset(entry.states[k].extra, extra_bytes_of(held, start / block * block))};
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
          entry.rule == entries[0].rule, "onepass: one launch has one rule; another", at(e));
    }
    STD_TORCH_CHECK(chunks.size() < 1u << 31, "onepass: more chunks than a launch has blocks");
  }

  // The device's tables as they have to be for the gradients that were taken.
  void prepare() {
    elsewhere = elsewhere || stream() != made_on;
    if (!same_grad_formats()) bind_grad_formats();
    if (!same_grads()) {
      upload(grad_table, static_cast<int64_t>(grads.size()), [&](int64_t* to) {
        std::memcpy(to, grads.data(), grads.size() * kWord);
      });
    }
  }

  bool same_grad_formats() const {
    if (grad_formats.size() != entries.size()) return false;
    for (size_t e = 0; e < entries.size(); ++e)
      if (grad_formats[e] != entries[e].grad_format) return false;
    return true;
  }

  // The formats of gradients are known from the first step on, and with them the kernel.
  void bind_grad_formats() {
    grad_formats.resize(entries.size());
    for (size_t e = 0; e < entries.size(); ++e) grad_formats[e] = entries[e].grad_format;
    if (chunks.empty()) return;
    const Chunk& first = chunks[0];
    bool one = true, one_flags = true;
    for (Chunk& chunk : chunks) {
      chunk.grad_format = grad_formats[chunk.entry];
      one_flags = one_flags && chunk.flags == first.flags;
      one = one && one_flags && chunk.param_format == first.param_format &&
            chunk.grad_format == first.grad_format && chunk.state_format == first.state_format;
    }
    const RuleKernels& kernels = kernels_of(entries[0].rule);
    kernel =
        one ? kernels.fixed(first.flags, first.param_format, first.grad_format, first.state_format)
            : nullptr;
    if (!kernel && one_flags) kernel = kernels.formats(first.flags);
    if (!kernel) kernel = kernels.any;
    upload(chunk_table, static_cast<int64_t>(chunks.size()) * kChunkWords, [&](int64_t* to) {
      std::memcpy(to, chunks.data(), chunks.size() * sizeof(Chunk));
    });
  }

  bool same_grads() {
    bool same = grads.size() == entries.size();
    grads.resize(entries.size());
    for (size_t e = 0; e < entries.size(); ++e) {
      const auto address = reinterpret_cast<int64_t>(entries[e].grad);
      same = same && grads[e] == address;
      grads[e] = address;
    }
    return same;
  }

  // Copies host numbers into a table without waiting: pinned memory of its own for each copy, which
  // torch takes back when the copy is done.
  template <class Fill>
  void upload(Tensor& table, int64_t words, const Fill& fill) {
    const bool pinned = table.is_cuda();
    Tensor source = torch::stable::new_empty(
        table, {std::max<int64_t>(words, 1)}, ScalarType::Long, std::nullopt,
        torch::stable::Device(torch::headeronly::DeviceType::CPU), pinned);
    fill(source.mutable_data_ptr<int64_t>());
    torch::stable::copy_(table, source, true);
  }

  Tables tables() {
    auto* first = static_cast<const int64_t*>(numbers.data_ptr());
    return {
        static_cast<const Chunk*>(chunk_table.data_ptr()),
        static_cast<const void* const*>(grad_table.data_ptr()),
        reinterpret_cast<const float*>(first), first + rows * kHyperWords};
  }

  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), unsigned blocks, Args... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kTuning.threads);
    config.stream = stream();
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, args...);
    STD_TORCH_CHECK(
        error == cudaSuccess, "onepass: launching ", blocks, " blocks over ", entries.size(),
        " parameters: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  }
};

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
