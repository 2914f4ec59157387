// SPDX-License-Identifier: Apache-2.0
#include "support/scalars.hpp"

#include <talpa/core/random.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

namespace talpa::random_test {

namespace {

// The tests of distributions have fixed seeds, so they pass or fail for good; a correct generator
// would fail one at a random seed with the probability of a deviation of `sigmas`, 6e-7 each.
constexpr double sigmas = 5.0;

constexpr std::size_t draws = 1 << 16;

constexpr random_stream first{0x0123456789abcdefu, 3};

template <class T>
std::vector<double> uniforms(random_stream s, std::size_t n = draws) {
  std::vector<double> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<double>(uniform<T>(s, i));
  return x;
}

template <class T>
std::vector<double> normals(random_stream s, std::size_t n = draws) {
  std::vector<double> x(n);
  for (std::size_t i = 0; i < n; ++i) x[i] = static_cast<double>(normal<T>(s, i));
  return x;
}

// Mean of f(x).
template <class F>
double mean(const std::vector<double>& x, F f) {
  double sum = 0;
  for (const double v : x) sum += f(v);
  return sum / static_cast<double>(x.size());
}

// Deviation of a mean of n values of the given variance that `sigmas` allow.
double mean_bound(double variance, std::size_t n) {
  return sigmas * std::sqrt(variance / static_cast<double>(n));
}

// Mean of x y over n pairs of independent numbers of mean 0 and variance 1 has variance 1 / n.
double product_mean(const std::vector<double>& x, const std::vector<double>& y) {
  double sum = 0;
  for (std::size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum / static_cast<double>(x.size());
}

std::vector<double> standardised(std::vector<double> uniform_numbers) {
  for (double& v : uniform_numbers) v = (v - 0.5) * std::sqrt(12.0);
  return uniform_numbers;
}

// Kolmogorov's statistic sqrt(n) sup |F_n - F|. P(statistic > x) <= 2 exp(-2 x^2) (Dvoretzky,
// Kiefer and Wolfowitz with Massart's constant), so 2.75 corresponds to 5e-7.
constexpr double kolmogorov_bound = 2.75;
template <class F>
double kolmogorov(std::vector<double> x, F distribution) {
  std::sort(x.begin(), x.end());
  const double n = static_cast<double>(x.size());
  double worst = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double p = distribution(x[i]);
    worst = std::max({worst, p - static_cast<double>(i) / n, static_cast<double>(i + 1) / n - p});
  }
  return worst * std::sqrt(n);
}

// FNV-1a of the bytes of patterns.
template <class Patterns>
std::uint64_t digest(const Patterns& patterns) {
  std::uint64_t value = 0xcbf29ce484222325u;
  for (std::uint64_t p : patterns) {
    for (int byte = 0; byte < 8; ++byte) {
      value = (value ^ (p & 0xff)) * 0x100000001b3u;
      p >>= 8;
    }
  }
  return value;
}

}  // namespace

TEST_SUITE("core/random") {
  // The lines of Random123's file kat_vectors for philox4x32 with 10 rounds.
  TEST_CASE("philox gives the known answers of its authors") {
    static_assert(philox({{0, 0, 0, 0}}, {{0, 0}}) ==
                  philox_block{{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}});
    constexpr std::uint32_t ones = 0xffffffffu;
    CHECK(philox({{ones, ones, ones, ones}}, {{ones, ones}}) ==
          philox_block{{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}});
    CHECK(philox({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}},
                 {{0xa4093822u, 0x299f31d0u}}) ==
          philox_block{{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}});
  }

  TEST_CASE("a block is philox of the position, the stream and the seed") {
    const random_stream s{0x299f31d0a4093822u, 0x0370734413198a2eu};
    CHECK(random_block(s, 0x85a308d3243f6a88u) ==
          philox_block{{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}});
  }

