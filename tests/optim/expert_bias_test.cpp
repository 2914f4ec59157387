// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/refused.hpp"

#include <talpa/core/matrix.hpp>
#include <talpa/optim/expert_bias.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

namespace talpa::expert_bias_test {

using support::refused;

TEST_SUITE("optim/expert_bias") {
  TEST_CASE("update_bias moves by the sign, and not at the mean") {
    matrix<double, cpu> bias(1, 3);
    bias(0, 0) = 0.5;
    update_bias(bias.view(), {4, 1, 7}, 0.25);
    CHECK(bias(0, 0) == 0.5);
    CHECK(bias(0, 1) == 0.25);
    CHECK(bias(0, 2) == -0.25);
    update_bias(bias.view(), {0, 0, 0}, 0.25);
    CHECK(bias(0, 1) == 0.25);
    // A mean that is not whole: 2 is above 5 / 3.
    update_bias(bias.view(), {2, 1, 2}, 0.25);
    CHECK(bias(0, 0) == 0.25);
    CHECK(bias(0, 1) == 0.5);
    CHECK(bias(0, 2) == -0.5);
  }

  // T k / E + 1 is 3, and 2 where half of the tokens are padding.
  TEST_CASE("balance_quantiles by hand") {
    matrix<double, cpu> s(4, 2), bias(1, 2);
    const double rows[4][2] = {{3.0, 1.0}, {4.0, 1.0}, {1.0, 2.0}, {4.0, 0.0}};
    for (index n = 0; n < 4; ++n) {
      for (index e = 0; e < 2; ++e) s(n, e) = rows[n][e];
    }
    balance_quantiles(bias.view(), s, 1);
    // alpha = (1, 1, 1, 0): columns (2, 3, 0, 4) and (0, 0, 1, 0); third largest 2 and 0.
    CHECK(bias(0, 0) == -2.0);
    CHECK(bias(0, 1) == 0.0);
    vector<std::uint8_t, cpu> real(4);
    real[1] = real[2] = 1;
    matrix<double, cpu> other(1, 2);
    balance_quantiles(other.view(), s, 1, real.view());
    // alpha = (1, 1): columns (3, 0) and (0, 1); second largest.
    CHECK(other(0, 0) == 0.0);
    CHECK(other(0, 1) == 0.0);
    real[1] = real[2] = 0;
    balance_quantiles(bias.view(), s, 1, real.view());
    CHECK(bias(0, 0) == -2.0);
  }

  // Repeated, it ends near a balanced assignment: the greatest load falls towards T k / E.
  TEST_CASE("balance_quantiles balances") {
    support::test_random random(3);
    const index tokens = 240, experts = 6, k = 2;
    matrix<double, cpu> s = support::random_matrix<double>(random, tokens, experts);
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
    for (int step = 0; step < 50; ++step) balance_quantiles(bias.view(), s, k);
    const index fair = tokens * k / experts;
    CHECK(before > 2 * fair);
    CHECK(greatest() <= fair + fair / 10);
  }

  TEST_CASE("what does not fit is refused") {
    matrix<double, cpu> bias(1, 3), s(4, 3);
    CHECK(refused([&] { update_bias(bias.view(), {1, 2}, 0.1); }) != "");
    CHECK(refused([&] {
            update_bias(bias.view(), {1, 2, 3}, -1.0);
          }) == "talpa::update_bias: 'rate' is -1, expected >= 0");
    CHECK(refused([&] { balance_quantiles(bias.view(), s, 3); }) ==
          "talpa::balance_quantiles: 'k' is 3, expected 1..2 = experts - 1");
    CHECK(refused([&] { balance_quantiles(bias.view(), s, 1); }) ==
          "talpa::balance_quantiles: 'padding_mask' is 4, expected real tokens with tokens k "
          "divisible by experts");
  }
}

}  // namespace talpa::expert_bias_test
