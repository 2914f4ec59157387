// SPDX-License-Identifier: Apache-2.0
#include "selectors/sided.hpp"
#include "selectors/slow_selection.hpp"
#include "support/laws.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/selectors/learned_threshold.hpp>
#include <talpa/selectors/threshold.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::threshold_test {

namespace {

using support::refusal;
using support::row_matrix;
using support::run_sided;
using learned = learned_threshold<linear_scorer>;

std::vector<double> slow_softmax(const std::vector<double>& u) {
  const double top = *std::max_element(u.begin(), u.end());
  std::vector<double> p;
  double sum = 0.0;
  for (const double v : u) sum += std::exp(v - top);
  for (const double v : u) p.push_back(std::exp(v - top) / sum);
  return p;
}

/// Rows of a threshold selector against plain loops. A row with a margin within the error of p is
/// left out; those are few. `bar` of a row; by_margin: gates by p - bar, otherwise by p.
template <class T, class Selector, class Bar>
void compare(const Selector& selector, index experts, bool by_margin, bool raw, Bar bar) {
  support::test_random random(77 + static_cast<std::uint64_t>(experts));
  const index tokens = support::many_rows(400);
  const matrix<T, cpu> u = support::eventful_logits<T>(random, tokens, experts);
  const matrix<T, cpu> dg = support::random_matrix<T>(random, tokens, experts);
  const matrix<T, cpu> c = support::random_matrix<T>(random, tokens, 1, 2.0);
  const auto found = run_sided<T>(selector, u, dg, by_margin ? c : matrix<T, cpu>());
  index left = 0;
  for (index n = 0; n < tokens; ++n) {
    const std::vector<double> logits = support::widened_row(u, n);
    const std::vector<double> p = slow_softmax(logits);
    const double th = bar(static_cast<double>(c(n, 0)));
    // p = exp(u - max) / sum: a difference, a function, E additions and a division.
    const double chain = static_cast<double>(experts) + support::spread_of_row(logits) + 8.0;
    const double error = support::rounding_bound<T>(2.0 * chain, 1.0);
    double nearest = 1.0, sum = 0.0;
    std::vector<double> r(p.size(), 0.0);
    std::vector<bool> on(p.size(), false);
    for (std::size_t e = 0; e < p.size(); ++e) {
      if (std::isinf(logits[e])) continue;
      nearest = std::min(nearest, std::abs(p[e] - th));
      on[e] = p[e] >= th;
      if (on[e]) sum += r[e] = by_margin ? p[e] - th : p[e];
    }
    if (nearest <= error) {
      ++left;
      continue;
    }
    if (raw) sum = 1.0;
    double dbar = 0.0, inner = 0.0;
    std::vector<double> dp(p.size(), 0.0);
    for (std::size_t e = 0; e < p.size(); ++e) {
      for (std::size_t j = 0; on[e] && j < p.size(); ++j) {
        if (!on[j]) continue;
        const double direct = e == j ? 1.0 / sum : 0.0;
        dp[j] += static_cast<double>(dg(n, static_cast<index>(e))) *
                 (direct - (raw ? 0.0 : r[e] / (sum * sum)));
      }
    }
    for (std::size_t e = 0; e < p.size(); ++e) {
      dbar -= dp[e];
      inner += p[e] * dp[e];
    }
    const double largest = testing::largest(dg.view().row_range(n, 1));
    // A gate is r / sum with the error of p in both; its gradient divides by sum once more.
    const double gate_error = sum > 0.0 ? error * 3.0 / std::min(1.0, sum) : 0.0;
    const double slope_error =
        sum > 0.0 ? 8.0 * chain * error * largest / std::min(1.0, sum * sum) : 0.0;
    for (std::size_t e = 0; e < p.size(); ++e) {
      const auto i = static_cast<index>(e);
      const double gate = sum > 0.0 ? r[e] / sum : 0.0;
      REQUIRE(found.on(n, i) == on[e]);
      REQUIRE(support::within(static_cast<double>(found.r.gates(n, i)), gate, gate_error));
      const double du = p[e] * (dp[e] - inner);
      REQUIRE(support::within(static_cast<double>(found.dlogits(n, i)), du, slope_error));
    }
    if (by_margin) {
      const double s = 1.0 / (1.0 + std::exp(-static_cast<double>(c(n, 0))));
      const double dc = dbar * th / s * s * (1.0 - s);
      REQUIRE(support::within(static_cast<double>(found.dcontrol(n, 0)), dc, slope_error));
    }
  }
  CHECK(10 * left <= 4 * tokens);  // one row in three has ties, and few values
}

}  // namespace

