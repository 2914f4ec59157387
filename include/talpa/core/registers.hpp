// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only file that may test the instruction set. Translation units of one program may be compiled
// for several: what is as wide as a register says its width in its type, so that the linker never
// takes the code of one for that of another.
namespace talpa::detail {

/// Bytes of the vector registers of the target, and at least how many of them it has. Eigen names
/// one element and 8 registers where it does not vectorise, as in all that nvcc compiles.
#if defined(__AVX512F__)
inline constexpr int register_bytes = 64;
inline constexpr int register_count = 32;
#elif defined(__AVX__)
inline constexpr int register_bytes = 32;
inline constexpr int register_count = 16;
#elif defined(__aarch64__)
inline constexpr int register_bytes = 16;
inline constexpr int register_count = 32;
#else
inline constexpr int register_bytes = 16;
inline constexpr int register_count = 16;
#endif

/// Bytes of vectors of 64-bit lanes that are multiplied, and the products of their lower halves.
/// Where there is an instruction for them g++ 12 does not find it, but multiplies 64 bits by 64,
/// with three products or a slow one.
#if defined(__AVX512F__)
inline constexpr int product_bytes = 64;
#elif defined(__AVX2__)
inline constexpr int product_bytes = 32;
#else
inline constexpr int product_bytes = 16;
#endif
#if defined(__AVX__)
template <class Vector>
[[gnu::always_inline]] inline Vector multiply_lower(Vector a, Vector b) {
  Vector product;
  asm("vpmuludq %2, %1, %0" : "=v"(product) : "v"(a), "v"(b));
  return product;
}
#elif defined(__SSE2__)
template <class Vector>
[[gnu::always_inline]] inline Vector multiply_lower(Vector a, Vector b) {
  asm("pmuludq %1, %0" : "+x"(a) : "x"(b));
  return a;
}
#else
template <class Vector>
[[gnu::always_inline]] inline Vector multiply_lower(Vector a, Vector b) {
  return (a & 0xffffffffu) * (b & 0xffffffffu);
}
#endif

/// Keeps a vector in a register. Where multiply-adds can read memory g++ 12 reads what was read
/// before again for each that takes it, and keeps sums on the stack, mostly if it tunes for AMD's
/// processors. Vectors wider than a register stay where they are.
template <class Vector>
[[gnu::always_inline]] inline void keep_in_register([[maybe_unused]] Vector& v) {
  if constexpr (sizeof(Vector) <= register_bytes) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__FMA__)
    asm("" : "+x"(v));
#endif
  }
}

/// Bytes of the widest vector that functions take; 0 for nvcc, which refuses vectors in functions
/// for both sides: the host code of its translation units takes one token at a time.
#if defined(__CUDACC__)
inline constexpr int pack_bytes = 0;
#else
inline constexpr int pack_bytes = register_bytes;
#endif

/// f(i) for i in [0, W), as vector code for all W at a time.
template <int W, class F>
[[gnu::always_inline]] inline void for_lanes(F f) {
#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__)
  // By itself gcc takes vectors of half a register where it tunes for Intel's AVX-512, and moves
  // the halves through memory: a third more time to route a token.
#pragma omp simd simdlen(W)
#else
  // Kept a loop, which compilers turn into vector code; unrolled early, gcc leaves it scalar.
#pragma GCC unroll 1
#endif
  for (int i = 0; i < W; ++i) f(i);
}

}  // namespace talpa::detail