  TEST_CASE("elements are the words of the blocks in the documented layout") {
    for (std::uint64_t j : {std::uint64_t(0), std::uint64_t(1), std::uint64_t(1) << 40}) {
      const philox_block b = random_block(first, j);
      for (std::uint64_t w = 0; w < 4; ++w) {
        CHECK(talpa::random_bits32(first, 4 * j + w) == b.word[w]);
        CHECK(uniform<float>(first, 4 * j + w) ==
              std::ldexp(static_cast<float>(b.word[w] >> 8), -24));
      }
      for (std::uint64_t w = 0; w < 2; ++w) {
        const std::uint64_t bits =
            (std::uint64_t(b.word[2 * w + 1]) << 32) + std::uint64_t(b.word[2 * w]);
        CHECK(talpa::random_bits64(first, 2 * j + w) == bits);
        CHECK(uniform<double>(first, 2 * j + w) ==
              std::ldexp(static_cast<double>(bits >> 11), -53));
      }
    }
  }

  TEST_CASE("uniform reaches zero and stays below one at the extreme bits") {
    CHECK(talpa::detail::unit_float(0) == 0.0f);
    CHECK(talpa::detail::unit_float(0xffffffffu) == std::nextafter(1.0f, 0.0f));
    CHECK(talpa::detail::unit_double(0) == 0.0);
    CHECK(talpa::detail::unit_double(~std::uint64_t(0)) == std::nextafter(1.0, 0.0));
  }

  TEST_CASE_TEMPLATE("uniform has the moments and the distribution of its name", T, TALPA_SCALARS) {
    const std::vector<double> x = uniforms<T>(first);
    CHECK(*std::min_element(x.begin(), x.end()) >= 0.0);
    CHECK(*std::max_element(x.begin(), x.end()) < 1.0);
    // Variances of x and of (x - 1/2)^2: 1/12 and 1/80 - 1/144 = 1/180.
    CHECK(std::abs(mean(x, [](double v) { return v - 0.5; })) <= mean_bound(1.0 / 12.0, draws));
    CHECK(std::abs(mean(x, [](double v) { return (v - 0.5) * (v - 0.5) - 1.0 / 12.0; })) <=
          mean_bound(1.0 / 180.0, draws));
    CHECK(kolmogorov(x, [](double v) { return v; }) <= kolmogorov_bound);
  }

  TEST_CASE_TEMPLATE("normal has the moments and the distribution of its name", T, TALPA_SCALARS) {
    const std::vector<double> x = normals<T>(first);
    // E x^(2 m) = 1, 3, 15, 105: the variances of x, x^2, x^3, x^4 are 1, 2, 15, 96.
    CHECK(std::abs(mean(x, [](double v) { return v; })) <= mean_bound(1.0, draws));
    CHECK(std::abs(mean(x, [](double v) { return v * v - 1.0; })) <= mean_bound(2.0, draws));
    CHECK(std::abs(mean(x, [](double v) { return v * v * v; })) <= mean_bound(15.0, draws));
    CHECK(std::abs(mean(x, [](double v) { return v * v * v * v - 3.0; })) <=
          mean_bound(96.0, draws));
    CHECK(kolmogorov(x, [](double v) { return 0.5 * std::erfc(-v / std::sqrt(2.0)); }) <=
          kolmogorov_bound);
  }

  TEST_CASE_TEMPLATE("the two normal numbers of a pair are independent", T, TALPA_SCALARS) {
    const std::vector<double> x = normals<T>(first, 2 * draws);
    std::vector<double> even(draws);
    std::vector<double> odd(draws);
    std::vector<double> even_squares(draws);
    std::vector<double> odd_squares(draws);
    for (std::size_t i = 0; i < draws; ++i) {
      even[i] = x[2 * i];
      odd[i] = x[2 * i + 1];
      even_squares[i] = (even[i] * even[i] - 1.0) / std::sqrt(2.0);
      odd_squares[i] = (odd[i] * odd[i] - 1.0) / std::sqrt(2.0);
    }
    CHECK(std::abs(product_mean(even, odd)) <= mean_bound(1.0, draws));
    CHECK(std::abs(product_mean(even_squares, odd_squares)) <= mean_bound(1.0, draws));
  }

