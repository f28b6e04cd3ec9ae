// The primitives of the instruction set that the compiler generates code for: the constants and
// functions of namespace simd, which plain.h describes. Code above them is written once.
#pragma once

#if defined(__AVX512BW__)
#include "avx512.h"
#elif defined(__AVX2__)
#include "avx2.h"
#else
#include "plain.h"
#endif
