// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "selectors/slow_selection.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/sinkhorn.hpp>
#include <talpa/selectors/sinkhorn.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::sinkhorn_test {

namespace {

using support::backward_of;
using support::batch_shape;
using support::experts_of;
using support::route;
using experts = std::vector<index>;

/// logarithms of the entries of the plan that are compared: u + log of the scale of the column,
/// with plain exponentials.
std::vector<std::vector<double>> slow_plan(const matrix<double, cpu>& u, const batch_shape& shape,
                                           double tolerance) {
  const auto count = static_cast<std::size_t>(u.cols());
  index real = 0;
  for (index n = 0; n < u.rows(); ++n) real += shape.takes_part(n) ? 1 : 0;
  std::vector<double> d1(count, 1.0);
  for (double change = 1e9; change > tolerance;) {
    std::vector<double> sums(count, 0.0);
    for (index n = 0; n < u.rows(); ++n) {
      if (!shape.takes_part(n)) continue;
      double sum = 0.0;
      for (std::size_t e = 0; e < count; ++e) {
        sum += d1[e] * std::exp(u(n, static_cast<index>(e)));
      }
      for (std::size_t e = 0; e < count; ++e) {
        sums[e] += std::exp(u(n, static_cast<index>(e))) / (static_cast<double>(real) * sum);
      }
    }
    change = 0.0;
    for (std::size_t e = 0; e < count; ++e) {
      const double next = 1.0 / (static_cast<double>(count) * sums[e]);
      change += std::abs(next - d1[e]) / static_cast<double>(count);
      d1[e] = next;
    }
  }
  std::vector<std::vector<double>> plan;
  for (index n = 0; n < u.rows(); ++n) {
    plan.emplace_back();
    for (std::size_t e = 0; e < count; ++e) {
      plan.back().push_back(u(n, static_cast<index>(e)) + std::log(d1[e]));
    }
  }
  return plan;
}

}  // namespace

