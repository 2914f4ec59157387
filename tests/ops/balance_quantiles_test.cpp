// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/refused.hpp"
#include "support/scalars.hpp"

#include <talpa/core/matrix.hpp>
#include <talpa/cpu/balance_quantiles.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace talpa::balance_quantiles_test {

namespace {

using support::random_matrix;
using support::refused;
using support::test_random;

/// By sorting, for tokens that all take part.
template <class T>
std::vector<T> slow(const matrix<T, cpu>& s, index k, const matrix<T, cpu>& bias) {
  const index tokens = s.rows(), experts = s.cols();
  std::vector<T> alpha, result;
  for (index n = 0; n < tokens; ++n) {
    std::vector<T> row;
    for (index e = 0; e < experts; ++e) row.push_back(s(n, e) + bias(0, e));
    std::sort(row.rbegin(), row.rend());
    alpha.push_back(row[static_cast<std::size_t>(k)]);
  }
  for (index e = 0; e < experts; ++e) {
    std::vector<T> column;
    for (index n = 0; n < tokens; ++n) column.push_back(s(n, e) - alpha[std::size_t(n)]);
    std::sort(column.rbegin(), column.rend());
    result.push_back(-column[static_cast<std::size_t>(tokens * k / experts)]);
  }
  return result;
}

}  // namespace

