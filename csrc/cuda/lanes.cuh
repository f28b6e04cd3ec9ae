// The assignment of the elements of a chunk to threads, and access to their codes in memory and
// registers.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../portability.h"
#include "tuning.h"

namespace onepass::cuda {

// The codes of the eight elements of a thread, packed as in memory.
using Raw = uint32_t[kElements];

// A warp takes 256 consecutive elements at a time, as kVectors groups of kStretch = 32 * Vector
// elements. Lane l has the Vector elements from l * Vector on in each group. Each access of a warp
// thus covers contiguous memory, and each block of a format is in one warp.
template <int Vector>
struct Lanes {
  static constexpr int kVector = Vector;
  static constexpr int kVectors = kElements / Vector;
  static constexpr int kStretch = kWarp * Vector;

  unsigned lane;  // of the thread
  int left;       // number of elements from the warp's first to the end of the chunk

  // The position of element j of the thread, relative to the thread's first. It is a constant so
  // that it becomes an immediate offset of the instruction: an address per element would take most
  // registers.
  ONEPASS_HD static constexpr int step(int j) { return j / Vector * kStretch + j % Vector; }
  // The position of element j, relative to the warp's first.
  ONEPASS_HD int at(int j) const { return static_cast<int>(lane) * Vector + step(j); }
  // Whether element j is inside the chunk.
  ONEPASS_HD bool has(int j) const { return at(j) < left; }
};

// A load or store of Bytes bytes in one instruction. The words of a narrow access have their code
// in the lowest bits. load and store let the compiler find the address space. It does not find that
// of an address from offset_by<true>, so load_from (Shared: from shared memory) and store_global
// say it.
template <int Bytes>
struct Access {
  using Word =
      std::conditional_t<Bytes == 1, uint8_t, std::conditional_t<Bytes == 2, uint16_t, uint32_t>>;

  ONEPASS_HD static void load(const void* from, uint32_t* to) {
    to[0] = *static_cast<const Word*>(from);
  }
  ONEPASS_HD static void store(const uint32_t* from, void* to) {
    *static_cast<Word*>(to) = static_cast<Word>(from[0]);
  }
  template <bool Shared>
  __device__ __forceinline__ static void load_from(const void* from, uint32_t* to) {
#if defined(__CUDA_ARCH__)
    if (!Shared && Bytes == 4) {
      asm volatile("ld.global.u32 %0, [%1];" : "=r"(to[0]) : "l"(from));
      return;
    }
    if (!Shared && Bytes == 2) {
      asm volatile("{.reg .u16 h; ld.global.u16 h, [%1]; cvt.u32.u16 %0, h;}"
                   : "=r"(to[0])
                   : "l"(from));
      return;
    }
#endif
    load(from, to);
  }
  __device__ __forceinline__ static void store_global(const uint32_t* from, void* to) {
#if defined(__CUDA_ARCH__)
    if (Bytes == 4) {
      asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(from[0]));
      return;
    }
    if (Bytes == 2) {
      asm volatile(
          "{.reg .u16 h; cvt.u16.u32 h, %1; st.global.u16 [%0], h;}" ::"l"(to), "r"(from[0]));
      return;
    }
#endif
    store(from, to);
  }
};
template <>
struct Access<16> {
  ONEPASS_HD static void store(const uint32_t* from, void* to) {
    *static_cast<uint4*>(to) = make_uint4(from[0], from[1], from[2], from[3]);
  }
  template <bool Shared>
  __device__ __forceinline__ static void load_from(const void* from, uint32_t* to) {
#if defined(__CUDA_ARCH__)
    if (!Shared) {
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "l"(from));
      return;
    }
#endif
    const uint4 v = *static_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
  __device__ __forceinline__ static void store_global(const uint32_t* from, void* to) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from[0]), "r"(from[1]),
        "r"(from[2]), "r"(from[3]));
#else
    store(from, to);