TEST_SUITE("selectors/sinkhorn") {
  // Both tokens like expert 0 better, token 0 more so. With d1 = (1, x) the plan has equal columns
  // when 1/(1 + x/8) + 1/(1 + x/2) = 1, x = 4: token 0 has (8, 4) / 12, token 1 (2, 4) / 6.
  TEST_CASE_TEMPLATE("sinkhorn on two tokens, by hand", T, TALPA_SCALARS) {
    matrix<T, cpu> u(2, 2);
    u(0, 0) = static_cast<T>(std::log(8.0));
    u(1, 0) = static_cast<T>(std::log(2.0));
    const auto r = route(sinkhorn{.k = 1}, u);
    CHECK(experts_of(r, 0) == experts{0});
    CHECK(experts_of(r, 1) == experts{1});
    // A sigmoid of the logit itself: 8 / 9 and 1 / 2.
    const double bound = support::rounding_bound<T>(8.0 + std::log(8.0), 1.0);
    CHECK(support::difference(r.gates.view(), {2, 2, {8.0 / 9.0, 0, 0, 0.5}}, bound) == "");
    matrix<T, cpu> dg(2, 2);
    dg(0, 0) = T{9};
    dg(0, 1) = std::numeric_limits<T>::quiet_NaN();
    dg(1, 1) = T{2};
    const auto du = backward_of(sinkhorn{.k = 1}, u, r, dg);
    CHECK(support::difference(du.view(), {2, 2, {8.0 / 9.0, 0, 0, 0.5}}, 2.0 * bound) == "");
    // At inference both take the larger logit.
    const auto greedy = route(selector_at(sinkhorn{.k = 1}, mode::inference), u);
    CHECK(experts_of(greedy, 0) == experts{0});
    CHECK(experts_of(greedy, 1) == experts{0});
    CHECK(route(selector_at(sinkhorn{.k = 1}, mode::training), u) == r);
  }

  TEST_CASE("sinkhorn agrees with plain exponentials and sorting") {
    std::uint64_t seed = 11;
    for (const index count : {1, 2, 3, 8, 33, 65}) {
      for (const index k : {1, 2, 5}) {
        if (k > count) continue;
        CAPTURE(count);
        CAPTURE(k);
        support::test_random random(++seed);
        const index tokens = support::many_rows(350);
        const matrix<double, cpu> u = support::random_matrix<double>(random, tokens, count, 2.0);
        const batch_shape shape(random, tokens, tokens);
        const sinkhorn selector{.k = k};
        const auto r = route(selector, u, shape, 3);
        const auto plan = slow_plan(u, shape, selector.tolerance);
        // The gates are those of a recorded mask; top_k with raw gates has them too.
        const matrix<double, cpu> dg = support::random_matrix<double>(random, tokens, count);
        const auto du = backward_of(selector, u, r, dg);
        matrix<double, cpu> gates(tokens, count);
        context<cpu> ctx(1);
        auto mask = r.mask;
        ops::replay(ctx, top_k<gate::raw>{.k = k}, u, {}, mask.view(), gates.view());
        const auto expected_du = backward_of(top_k<gate::raw>{.k = k}, u, r, dg);
        std::string problem;
        for (index n = 0; n < tokens && problem.empty(); ++n) {
          std::vector<index> order(static_cast<std::size_t>(count));
          for (index e = 0; e < count; ++e) order[static_cast<std::size_t>(e)] = e;
          const auto& score = plan[static_cast<std::size_t>(n)];
          std::stable_sort(order.begin(), order.end(), [&](index a, index b) {
            return score[static_cast<std::size_t>(a)] > score[static_cast<std::size_t>(b)];
          });
          order.resize(static_cast<std::size_t>(k));
          std::sort(order.begin(), order.end());
          if (!shape.takes_part(n)) order.clear();
          if (experts_of(r, n) != order) problem = "experts of token " + std::to_string(n);
          for (index e = 0; e < count; ++e) {
            const bool on = r.view().on(n, e);
            const double s = 1.0 / (1.0 + std::exp(-u(n, e)));
            const double g = !on ? 0.0 : k == 1 ? s : gates(n, e);
            const double d = k == 1 ? (on ? dg(n, e) * s * (1.0 - s) : 0.0) : expected_du(n, e);
            // A sigmoid: exponential, sum, quotient; its slope a product more, relative to the
            // size of dg. For k > 1 the same operations, bit for bit.
            const double unit = k == 1 ? support::rounding_bound<double>(16.0, 1.0) : 0.0;
            if (!support::within(r.gates(n, e), g, unit) ||
                !support::within(du(n, e), d, unit * 4.0)) {
              problem = "token " + std::to_string(n) + ", expert " + std::to_string(e);
            }
          }
        }
        CHECK(problem == "");
      }
    }
  }

  TEST_CASE("logits far beyond the range of exp are balanced") {
    // Every token has expert 0 on top by 1000, token n by 1000 - n: the last half goes elsewhere.
    matrix<float, cpu> u(8, 2);
    for (index n = 0; n < 8; ++n) u(n, 0) = 1000.0f - 4.0f * static_cast<float>(n);
    const auto r = route(sinkhorn{.k = 1}, u);
    for (index n = 0; n < 8; ++n) {
      CHECK(experts_of(r, n).size() == 1);
      CHECK(std::isfinite(r.gates(n, experts_of(r, n)[0])));
    }
    CHECK(experts_of(r, 0) == experts{0});
    CHECK(experts_of(r, 7) == experts{1});
  }

  TEST_CASE("rows that cannot be routed, masked experts and ties") {
    matrix<double, cpu> u(4, 3);
    u(1, 2) = std::numeric_limits<double>::quiet_NaN();
    u(2, 0) = -std::numeric_limits<double>::infinity();
    const auto r = route(sinkhorn{.k = 2}, u);
    CHECK(experts_of(r, 1) == experts{0, 1});
    CHECK(std::isnan(r.gates(1, 0)));
    CHECK(experts_of(r, 2) == experts{1, 2});
    // Expert 0 is offered to two tokens of three, so its scale is larger than the others'.
    CHECK(experts_of(r, 0) == experts{0, 1});
    const matrix<double, cpu> same(3, 4);
    for (index n = 0; n < 3; ++n) {
      CHECK(experts_of(route(sinkhorn{.k = 2}, same), n) == experts{0, 1});
    }
  }

  TEST_CASE("hyperparameters outside their ranges are refused") {
    const matrix<float, cpu> u(2, 8);
    CHECK_THROWS_WITH_AS(route(sinkhorn{.k = 9}, u),
                         "talpa::sinkhorn: 'k' is 9, expected 1..8 = experts", value_error);
    CHECK_THROWS_WITH_AS(route(sinkhorn{.k = 1, .tolerance = -0.5}, u),
                         "talpa::sinkhorn: 'tolerance' is -0.5, expected >= 0 and finite = change "
                         "of a scale to stop at",
                         value_error);
    CHECK_THROWS_WITH_AS(
        route(sinkhorn{.k = 1, .iterations = -1}, u),
        "talpa::sinkhorn: 'iterations' is -1, expected >= 0 = times to scale at most", value_error);
    CHECK(sinkhorn{.k = 3}.max_selected(8) == 3);
  }
}

}  // namespace talpa::sinkhorn_test
