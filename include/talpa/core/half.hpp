// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/config.hpp>
#include <talpa/core/math.hpp>
#include <talpa/core/scalar.hpp>

#include <concepts>
#include <cstdint>
#include <type_traits>

namespace talpa {

/// Storage of 16 bits with the exponent of a float and 8 significant bits. It holds weights and
/// activations; arithmetic is done in float.
///
/// From a float: nearest, ties to even; too large gives infinity, NaN stays NaN. To a float: exact.
struct bfloat16 {
  std::uint16_t bits;

  bfloat16() = default;
  TALPA_HD explicit bfloat16(float x) {
    const std::uint32_t pattern = __builtin_bit_cast(std::uint32_t, x);
    const std::uint32_t nearest = pattern + 0x7fffu + ((pattern >> 16) & 1u);
    const bool nan = (pattern & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<std::uint16_t>(nan ? (pattern >> 16) | 0x40u : nearest >> 16);
  }
  TALPA_HD operator float() const {  // NOLINT: conversion intended
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }
};

/// Storage of 16 bits as IEEE 754 binary16: 11 significant bits, up to 65504, subnormal below
/// 2^-14. It holds weights and activations; arithmetic is done in float.
///
/// From a float: nearest, ties to even; too large gives infinity, NaN stays NaN. To a float: exact.
struct float16 {
  std::uint16_t bits;

  float16() = default;
  TALPA_HD explicit float16(float x) {
    const std::uint32_t pattern = __builtin_bit_cast(std::uint32_t, x);
    const std::uint32_t sign = (pattern >> 16) & 0x8000u, size = pattern & 0x7fffffffu;
    std::uint32_t half;
    if (size >= 0x47800000u) {  // 2^16 and more, infinity, NaN
      half = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (size < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, the ulp of 0.5f
      half = __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, size) + 0.5f) -
             __builtin_bit_cast(std::uint32_t, 0.5f);
    } else {
      half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    }
    bits = static_cast<std::uint16_t>(sign | half);
  }
  TALPA_HD operator float() const {  // NOLINT: conversion intended
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    const std::uint32_t exponent = (bits >> 10) & 0x1fu, fraction = bits & 0x3ffu;
    const float subnormal = static_cast<float>(fraction) * 0x1p-24f;
    const std::uint32_t size = exponent == 0    ? __builtin_bit_cast(std::uint32_t, subnormal)
                               : exponent == 31 ? 0x7f800000u | (fraction << 13)
                                                : ((exponent + 112u) << 23) | (fraction << 13);
    return __builtin_bit_cast(float, sign | size);
  }
};

/// What weights and activations may be stored in.
template <class T>
concept storage_scalar = floating<T> || std::same_as<T, bfloat16> || std::same_as<T, float16>;

/// Storage of 16 bits, half a float: what tensor cores multiply.
template <class T>
concept half_storage = std::same_as<T, bfloat16> || std::same_as<T, float16>;

/// What sums over stored numbers are formed in: double for double, else float.
template <storage_scalar T>
using sum_type = std::conditional_t<std::same_as<T, double>, double, float>;

}  // namespace talpa