#endif
  }
};
// In global memory of compute capability 10.0.
template <>
struct Access<32> {
  template <bool Shared>
  __device__ __forceinline__ static void load_from(const void* from, uint32_t* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    asm volatile("ld.global.v8.b32 {%0, %1, %2, %3, %4, %5, %6, %7}, [%8];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]), "=r"(to[4]), "=r"(to[5]),
                   "=r"(to[6]), "=r"(to[7])
                 : "l"(from));
#else
    Access<16>::load_from<false>(from, to);
    Access<16>::load_from<false>(static_cast<const char*>(from) + 16, to + 4);
#endif
  }
  __device__ __forceinline__ static void store_global(const uint32_t* from, void* to) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    asm volatile(
        "st.global.v8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};" ::"l"(to), "r"(from[0]),
        "r"(from[1]), "r"(from[2]), "r"(from[3]), "r"(from[4]), "r"(from[5]), "r"(from[6]),
        "r"(from[7]));
#else
    Access<16>::store_global(from, to);
    Access<16>::store_global(from + 4, static_cast<char*>(to) + 16);
#endif
  }
};
template <>
struct Access<8> {
  template <bool Shared>
  __device__ __forceinline__ static void load_from(const void* from, uint32_t* to) {
#if defined(__CUDA_ARCH__)
    if (!Shared) {
      asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(from));
      return;
    }
#endif
    const uint2 v = *static_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  }
  __device__ __forceinline__ static void store_global(const uint32_t* from, void* to) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(from[0]), "r"(from[1]));
#else
    *static_cast<uint2*>(to) = make_uint2(from[0], from[1]);
#endif
  }
};

// Tells the compiler that an address is in global memory. Addresses come from a table, so without
// this hint it would emit generic loads and stores, which resolve the address space at run time.
template <class T>
__device__ __forceinline__ T* global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

// The same, unless the address is in shared memory.
template <bool Shared, class T>
__device__ __forceinline__ T* global_unless(T* address) {
  return Shared ? address : global(address);
}

// base + bytes. Near: no multiple of 2^32 is between base and the result, so that it takes one
// addition instead of two.
template <bool Near>
__device__ __forceinline__ void* offset_by(const void* base, unsigned bytes) {
#if defined(__CUDA_ARCH__)
  if (Near) {
    const uint64_t start = reinterpret_cast<uint64_t>(base);
    uint32_t low = static_cast<uint32_t>(start) + bytes;
    // Otherwise the compiler computes the address again for the store at the end of a round.
    asm("" : "+r"(low));
    return reinterpret_cast<void*>((start >> 32) << 32 | low);
  }
#endif
  return static_cast<char*>(const_cast<void*>(base)) + bytes;
}

// Prefetches an address into L2.
__device__ __forceinline__ void fetch_ahead(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Selects four of the eight bytes of two words; bytes 4 to 7 are those of the second word. Each
// hexadecimal digit of `which`, lowest first, is the index of a byte, plus 8 to replicate its sign
// bit instead. This is the PTX instruction prmt.
ONEPASS_HD uint32_t select_bytes(uint32_t first, uint32_t second, unsigned which) {
#if defined(__CUDA_ARCH__)
  uint32_t found;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(found) : "r"(first), "r"(second), "r"(which));
  return found;
#else
  const uint64_t both = static_cast<uint64_t>(second) << 32 | first;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i, which >>= 4) {
    const uint32_t byte = both >> (which % 8 * 8) & 0xFFu;
    found |= (which & 8 ? (byte & 0x80u ? 0xFFu : 0u) : byte) << (8 * i);
  }
  return found;
#endif
}

// Access to the codes, of Bits bits each, of eight elements.
template <int Bits, int Vector>
struct Codes {
  static constexpr int kBytes = Vector * Bits / 8;            // bytes of a vector
  static constexpr int kWords = kBytes < 4 ? 1 : kBytes / 4;  // words that hold a vector
  static constexpr uint32_t kMask = Bits == 32 ? ~0u : (1u << (Bits % 32)) - 1;
  using L = Lanes<Vector>;

