// The sweep of one bf16 AdamW tensor with a selectable tile size. It shows how much tiles that stay
// in the L1 cache gain, and how much updating the tensors in place gains. The rules and formats are
// the kernels of onepass.
#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace onepass::cpu {
namespace {

// Defines kAdam and so on: the numbers of the rules.
#define ONEPASS_CODE(CODE, RULE, ARG) [[maybe_unused]] constexpr int k##RULE = CODE;
ONEPASS_FOR_EACH_RULE(ONEPASS_CODE, )
#undef ONEPASS_CODE
constexpr int kDecoupled = 1;
constexpr Format kWeight = Format::kBf16, kState = Format::kBf16Stochastic;
// The elements are divided among the threads in units of this many elements, so that a thread has
// whole tiles, or whole rows of a direct kernel.
constexpr int64_t kUnit = 65536;

struct Step {
  const Kernels* kernels;
  const Direct* direct;  // used when tile is 0
  int64_t tile;
  Stored param, grad, exp_avg, exp_avg_sq;
  const float* row;
  uint64_t stream;
};

TileRandom random_at(const Step& step, int64_t index) {
  TileRandom random{};
  random.low = static_cast<uint32_t>(index);  // tensors of this ladder are shorter than 2^32
  for (uint32_t word = 0; word < 2; ++word) random.keys[word] = random_key(step.stream, 0, word);
  return random;
}

Stored shifted(const Stored& base, Format format, int64_t index) {
  return {static_cast<char*>(base.data) + bytes_of(format, index), nullptr};
}

void in_place(const Step& step, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kUnit) {
    const int n = static_cast<int>(std::min(kUnit, end - at));
    const Stored states[kMaxStates] = {
        shifted(step.exp_avg, kState, at), shifted(step.exp_avg_sq, kState, at), {}};
    step.direct->rules[kAdam][kDecoupled](
        step.row, n, shifted(step.param, kWeight, at), shifted(step.grad, kWeight, at).data, states,
        random_at(step, at), nullptr);
  }
}

void in_tiles(const Step& step, int64_t begin, int64_t end) {
  // Allocated once per thread and reused, so that the time of the allocation is not measured.
  thread_local std::vector<float> tiles;
  const size_t length = static_cast<size_t>(std::min(step.tile, end - begin));
  if (tiles.size() < 5 * length) tiles.resize(5 * length);
  float *param = tiles.data(), *grad = param + length, *exp_avg = grad + length,
        *exp_avg_sq = exp_avg + length, *roots = exp_avg_sq + length;
  const auto& decode = step.kernels->decode;
  const auto& encode = step.kernels->encode;
  constexpr int kW = static_cast<int>(kWeight), kS = static_cast<int>(kState);
  for (int64_t at = begin; at < end; at += step.tile) {
    const int n = static_cast<int>(std::min(step.tile, end - at));
    const TileRandom random = random_at(step, at);
    decode[kW][kFirst](step.param, at, n, param, roots);
    decode[kW][kFirst](step.grad, at, n, grad, roots);
    decode[kS][kSecond](step.exp_avg_sq, at, n, exp_avg_sq, roots);
    decode[kS][kRelative](step.exp_avg, at, n, exp_avg, roots);
    const Stored states[kMaxStates] = {{exp_avg, nullptr}, {exp_avg_sq, nullptr}, {}};
    step.kernels->direct[0].rules[kAdam][kDecoupled](
        step.row, n, {param, nullptr}, grad, states, random, nullptr);
    encode[kW][kFirst](param, at, n, step.param, random, weight_use(kWeight, true), roots);
    encode[kS][kSecond](exp_avg_sq, at, n, step.exp_avg_sq, random, state_use(1), roots);
    encode[kS][kRelative](exp_avg, at, n, step.exp_avg, random, state_use(0), roots);
  }
}

const Kernels* kernels_of(const char* isa) {
  if (std::strcmp(isa, "avx512") == 0) return &kKernelsAvx512;
  if (std::strcmp(isa, "avx2") == 0) return &kKernelsAvx2;
  return std::strcmp(isa, "plain") == 0 ? &kKernelsPlain : nullptr;
}

}  // namespace

// Runs one step over n elements, a multiple of 65536. tile: elements per tile; 0 for no tiles.
// row: a row of the hyperparameter table. Returns 1 if n, threads, tile or isa is unsupported,
// else 0.
extern "C" __attribute__((visibility("default"))) int onepass_ladder_step(
    const char* isa, int64_t tile, int threads, int64_t n, void* param, void* grad, void* exp_avg,
    void* exp_avg_sq, const float* row, int64_t seed, int64_t number) {
  Step step{
      kernels_of(isa),       nullptr, tile, {param, nullptr}, {grad, nullptr}, {exp_avg, nullptr},
      {exp_avg_sq, nullptr}, row,     0};
  if (!step.kernels || n <= 0 || n % kUnit || n >> 32 || threads < 1) return 1;
  for (const Direct& direct : step.kernels->direct)
    if (direct.weight == kWeight && direct.grad == kWeight && direct.state == kState)
      step.direct = &direct;
  if (tile == 0 && !step.direct) return 1;
  step.stream = random_stream(static_cast<uint64_t>(seed), static_cast<uint64_t>(number), 0);
  const int64_t share = (n / kUnit + threads - 1) / threads * kUnit;
  const auto work = [&](int64_t begin) {
    const int64_t end = std::min(n, begin + share);
    if (begin < end) tile ? in_tiles(step, begin, end) : in_place(step, begin, end);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work, i * share);
  work(0);
  for (std::thread& other : others) other.join();
  return 0;
}

}  // namespace onepass::cpu
