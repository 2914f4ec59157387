// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"

#include <talpa/autograd/initialise.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/cpu/pair_gates.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/inputs.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

namespace talpa::pair_gates_test {

namespace {

/// Experts of a row by descending value, ties by index.
std::vector<index> ranked(const matrix<double, cpu>& values, const matrix<std::uint32_t, cpu>& mask,
                          index n) {
  std::vector<index> on;
  for (index e = 0; e < values.cols(); ++e) {
    if (testing::bit(mask.view(), n, e)) on.push_back(e);
  }
  std::stable_sort(on.begin(), on.end(),
                   [&](index a, index b) { return values(n, a) > values(n, b); });
  return on;
}

}  // namespace

TEST_SUITE("ops/pair_gates") {
  TEST_CASE("choices get the gates of another routing by rank, and give their gradients back") {
    generator random(5);
    support::test_random sizes(6);
    for (int trial = 0; trial < 40; ++trial) {
      const index tokens = 1 + sizes.below(60), own = 1 + sizes.below(40),
                  other = 1 + sizes.below(40);
      matrix<double, cpu> logits(tokens, own), from(tokens, other), dgates(tokens, own);
      fill_normal(logits.view(), 1.0, random);
      fill_normal(dgates.view(), 1.0, random);
      // Gates with ties.
      for (index i = 0; i < from.size(); ++i) {
        from.data()[i] = static_cast<double>(sizes.below(8)) / 8.0;
      }
      const auto mask = testing::random_mask(tokens, own, 0.3, random);
      const auto from_mask = testing::random_mask(tokens, other, 0.3, random);
      matrix<double, cpu> expected(tokens, own), dfrom(tokens, other);
      std::fill_n(dfrom.data(), dfrom.size(), 0.25);
      matrix<double, cpu> found_dfrom = dfrom;
      for (index n = 0; n < tokens; ++n) {
        const auto a = ranked(logits, mask, n), b = ranked(from, from_mask, n);
        for (std::size_t r = 0; r < std::min(a.size(), b.size()); ++r) {
          expected(n, a[r]) = from(n, b[r]);
          dfrom(n, b[r]) += dgates(n, a[r]);
        }
      }
      for (const int threads : {1, 3}) {
        context<cpu> ctx(threads);
        matrix<double, cpu> gates(tokens, own), back = found_dfrom;
        std::fill_n(gates.data(), gates.size(), 9.0);
        ops::pair_gates(ctx, logits, mask, from, from_mask, gates.view());
        ops::pair_gates_backward(ctx, logits, mask, from, from_mask, dgates, back.view());
        CHECK(testing::first_difference(gates, expected) == "");
        CHECK(testing::first_difference(back, dfrom) == "");
      }
    }
  }

  TEST_CASE("NaN gates are the last in order") {
    context<cpu> ctx(1);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    matrix<float, cpu> logits(1, 4), from(1, 4), gates(1, 4);
    for (index e = 0; e < 4; ++e) logits(0, e) = static_cast<float>(4 - e);
    from(0, 0) = nan;
    from(0, 1) = 0.25f;
    from(0, 2) = nan;
    from(0, 3) = 0.75f;
    matrix<std::uint32_t, cpu> mask(1, 1);
    mask(0, 0) = 0xfu;
    ops::pair_gates(ctx, logits, mask, from, mask, gates.view());
    CHECK(gates(0, 0) == 0.75f);
    CHECK(gates(0, 1) == 0.25f);
    CHECK(std::isnan(gates(0, 2)));
    CHECK(std::isnan(gates(0, 3)));
  }

  TEST_CASE("shapes that do not fit are refused") {
    context<cpu> ctx(1);
    matrix<float, cpu> logits(3, 2), from(2, 4), gates(3, 2);
    const matrix<std::uint32_t, cpu> mask(3, 1);
    CHECK_THROWS_WITH_AS(
        ops::pair_gates(ctx, logits, mask, from, mask, gates.view()),
        "talpa::ops::pair_gates: 'from' has shape [2, 4], expected [3, 4] = tokens of gates",
        shape_error);
  }
}

}  // namespace talpa::pair_gates_test