  // Whether the eight codes are the nibbles of one word.
  static constexpr bool kNibbles = Bits == 4 && Vector == kElements;
  // The nibbles of even or odd elements, in the lower halves of four bytes.
  ONEPASS_HD static uint32_t nibbles(const Raw& raw, bool odd) {
    return (odd ? raw[0] >> 4 : raw[0]) & 0x0F0F0F0Fu;
  }

  ONEPASS_HD static uint32_t get(const Raw& raw, int j) {
    if constexpr (kNibbles)
      return select_bytes(nibbles(raw, j % 2 != 0), 0, 0x4440u | static_cast<unsigned>(j / 2));
    const int bit = j % Vector * Bits;
    return raw[j / Vector * kWords + bit / 32] >> (bit % 32) & kMask;
  }
  ONEPASS_HD static void clear(Raw& raw) {
#pragma unroll
    for (int w = 0; w < L::kVectors * kWords; ++w) raw[w] = 0;
  }
  // Writes one code into words that were cleared.
  ONEPASS_HD static void put(Raw& raw, int j, uint32_t code) {
    const int bit = j % Vector * Bits;
    raw[j / Vector * kWords + bit / 32] |= code << (bit % 32);
  }
  // One byte of each of the words of the even (first 0) or odd (first 1) elements.
  template <int Byte>
  ONEPASS_HD static uint32_t four(const uint32_t (&words)[kElements], int first) {
    constexpr unsigned kPair = Byte | (Byte + 4) << 4;
    return select_bytes(
        select_bytes(words[first], words[first + 2], kPair),
        select_bytes(words[first + 4], words[first + 6], kPair), 0x5410);
  }
  // Packs eight codes. words[j] has code j in the bits from bit From up; its other bits are
  // ignored.
  template <int From = 0>
  ONEPASS_HD static void pack(const uint32_t (&words)[kElements], Raw& raw) {
    if constexpr (Bits == 16 && From % 16 == 0) {
      constexpr unsigned kHalf = From == 0 ? 0x5410 : 0x7632;
#pragma unroll
      for (int w = 0; w < kElements / 2; ++w)
        raw[w] = select_bytes(words[2 * w], words[2 * w + 1], kHalf);
    } else if constexpr (Bits == 8 && From % 8 == 0) {
      constexpr unsigned kByte = From / 8, kPair = kByte | (kByte + 4) << 4;
#pragma unroll
      for (int w = 0; w < kElements / 4; ++w)
        raw[w] = select_bytes(
            select_bytes(words[4 * w], words[4 * w + 1], kPair),
            select_bytes(words[4 * w + 2], words[4 * w + 3], kPair), 0x5410);
    } else if constexpr (kNibbles && From % 8 == 0) {
      constexpr int kByte = From / 8;
      raw[0] = (four<kByte>(words, 0) & 0x0F0F0F0Fu) | (four<kByte>(words, 1) << 4 & 0xF0F0F0F0u);
    } else {
      clear(raw);
#pragma unroll
      for (int j = 0; j < kElements; ++j) put(raw, j, words[j] >> From & kMask);
    }
  }

  // The address of the codes of the thread, whose warp starts at an offset in elements. Near is
  // that of offset_by.
  template <bool Near>
  __device__ __forceinline__ static void* address(const void* base, int offset, const L& lanes) {
    const unsigned first = static_cast<unsigned>(offset) + lanes.lane * Vector;
    return offset_by<Near>(base, Bits < 8 ? first / (8 / Bits) : first * (Bits / 8));
  }

