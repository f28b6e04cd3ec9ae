// Simulates the bulk copies and barriers of csrc/cuda/bulk_copy.cuh.
#include <map>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace shim {
namespace {

struct Copy {
  char* to;
  const char* from;
  std::vector<char> data;  // as it was when the copy started
};
struct Barrier {
  unsigned arrivals = 0, pending = 0;  // expected per phase, and missing in this one
  unsigned phase = 0;
  long expected = 0;  // bytes announced in this phase, less those of its copies
  std::vector<Copy> copies;
};
std::map<const void*, Barrier> barriers;
// Threads whose last wait was not followed by fence_async.
std::set<unsigned> unfenced;

void check(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "cuda shim: %s\n", what);
  std::abort();
}

Barrier& find(const void* barrier) {
  const auto found = barriers.find(barrier);
  check(found != barriers.end(), "a barrier is used before it is initialized");
  return found->second;
}

// Ends the phase if nothing is missing, and delivers its copies.
void advance(Barrier& barrier) {
  if (barrier.pending || barrier.expected) return;
  for (const Copy& copy : barrier.copies) {
    const size_t bytes = copy.data.size();
    check(
        std::memcmp(copy.from, copy.data.data(), bytes) == 0,
        "the source of a bulk copy changed before the copy arrived");
    std::memcpy(copy.to, copy.data.data(), bytes);
  }
  barrier.copies.clear();
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  now.moved = true;
}

}  // namespace

void init_barrier(const void* barrier, unsigned arrivals) {
  Barrier& made = barriers[barrier] = {};
  made.arrivals = made.pending = arrivals;
}

void arrive(const void* barrier, unsigned bytes) {
  Barrier& of = find(barrier);
  check(of.pending > 0, "more arrivals at a barrier than it expects");
  of.expected += bytes;
  --of.pending;
  now.moved = true;
  // A barrier with copies ends its phase at a wait, so that a missing wait shows.
  if (of.copies.empty() && !bytes) advance(of);
}

void wait_for(const void* barrier, unsigned parity) {
  while (true) {
    Barrier& of = find(barrier);
    if (of.phase % 2 == parity) advance(of);
    if (of.phase % 2 != parity) break;
    give_way();
  }
  unfenced.insert(threadIdx.x);
}

void copy_bulk(void* to, const void* from, unsigned bytes, const void* barrier) {
  const auto address = [](const void* at) { return reinterpret_cast<uintptr_t>(at); };
  check(
      bytes && (address(to) | address(from) | bytes) % 16 == 0,
      "a bulk copy has an address or a size that is not a multiple of 16");
  check(!unfenced.count(threadIdx.x), "a bulk copy after a wait without fence_async");
  Barrier& of = find(barrier);
  const char* start = static_cast<const char*>(from);
  of.copies.push_back({static_cast<char*>(to), start, {start, start + bytes}});
  of.expected -= bytes;
  std::memset(to, 0xFF, bytes);
}

void fence_async() { unfenced.erase(threadIdx.x); }

void end_block() {
  for (const auto& [address, barrier] : barriers)
    check(barrier.copies.empty(), "a block ends before its bulk copies");
  barriers.clear();
  unfenced.clear();
}

}  // namespace shim
