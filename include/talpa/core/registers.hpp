// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only file that may test the instruction set. Translation units of one program may be compiled
// for several: what is as wide as a register says its width in its type, so that the linker never
// takes the code of one for that of another.
namespace talpa::detail {

/// Bytes of the target's vector registers; 0 for nvcc, which refuses vectors in functions for both
/// sides: the host code of its translation units takes one token at a time.
#if defined(__CUDACC__)
inline constexpr int register_bytes = 0;
#elif defined(__AVX512F__)
inline constexpr int register_bytes = 64;
#elif defined(__AVX__)
inline constexpr int register_bytes = 32;
#else
inline constexpr int register_bytes = 16;
#endif

}  // namespace talpa::detail
