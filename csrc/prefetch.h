// Software prefetching on the CPU.
#pragma once

#include "portability.h"

namespace onepass {

// Prefetches the cache lines of a range of bytes. GCC 12.2 removes calls of a function whose body
// is only __builtin_prefetch, because it has no side effect; it keeps a volatile asm statement.
ONEPASS_HD void prefetch_lines(const void* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) {
    const char* at = static_cast<const char*>(from) + line;
#if defined(__x86_64__) && !defined(__clang__)
    asm volatile("prefetcht0 %a0" : : "p"(at));
#elif defined(__aarch64__) && !defined(__clang__)
    asm volatile("prfm pldl1keep, [%0]" : : "r"(at));
#else
    __builtin_prefetch(at);
#endif
  }
}

}  // namespace onepass
