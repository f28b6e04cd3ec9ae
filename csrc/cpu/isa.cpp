// Selects the instruction set: by default the widest that this build has and this machine supports.
#include <cstring>

#include "sweep.h"

namespace onepass::cpu {
namespace {

// An instruction set with its kernels; runs() returns whether this machine supports it.
struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs)();
};

// In order of preference. __builtin_cpu_supports also checks that the operating system enabled the
// vector registers, because it reads XCR0.
const Isa kIsas[] = {
#if defined(ONEPASS_X86)
    {"avx512", &kKernelsAvx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx2", &kKernelsAvx2, [] { return __builtin_cpu_supports("avx2") != 0; }},
#endif
    {"plain", &kKernelsPlain, [] { return true; }},
};

const Isa* best() {
  for (const Isa& isa : kIsas)
    if (isa.runs()) return &isa;
  return nullptr;  // not reached: plain always runs
}

const Isa*& current() {
  static const Isa* isa = best();
  return isa;
}

}  // namespace

const Kernels& kernels() { return *current()->kernels; }

const char* isa_name() { return current()->name; }

bool select_isa(const char* name) {
  if (std::strcmp(name, "auto") == 0) {
    current() = best();
    return true;
  }
  for (const Isa& isa : kIsas) {
    if (std::strcmp(name, isa.name) == 0 && isa.runs()) {
      current() = &isa;
      return true;
    }
  }
  return false;
}

}  // namespace onepass::cpu