TEST_SUITE("ops/balance_quantiles") {
  // T k / E + 1 is 3, and 2 where half of the tokens are padding.
  TEST_CASE("two experts and four tokens, by hand") {
    context<cpu> ctx(1);
    matrix<double, cpu> s(4, 2), bias(1, 2);
    const double rows[4][2] = {{3.0, 1.0}, {4.0, 1.0}, {1.0, 2.0}, {4.0, 0.0}};
    for (index n = 0; n < 4; ++n) {
      for (index e = 0; e < 2; ++e) s(n, e) = rows[n][e];
    }
    ops::balance_quantiles(ctx, s, 1, {}, bias.view());
    // alpha = (1, 1, 1, 0): columns (2, 3, 0, 4) and (0, 0, 1, 0); third largest 2 and 0.
    CHECK(bias(0, 0) == -2.0);
    CHECK(bias(0, 1) == 0.0);
    vector<std::uint8_t, cpu> real(4);
    real[1] = real[2] = 1;
    matrix<double, cpu> other(1, 2);
    ops::balance_quantiles(ctx, s, 1, real.view(), other.view());
    // alpha = (1, 1): columns (3, 0) and (0, 1); second largest.
    CHECK(other(0, 0) == 0.0);
    CHECK(other(0, 1) == 0.0);
    real[1] = real[2] = 0;
    ops::balance_quantiles(ctx, s, 1, real.view(), bias.view());
    CHECK(bias(0, 0) == -2.0);
  }

  // Repeated, it ends near a balanced assignment: the greatest load falls towards T k / E.
  TEST_CASE("the load becomes even") {
    context<cpu> ctx(2);
    test_random random(3);
    const index tokens = 240, experts = 6, k = 2;
    matrix<double, cpu> s = random_matrix<double>(random, tokens, experts);
    for (index n = 0; n < tokens; ++n) s(n, 0) += 1.0;
    matrix<double, cpu> bias(1, experts);
    const auto greatest = [&] {
      std::vector<index> load(static_cast<std::size_t>(experts), 0);
      for (index n = 0; n < tokens; ++n) {
        std::vector<index> order;
        for (index e = 0; e < experts; ++e) order.push_back(e);
        std::sort(order.begin(), order.end(),
                  [&](index a, index b) { return s(n, a) + bias(0, a) > s(n, b) + bias(0, b); });
        for (index j = 0; j < k; ++j) ++load[static_cast<std::size_t>(order[std::size_t(j)])];
      }
      return *std::max_element(load.begin(), load.end());
    };
    const index before = greatest();
    for (int step = 0; step < 50; ++step) ops::balance_quantiles(ctx, s, k, {}, bias.view());
    const index fair = tokens * k / experts;
    CHECK(before > 2 * fair);
    CHECK(greatest() <= fair + fair / 10);
  }

  TEST_CASE_TEMPLATE("it is what sorting finds, for any number of threads", T, TALPA_SCALARS) {
    test_random random(4);
    for (const index experts : {2, 5, 33}) {
      for (const index tokens : {1, 7, 600}) {
        CAPTURE(experts);
        CAPTURE(tokens);
        const matrix<T, cpu> s = random_matrix<T>(random, tokens, experts);
        const matrix<T, cpu> bias = random_matrix<T>(random, 1, experts);
        for (const index k : {index{1}, experts - 1}) {
          const std::vector<T> expected = slow(s, k, bias);
          for (const int threads : {1, 3}) {
            context<cpu> ctx(threads);
            matrix<T, cpu> found = bias;
            ops::balance_quantiles(ctx, s, k, {}, found.view());
            for (index e = 0; e < experts; ++e) {
              REQUIRE(found(0, e) == expected[static_cast<std::size_t>(e)]);
            }
            CHECK(ctx.scratch.used() == 0);
          }
        }
      }
    }
  }

  TEST_CASE("tokens without k + 1 numbers take no part, what is not finite sets nothing") {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    context<cpu> ctx(1);
    test_random random(5);
    matrix<double, cpu> s = random_matrix<double>(random, 6, 3), bias(1, 3);
    matrix<double, cpu> expected = bias;
    ops::balance_quantiles(ctx, s, 1, {}, expected.view());
    matrix<double, cpu> more(8, 3);
    for (index n = 0; n < 6; ++n) {
      for (index e = 0; e < 3; ++e) more(n + (n > 2 ? 1 : 0), e) = s(n, e);
    }
    more(3, 1) = std::nan("");
    more(7, 0) = more(7, 2) = -infinity;
    matrix<double, cpu> found = bias;
    ops::balance_quantiles(ctx, more, 1, {}, found.view());
    for (index e = 0; e < 3; ++e) CHECK(found(0, e) == expected(0, e));
    // Nobody can have expert 2.
    for (index n = 0; n < 6; ++n) s(n, 2) = -infinity;
    bias(0, 2) = 0.25;
    ops::balance_quantiles(ctx, s, 1, {}, bias.view());
    CHECK(bias(0, 2) == 0.25);
    CHECK(std::isfinite(bias(0, 0)));
    // No token at all.
    ops::balance_quantiles(ctx, matrix<double, cpu>(0, 3), 1, {}, bias.view());
    CHECK(bias(0, 2) == 0.25);
  }

  TEST_CASE("what does not fit is refused, and the bias stays") {
    context<cpu> ctx(1);
    matrix<double, cpu> bias(1, 3), s(4, 3), narrow(4, 2);
    bias(0, 1) = 7.0;
    const vector<std::uint8_t, cpu> real(3);
    CHECK(refused([&] { ops::balance_quantiles(ctx, narrow, 1, {}, bias.view()); }) ==
          "talpa::ops::balance_quantiles: 'bias' has shape [1, 3], expected [1, 2] = one number an "
          "expert of scores");
    CHECK(refused([&] { ops::balance_quantiles(ctx, s, 1, real.view(), bias.view()); }) ==
          "talpa::ops::balance_quantiles: 'padding_mask' has shape [3], expected [4] = one flag a "
          "token");
    for (const index k : {0, 3}) {
      CHECK(refused([&] { ops::balance_quantiles(ctx, s, k, {}, bias.view()); }) ==
            detail::concat("talpa::ops::balance_quantiles: 'k' is ", std::to_string(k),
                           ", expected 1..2 = experts - 1"));
    }
    CHECK(bias(0, 1) == 7.0);
  }
}

}  // namespace talpa::balance_quantiles_test