  TEST_CASE("normal is Box-Muller of the documented bits") {
    // Relative error of the float result in roundoffs: log 1.6, halved by the root, 1 of the root,
    // 2.5 of the cosine, 1 of the product, and one for the terms of second order.
    const double bound = 6.5 * 0.5 * std::numeric_limits<float>::epsilon();
    const double turn = 2.0 * std::acos(-1.0);
    double worst = 0;
    for (std::uint64_t j = 0; j < 20000; ++j) {
      const std::uint64_t bits = talpa::random_bits64(first, j);
      const double k = static_cast<double>(static_cast<float>(bits & 0xffffffffu));
      const double u = static_cast<double>(static_cast<float>(std::ldexp(k + 0.5, -32)));
      const double v = std::ldexp(static_cast<double>(bits >> 40), -24);
      const double radius = std::sqrt(-2.0 * std::log(u));
      const double pair[] = {radius * std::cos(turn * v), radius * std::sin(turn * v)};
      for (std::uint64_t side = 0; side < 2; ++side) {
        const double error = std::abs(normal<float>(first, 2 * j + side) - pair[side]);
        worst = std::max(worst, error - bound * std::abs(pair[side]));
      }
    }
    // cos(turn * v) itself is good to a few epsilons of double in absolute terms.
    CHECK(worst <= 32.0 * std::numeric_limits<double>::epsilon());
  }

  TEST_CASE_TEMPLATE("normal is finite at the extreme bits", T, TALPA_SCALARS) {
    using talpa::detail::box_muller;
    const T smallest = std::ldexp(T(1), sizeof(T) == 4 ? -33 : -54);
    const double largest = sizeof(T) == 4 ? 6.77 : 8.66;
    CHECK(box_muller(smallest, T(0), false) > T(largest - 0.01));
    CHECK(box_muller(smallest, T(0), false) < T(largest));
    CHECK(box_muller(T(1), T(0.125), true) == T(0));
  }

  TEST_CASE("neighbouring streams, seeds and positions are uncorrelated") {
    const std::vector<double> x = standardised(uniforms<float>(first));
    const random_stream others[] = {{first.seed, first.stream + 1},
                                    {first.seed, first.stream ^ (std::uint64_t(1) << 63)},
                                    {first.seed + 1, first.stream},
                                    {first.seed ^ (std::uint64_t(1) << 63), first.stream},
                                    {first.stream, first.seed}};
    for (const random_stream& other : others) {
      const std::vector<double> y = standardised(uniforms<float>(other));
      CHECK(std::abs(product_mean(x, y)) <= mean_bound(1.0, draws));
    }
    const std::vector<double> longer = standardised(uniforms<float>(first, draws + 4));
    for (std::ptrdiff_t lag = 1; lag <= 4; ++lag) {
      const std::vector<double> shifted(longer.begin() + lag,
                                        longer.begin() + lag + std::ptrdiff_t(draws));
      CHECK(std::abs(product_mean(x, shifted)) <= mean_bound(1.0, draws));
    }
  }

  TEST_CASE("keep keeps everything at one, nothing at zero, and compares exactly between") {
    const float infinity = std::numeric_limits<float>::infinity();
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (std::uint64_t i = 0; i < 512; ++i) {
      CHECK(keep(first, i, 1.0f));
      CHECK(keep(first, i, 1.5f));
      CHECK(keep(first, i, infinity));
      CHECK_FALSE(keep(first, i, 0.0f));
      CHECK_FALSE(keep(first, i, -0.5f));
      CHECK_FALSE(keep(first, i, -infinity));
      CHECK_FALSE(keep(first, i, nan));
      CHECK(keep(first, i, 0.5f) == (talpa::random_bits32(first, i) < 0x80000000u));
      CHECK(keep(first, i, 0.625f) == (talpa::random_bits32(first, i) < 0xa0000000u));
    }
    // Bits b that are a float decide at b / 2^32 itself, which is the first probability too low.
    int at_threshold = 0;
    for (std::uint64_t i = 0; i < 4096; ++i) {
      const std::uint32_t bits = talpa::random_bits32(first, i);
      if (bits % 256 != 0) continue;
      const float p = std::ldexp(static_cast<float>(bits), -32);
      CHECK_FALSE(keep(first, i, p));
      CHECK(keep(first, i, std::nextafter(p, 1.0f)));
      ++at_threshold;
    }
    REQUIRE(at_threshold > 0);
  }

