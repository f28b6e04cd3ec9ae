// The ring of csrc/cuda/ring.cuh on the stand-in of tests/cuda_shim, with one mistake of a kind
// that the stand-in must find. Compiled and run by tests/test_cuda_ring.py; the argument is the
// mistake.
#include <cstring>

#include "../csrc/cuda/ring.cuh"

using namespace onepass;
using namespace onepass::cuda;

namespace {

using Formats = Fixed<Format::kSplit8, Format::kBf16, Format::kMx8>;
using Rules = FixedRule<Adam, 1>;
using Tested = Ring<Rules, Formats>;
constexpr int kStages = 5, kCount = kStages * Tested::kStage;

const char* mistake = "";
bool is(const char* name) { return std::strcmp(mistake, name) == 0; }

alignas(16) char memory[11][2 * kCount];
long wrong = 0;

// Compares the gradients of a warp in a stage with those in memory.
void compare(const typename Tested::Source& source, int offset) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const char* found = static_cast<const char*>(source.grad()) + 2 * (source.offset + 8 * lane);
  wrong += std::memcmp(found, memory[10] + 2 * (offset + 8 * lane), 16) != 0;
}

// Reads all stages of a chunk.
void kernel(Tables tables) {
  Tested::init();
  __syncthreads();
  Tested ring(*tables.chunks, memory[10]);
  __syncthreads();
  if (is("ends early")) return;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int offset = warp * kWarpElements; ring.has_round(offset); offset += Tested::kRound) {
    const int slot = offset / Tested::kStage % Tested::kStages;
    if (is("no wait"))
      compare({ring.ring.stages[slot], ring.ring.empty[slot], offset % Tested::kStage}, offset);
    const auto source = ring.begin(offset);
    if (is("early release")) source.loaded<true>({});
    // The other warps run ahead here, as they may on a GPU.
    for (int turn = 0; warp == 3 && turn < 20; ++turn) {
      shim::now.moved = true;
      shim::give_way();
    }
    if (!is("no wait")) compare(source, offset);
    if (is("no release") && warp == 3) continue;
    if (!is("early release")) source.loaded<true>({});
  }
  if (is("misaligned")) wrong += ring.has_round(0);
}

}  // namespace

int main(int, char** arguments) {
  mistake = arguments[1];
  unsigned value = 1;
  for (auto& tensor : memory)
    for (char& byte : tensor) byte = static_cast<char>((value = value * 0x915F77F5u + 1) >> 24);
  Chunk chunk{};
  chunk.param = {memory[0], memory[1]};
  for (int k = 0; k < kMaxStates; ++k) chunk.states[k] = {memory[2 + 2 * k], memory[3 + 2 * k]};
  chunk.count = kCount;
  if (is("misaligned")) chunk.states[0].extra = memory[3] + 1;
  Tables tables{};
  tables.chunks = &chunk;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(kTuning.threads);
  cudaLaunchKernelEx(&config, kernel, tables);
  std::printf("%ld wrong\n", wrong);
  return wrong != 0;
}
