// SPDX-License-Identifier: Apache-2.0
#include "selectors/sided.hpp"
#include "selectors/slow_selection.hpp"
#include "support/laws.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

namespace talpa::softmax_probability_test {

namespace {

using selector = top_k<gate::softmax_probability>;

/// Gates and gradients of random rows against the product of both whole Jacobians.
template <class T>
void compare(index experts, index k) {
  support::test_random random(13 + static_cast<std::uint64_t>(experts));
  const index tokens = 500;
  const auto u = support::eventful_logits<T>(random, tokens, experts);
  const auto dg = support::random_matrix<T>(random, tokens, experts);
  const auto found = support::run_sided<T>(selector{.k = k}, u, dg);
  for (index n = 0; n < tokens; ++n) {
    const auto logits = support::widened_row(u, n);
    const auto slow = support::slow_top_k(logits, k, support::weighing::raw);
    const std::vector<double>& p = slow.probability;
    double sum = 0.0;
    for (std::size_t e = 0; e < p.size(); ++e) sum += slow.on[e] ? std::exp(p[e]) : 0.0;
    std::vector<double> g(p.size(), 0.0), dp(p.size(), 0.0), du(p.size(), 0.0);
    for (std::size_t e = 0; e < p.size(); ++e) g[e] = slow.on[e] ? std::exp(p[e]) / sum : 0.0;
    for (std::size_t e = 0; e < p.size(); ++e) {
      for (std::size_t j = 0; j < p.size(); ++j) {
        dp[j] += static_cast<double>(dg(n, static_cast<index>(e))) * g[e] *
                 ((e == j ? 1.0 : 0.0) - g[j]);
      }
    }
    for (std::size_t e = 0; e < p.size(); ++e) {
      for (std::size_t j = 0; j < p.size(); ++j) {
        du[j] += dp[e] * p[e] * ((e == j ? 1.0 : 0.0) - p[j]);
      }
    }
    // Two softmaxes of E numbers each, a difference and a function.
    const double chain =
        2.0 * (2.0 * static_cast<double>(experts) + support::spread_of_row(logits) + 8.0);
    const double error = support::rounding_bound<T>(chain, 1.0);
    const double largest = testing::largest(dg.view().row_range(n, 1));
    for (std::size_t e = 0; e < p.size(); ++e) {
      const auto i = static_cast<index>(e);
      REQUIRE(found.on(n, i) == slow.on[e]);
      REQUIRE(support::within(static_cast<double>(found.r.gates(n, i)), g[e], error * g[e]));
      REQUIRE(
          support::within(static_cast<double>(found.dlogits(n, i)), du[e], 8.0 * error * largest));
    }
  }
}

}  // namespace

TEST_SUITE("routing/gate_weight") {
  // p = (1, 3, 2, 4) / 10; of 0.3 and 0.4 the softmax is 1 / (1 + e^0.1) and the rest.
  TEST_CASE_TEMPLATE("softmax_probability by hand", T, TALPA_SCALARS) {
    const auto u = support::row_matrix<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const auto dg = support::row_matrix<T>({9.0, 1.0, 9.0, 0.0});
    const auto found = support::run_sided<T>(selector{.k = 2}, u, dg);
    const double low = 1.0 / (1.0 + std::exp(0.1)), d = low * (1.0 - low);
    const double bound = support::rounding_bound<T>(2.0 * (4.0 + 4.0) * 2.0, 1.0);
    CHECK(support::difference(found.r.gates.view(), {1, 4, {0.0, low, 0.0, 1.0 - low}}, bound) ==
          "");
    // dp = (0, d, 0, -d), sum p dp = -d / 10.
    CHECK(support::difference(found.dlogits.view(),
                              {1, 4, {0.01 * d, 0.33 * d, 0.02 * d, -0.36 * d}}, bound) == "");
  }
  TEST_CASE_TEMPLATE("softmax_probability agrees with whole Jacobians", T, TALPA_SCALARS) {
    compare<T>(1, 1);
    compare<T>(2, 1);
    compare<T>(8, 2);
    compare<T>(33, 5);
    compare<T>(65, 65);
  }
  TEST_CASE_TEMPLATE("laws of top_k with softmax_probability", T, TALPA_SCALARS) {
    support::obeys(testing::selector_laws<T>(selector{.k = 1}, 1));
    support::obeys(testing::selector_laws<T>(selector{.k = 2}, 2));
    support::obeys(testing::selector_laws<T>(selector{.k = 2}, 8));
    support::obeys(testing::selector_laws<T>(selector{.k = 5}, 33));
    support::obeys(testing::selector_laws<T>(selector{.k = 2}, 65));
  }
}

}  // namespace talpa::softmax_probability_test