  // Loads the codes of the thread from their address. Full: every element of the warp is inside the
  // chunk, and the address is a multiple of the bytes of an access. Shared: the address is in
  // shared memory.
  template <bool Full, bool Shared = false>
  __device__ __forceinline__ static void load(const void* codes, const L& lanes, Raw& raw) {
    const char* from = global_unless<Shared>(static_cast<const char*>(codes));
    if (Full) {
#pragma unroll
      for (int v = 0; v < L::kVectors; ++v) {
        const char* at = from + v * L::kStretch * Bits / 8;
        constexpr int kMost = Shared ? 16 : kWidestAccess,
                      kWidest = kBytes < kMost ? kBytes : kMost;
#pragma unroll
        for (int part = 0; part < kBytes; part += kWidest)
          Access<kWidest>::template load_from<Shared>(at + part, raw + v * kWords + part / 4);
      }
      return;
    }
    clear(raw);
    constexpr int kStep = Bits < 8 ? 8 / Bits : 1;  // elements per byte
    constexpr int kOne = Bits < 8 ? 1 : Bits / 8;
#pragma unroll
    for (int j = 0; j < kElements; j += kStep) {
      uint32_t code = 0;
      if (lanes.has(j)) Access<kOne>::load(from + L::step(j) * Bits / 8, &code);
      put(raw, j, code);
    }
  }
  // Prefetches what load<true> reads Ahead elements later. Ahead is a constant, so that it becomes
  // an immediate offset from the address of the load.
  template <int Ahead>
  __device__ __forceinline__ static void fetch(const void* codes) {
    const char* from = global(static_cast<const char*>(codes));
#pragma unroll
    for (int v = 0; v < L::kVectors; ++v) fetch_ahead(from + (v * L::kStretch + Ahead) * Bits / 8);
  }
  template <bool Full>
  __device__ __forceinline__ static void store(void* codes, const L& lanes, const Raw& raw) {
    char* to = global(static_cast<char*>(codes));
    if (Full) {
#pragma unroll
      for (int v = 0; v < L::kVectors; ++v) {
        char* at = to + v * L::kStretch * Bits / 8;
        constexpr int kWidest = kBytes < kWidestAccess ? kBytes : kWidestAccess;
#pragma unroll
        for (int part = 0; part < kBytes; part += kWidest)
          Access<kWidest>::store_global(raw + v * kWords + part / 4, at + part);
      }
      return;
    }
    constexpr int kStep = Bits < 8 ? 8 / Bits : 1;
    constexpr int kOne = Bits < 8 ? 1 : Bits / 8;
#pragma unroll
    for (int j = 0; j < kElements; j += kStep) {
      uint32_t code = get(raw, j);
      if constexpr (kStep > 1) code |= get(raw, j + kStep - 1) << Bits;
      if (lanes.has(j)) Access<kOne>::store(&code, to + L::step(j) * Bits / 8);
    }
  }
};

// The maximum over each group of Group neighbouring lanes; every lane of the warp must call it.
template <int Group>
__device__ __forceinline__ uint32_t largest_in(uint32_t value) {
#pragma unroll
  for (int distance = Group / 2; distance; distance /= 2) {
    const uint32_t other = __shfl_xor_sync(~0u, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// Zeroes memory with a whole block of Threads threads. The address and the size must be even, as
// those of gradients are.
template <int Threads>
__device__ __forceinline__ void zero_bytes(char* to, int bytes) {
  const int wide = reinterpret_cast<uintptr_t>(to) % 16 == 0 ? bytes / 16 * 16 : 0;
  const uint32_t zeros[4] = {};
#pragma unroll 1
  for (int at = static_cast<int>(threadIdx.x) * 16; at < wide; at += Threads * 16)
    Access<16>::store(zeros, global(to + at));
#pragma unroll 1
  for (int at = wide + static_cast<int>(threadIdx.x) * 2; at < bytes; at += Threads * 2)
    Access<2>::store(zeros, global(to + at));
}

}  // namespace onepass::cuda
