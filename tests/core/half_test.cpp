// SPDX-License-Identifier: Apache-2.0
#include <talpa/core/half.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

namespace talpa::half_test {

namespace {

template <class H>
H of_bits(std::uint32_t bits) {
  H h;
  h.bits = static_cast<std::uint16_t>(bits);
  return h;
}

/// Value of a pattern with so many bits of fraction, by its definition.
double value_of(std::uint32_t bits, int fraction_bits, int bias) {
  const int exponent = static_cast<int>((bits & 0x7fffu) >> fraction_bits);
  const double fraction =
      std::ldexp(static_cast<double>(bits & ((1u << fraction_bits) - 1u)), -fraction_bits);
  const double size =
      exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1.0 + fraction, exponent - bias);
  return (bits & 0x8000u) != 0 ? -size : size;
}

/// Every pattern below infinity has its value, comes back, and each float between two neighbours
/// goes to the nearer, the middle to the even one.
template <class H>
void check_patterns(int fraction_bits, int bias) {
  const std::uint32_t infinity = ((1u << (15 - fraction_bits)) - 1u) << fraction_bits;
  bool values = true, back = true, below = true, middle = true, above = true;
  for (std::uint32_t bits = 0; bits < infinity; ++bits) {
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const H h = of_bits<H>(bits | sign);
      const float x = h;
      values = values && static_cast<double>(x) == value_of(bits | sign, fraction_bits, bias);
      back = back && H(x).bits == h.bits;
      if (bits + 1 == infinity) continue;
      const float next = of_bits<H>((bits + 1) | sign);
      const float half = x + (next - x) * 0.5f;  // exact: a float has more bits
      middle = middle && H(half).bits == ((bits + (bits & 1u)) | sign);
      below = below && H(std::nextafter(half, x)).bits == h.bits;
      above = above && H(std::nextafter(half, next)).bits == ((bits + 1) | sign);
    }
  }
  CHECK(values);
  CHECK(back);
  CHECK(middle);
  CHECK(below);
  CHECK(above);
  const float endless = std::numeric_limits<float>::infinity();
  CHECK(H(endless).bits == infinity);
  CHECK(H(-endless).bits == (infinity | 0x8000u));
  CHECK(static_cast<float>(of_bits<H>(infinity)) == endless);
  CHECK(H(std::numeric_limits<float>::max()).bits == infinity);
  const H nan(std::numeric_limits<float>::quiet_NaN());
  CHECK(std::isnan(static_cast<float>(nan)));
}

}  // namespace

TEST_SUITE("core/half") {
  TEST_CASE("bfloat16 holds its values and rounds to the nearest") {
    check_patterns<bfloat16>(7, 127);
    // A NaN whose payload lies in the bits that go stays one.
    CHECK(std::isnan(static_cast<float>(bfloat16(__builtin_bit_cast(float, 0x7f800001u)))));
  }
  TEST_CASE("float16 holds its values and rounds to the nearest") {
    check_patterns<float16>(10, 15);
    CHECK(static_cast<float>(of_bits<float16>(0x7bffu)) == 65504.0f);
    // Half way to 2^16 and beyond is infinite.
    CHECK(float16(65519.0f).bits == 0x7bffu);
    CHECK(float16(65520.0f).bits == 0x7c00u);
  }
}

}  // namespace talpa::half_test
