// Asking for memory before it is used.
#pragma once

#include "portability.h"

namespace onepass {

// The cache lines of so many bytes. To GCC (12.2) a function that only calls __builtin_prefetch
// has no effect, and calls of it go; a volatile statement stays.
ONEPASS_HD void prefetch_lines(const void* from, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) {
    const char* at = static_cast<const char*>(from) + line;
#if defined(__x86_64__) && !defined(__clang__)
    asm volatile("prefetcht0 %a0" : : "p"(at));
#else
    __builtin_prefetch(at);
#endif
  }
}

}  // namespace onepass