TEST_SUITE("selectors/threshold") {
  // p = (1, 3, 2, 4) / 10.
  TEST_CASE_TEMPLATE("threshold on four experts, by hand", T, TALPA_SCALARS) {
    const matrix<T, cpu> u = row_matrix<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const matrix<T, cpu> dg = row_matrix<T>({9.0, 1.0, -9.0, 0.0});
    // Four exponentials of logits of size one or two, their sum and a division.
    const double bound = support::rounding_bound<T>(2.0 * (4.0 + 4.0), 1.0);
    const auto raw = run_sided<T>(threshold<gate::raw>{.least = 0.25}, u, dg);
    CHECK(support::difference(raw.r.gates.view(), {1, 4, {0.0, 0.3, 0.0, 0.4}}, bound) == "");
    CHECK(support::difference(raw.dlogits.view(), {1, 4, {-0.03, 0.21, -0.06, -0.12}}, bound) ==
          "");
    const auto unit = run_sided<T>(threshold<gate::renormalised>{.least = 0.25}, u, dg);
    CHECK(support::difference(unit.r.gates.view(), {1, 4, {0.0, 3.0 / 7.0, 0.0, 4.0 / 7.0}},
                              bound) == "");
    const auto none = run_sided<T>(threshold<gate::renormalised>{.least = 0.9}, u, dg);
    CHECK(none.count(0) == 0);
    for (index e = 0; e < 4; ++e) {
      CHECK(none.r.gates(0, e) == T{0});
      CHECK(none.dlogits(0, e) == T{0});
    }
    CHECK(run_sided<T>(threshold<gate::raw>{.least = 0.0}, u, dg).count(0) == 4);
    // Equal logits: p is exactly 1 / 4, and reaches it.
    const matrix<T, cpu> equal = row_matrix<T>({2.0, 2.0, 2.0, 2.0});
    CHECK(run_sided<T>(threshold<gate::raw>{.least = 0.25}, equal, dg).count(0) == 4);
    const matrix<T, cpu> one = row_matrix<T>({5.0});
    CHECK(run_sided<T>(threshold<gate::raw>{.least = 1.0}, one, one).count(0) == 1);
  }

  // c = 0: th = 1 / 4 / 2; a = (-0.025, 0.175, 0.075, 0.275), sum over three 0.525.
  TEST_CASE_TEMPLATE("learned_threshold on four experts, by hand", T, TALPA_SCALARS) {
    const matrix<T, cpu> u = row_matrix<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const matrix<T, cpu> dg = row_matrix<T>({9.0, 1.0, 0.0, 0.0}), c = row_matrix<T>({0.0});
    const auto found = run_sided<T>(learned{}, u, dg, c);
    // Softmax as above, a difference of numbers below 1 and a quotient with the sum 0.525 of three.
    const double bound = support::rounding_bound<T>(4.0 * 2.0 * (4.0 + 4.0), 1.0);
    CHECK(support::difference(found.r.gates.view(),
                              {1, 4, {0.0, 1.0 / 3.0, 1.0 / 7.0, 11.0 / 21.0}}, bound) == "");
    // da = (1[e = 1] - 1/3) / 0.525 on {1, 2, 3}, so (80, -40, -40) / 63; they add up to 0;
    // sum p da = (24 - 8 - 16) / 63 = 0.
    CHECK(support::difference(found.dlogits.view(),
                              {1, 4, {0.0, 24.0 / 63.0, -8.0 / 63.0, -16.0 / 63.0}},
                              8.0 * bound) == "");
    CHECK(support::within(static_cast<double>(found.dcontrol(0, 0)), 0.0, 8.0 * bound));
  }

  TEST_CASE_TEMPLATE("agree with plain loops on thousands of rows", T, TALPA_SCALARS) {
    for (const index experts : {1, 2, 5, 8, 33, 65}) {
      CAPTURE(experts);
      for (const double least : {0.07, 0.23, 0.61}) {
        const auto bar = [&](double) { return static_cast<double>(static_cast<T>(least)); };
        compare<T>(threshold<gate::raw>{.least = least}, experts, false, true, bar);
        compare<T>(threshold<gate::renormalised>{.least = least}, experts, false, false, bar);
      }
      for (const double relative : {0.4, 1.0}) {
        compare<T>(learned{.relative = relative}, experts, true, false, [&](double c) {
          return relative / static_cast<double>(experts) / (1.0 + std::exp(-c));
        });
      }
    }
  }

  TEST_CASE("masked experts, controls that are not numbers, and sums of zero") {
    const double infinity = std::numeric_limits<double>::infinity();
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const auto u = row_matrix<double>({-infinity, 1.0, 1.0});
    const auto dg = row_matrix<double>({1.0, 2.0, 3.0});
    // The threshold underflows to 0, which a masked expert would reach.
    const auto open = run_sided<double>(learned{}, u, dg, row_matrix<double>({-1e4}));
    CHECK(open.count(0) == 2);
    CHECK_FALSE(open.on(0, 0));
    const auto broken = run_sided<double>(learned{}, u, dg, row_matrix<double>({nan}));
    CHECK(broken.count(0) == 3);
    for (index e = 0; e < 3; ++e) CHECK(std::isnan(broken.r.gates(0, e)));
    // p = th = 1: on with a margin of 0, so without gate and gradient.
    const auto zero = run_sided<double>(learned{}, row_matrix<double>({3.0}),
                                        row_matrix<double>({1.0}), row_matrix<double>({100.0}));
    CHECK(zero.on(0, 0));
    CHECK(zero.r.gates(0, 0) == 0.0);
    CHECK(zero.dlogits(0, 0) == 0.0);
    CHECK(zero.dcontrol(0, 0) == 0.0);
  }

  TEST_CASE("what does not fit is refused") {
    CHECK(refusal(threshold<gate::raw>{.least = 1.5}, 4) ==
          "talpa::threshold: 'least' is 1.5, expected 0..1 = probability from which an expert is "
          "on");
    CHECK(refusal(threshold<gate::raw>{.least = -0.5}, 4) != "");
    CHECK(refusal(threshold<gate::raw>{.least = std::nan("")}, 4) != "");
    CHECK(refusal(learned{.relative = 4.5}, 4) ==
          "talpa::learned_threshold: 'relative' is 4.5, expected in (0, experts] = largest "
          "threshold in units of 1 / experts");
    CHECK(refusal(learned{.relative = 0.0}, 4) != "");
    CHECK(refusal(learned{.relative = 4.0}, 4) == "");
  }
}

}  // namespace talpa::threshold_test