  TEST_CASE("keep has the frequency of its probability, and masks of rising probability nest") {
    const float rising[] = {0.001f, 0.1f, 0.5f, 0.9f, 0.999f};
    std::vector<bool> before(draws, false);
    for (const float p : rising) {
      CAPTURE(p);
      double kept = 0;
      bool nested = true;
      for (std::size_t i = 0; i < draws; ++i) {
        const bool now = keep(first, i, p);
        nested = nested && (now || !before[i]);
        before[i] = now;
        kept += now ? 1 : 0;
      }
      const double q = static_cast<double>(p);
      CHECK(nested);
      CHECK(std::abs(kept / static_cast<double>(draws) - q) <= mean_bound(q * (1.0 - q), draws));
    }
  }

  TEST_CASE("uniform_index covers its range evenly") {
    for (const std::uint64_t n : {2u, 7u, 60u}) {
      std::vector<double> count(n, 0.0);
      for (std::size_t i = 0; i < draws; ++i) {
        const std::uint64_t v = uniform_index(first, i, n);
        REQUIRE(v < n);
        count[v] += 1.0;
      }
      for (const double c : count) {
        const double p = 1.0 / static_cast<double>(n);
        CHECK(std::abs(c / static_cast<double>(draws) - p) <= mean_bound(p * (1.0 - p), draws));
      }
    }
    for (std::uint64_t i = 0; i < 64; ++i) {
      CHECK(uniform_index(first, i, 0) == 0);
      CHECK(uniform_index(first, i, 1) == 0);
      // The product with 2^k moves the upper k bits down.
      CHECK(uniform_index(first, i, std::uint64_t(1) << 40) ==
            talpa::random_bits64(first, i) >> 24);
      CHECK(uniform_index(first, i, ~std::uint64_t(0)) < ~std::uint64_t(0));
    }
  }

  TEST_CASE("multiply_high is the high half of the product") {
    using talpa::detail::multiply_high;
    constexpr std::uint64_t all = ~std::uint64_t(0);
    CHECK(multiply_high(all, all) == all - 1);
    CHECK(multiply_high(std::uint64_t(1) << 32, std::uint64_t(1) << 32) == 1);
    CHECK(multiply_high(0x123456789abcdef0u, 0xfedcba9876543210u) == 0x121fa00ad77d7422u);
    CHECK(multiply_high(0xffffffff00000001u, 0x00000001ffffffffu) == 0x1fffffffdu);
    CHECK(multiply_high(7, all / 7) == 0);
  }

  TEST_CASE("a generator hands out a fresh stream each time") {
    generator g(42);
    std::set<std::uint64_t> streams;
    for (int i = 0; i < 1000; ++i) {
      const random_stream s = g.next();
      CHECK(s.seed == 42);
      streams.insert(s.stream);
    }
    CHECK(streams.size() == 1000);
    CHECK(g.seed() == 42);
    CHECK(g.next_stream() == 1000);
  }

  TEST_CASE("a generator resumes from its two numbers, and copies run alike") {
    generator g(7);
    for (int i = 0; i < 5; ++i) g.next();
    generator resumed(g.seed(), g.next_stream());
    generator copy = g;
    CHECK(resumed == g);
    CHECK(copy == g);
    const random_stream expected = g.next();
    CHECK_FALSE(copy == g);
    CHECK(resumed.next() == expected);
    CHECK(copy.next() == expected);
    CHECK(copy == g);
    CHECK_FALSE(generator(7) == generator(8));
    CHECK_FALSE(generator(7).next() == generator(8).next());
  }

  // The numbers are part of what a seed means: a change here changes every seeded run of a user.
  TEST_CASE("numbers have the same bits everywhere, in any order") {
    constexpr std::size_t n = 10000;
    std::vector<std::uint64_t> of_float(n);
    std::vector<std::uint64_t> of_double(n);
    for (std::size_t i = n; i-- > 0;) {
      of_float[i] = talpa::math::detail::to_bits(normal<float>(first, i));
      of_double[i] = talpa::math::detail::to_bits(normal<double>(first, i));
    }
    CHECK(digest(of_float) == 0xb68d0712246bbe59u);
    CHECK(digest(of_double) == 0x557e70039404229fu);
  }
}

}  // namespace talpa::random_test
