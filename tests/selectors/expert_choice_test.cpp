// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "selectors/slow_selection.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/expert_choice.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::expert_choice_test {

namespace {

using support::backward_of;
using support::batch_shape;
using support::experts_of;
using support::route;
using experts = std::vector<index>;

/// The gradient is p (dg - sum of p dg): errors of the probabilities (difference to the largest
/// logit, exponential, sum of E terms, division), of the products and of their sum, on terms that
/// add up to 2 max |dg|.
template <class T>
double gradient_bound(index count, double spread, double largest_dgate) {
  return support::rounding_bound<T>(6.0 * (static_cast<double>(count) + spread + 4.0),
                                    2.0 * largest_dgate);
}

template <class T>
void compare_with_reference(index tokens, index count, double factor, std::uint64_t seed) {
  CAPTURE(count);
  CAPTURE(factor);
  support::test_random random(seed);
  const matrix<T, cpu> u = support::eventful_logits<T>(random, tokens, count);
  const matrix<T, cpu> dgates = support::random_matrix<T>(random, tokens, count);
  const batch_shape shape(random, tokens, tokens);
  const expert_choice selector{.factor = factor};
  // The probabilities themselves are compared by the tests of dense.
  const routing<T, cpu> all = route(dense{}, u, shape);
  const routing<T, cpu> r = route(selector, u, shape, 3);
  const matrix<T, cpu> du = backward_of(selector, u, r, dgates);
  index real = 0;
  for (index n = 0; n < tokens; ++n) real += shape.takes_part(n) ? 1 : 0;
  const index c =
      std::max<index>(1, static_cast<index>(std::floor(static_cast<double>(real) * factor /
                                                       static_cast<double>(count))));
  matrix<std::uint8_t, cpu> on(tokens, count);
  for (index e = 0; e < count; ++e) {
    std::vector<index> order;
    for (index n = 0; n < tokens; ++n) {
      if (shape.takes_part(n) && std::isfinite(u(n, e))) order.push_back(n);
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](index a, index b) { return all.gates(a, e) > all.gates(b, e); });
    for (index i = 0; i < c && i < static_cast<index>(order.size()); ++i) {
      on(order[static_cast<std::size_t>(i)], e) = 1;
    }
  }
  std::string problem;
  for (index n = 0; n < tokens && problem.empty(); ++n) {
    const std::vector<double> logits = support::widened_row(u, n);
    support::slow_row expected = support::slow_top_k(logits, count, support::weighing::raw);
    for (index e = 0; e < count; ++e) {
      expected.on[static_cast<std::size_t>(e)] = on(n, e) != 0;
      if (r.view().on(n, e) != (on(n, e) != 0) ||
          r.gates(n, e) != (on(n, e) != 0 ? all.gates(n, e) : T{0})) {
        problem = "token " + std::to_string(n) + ", expert " + std::to_string(e);
      }
    }
    const std::vector<double> gradient =
        support::slow_gradient(expected, support::widened_row(dgates, n), support::weighing::raw);
    const double bound = gradient_bound<T>(count, support::spread_of_row(logits),
                                           testing::largest(dgates.view().row_range(n, 1)));
    for (index e = 0; e < count && problem.empty(); ++e) {
      if (!support::within(static_cast<double>(du(n, e)), gradient[static_cast<std::size_t>(e)],
                           bound)) {
        problem = "gradient of token " + std::to_string(n) + ", expert " + std::to_string(e);
      }
    }
  }
  CHECK(problem == "");
}

}  // namespace

TEST_SUITE("selectors/expert_choice") {
  // p = (1, 9), (6, 4), (2, 8), (7, 3) in tenths. c = floor(4 * 1 / 2) = 2: expert 0 takes tokens
  // 3 and 1, expert 1 takes 0 and 2.
  TEST_CASE_TEMPLATE("expert_choice on four tokens, by hand", T, TALPA_SCALARS) {
    const double tenths[] = {1, 9, 6, 4, 2, 8, 7, 3};
    matrix<T, cpu> u(4, 2);
    for (index i = 0; i < 8; ++i) u.data()[i] = static_cast<T>(std::log(tenths[i]));
    const double bound = support::rounding_bound<T>(2.0 * (2.0 + 4.0 + std::log(9.0)), 1.0);
    const auto r = route(expert_choice{.factor = 1.0}, u);
    CHECK(support::difference(r.gates.view(), {4, 2, {0, 0.9, 0.6, 0, 0, 0.8, 0.7, 0}}, bound) ==
          "");
    CHECK(experts_of(r, 0) == experts{1});
    CHECK(experts_of(r, 3) == experts{0});
    // c = floor(4 * 1.5 / 2) = 3: expert 0 takes token 2 too, expert 1 takes 1.
    const expert_choice more{.factor = 1.5};
    const auto m = route(more, u);
    CHECK(experts_of(m, 0) == experts{1});
    CHECK(experts_of(m, 1) == experts{0, 1});
    CHECK(experts_of(m, 2) == experts{0, 1});
    CHECK(experts_of(m, 3) == experts{0});
    // Token 1 with dg = (1, 2): the mean is 0.6 + 0.8 = 1.4, du = (0.6 * -0.4, 0.4 * 0.6).
    matrix<T, cpu> dg(4, 2);
    dg(1, 0) = T{1};
    dg(1, 1) = T{2};
    const auto du = backward_of(more, u, m, dg);
    CHECK(support::difference(du.view(), {4, 2, {0, 0, -0.24, 0.24, 0, 0, 0, 0}}, 2.0 * bound) ==
          "");
  }

  TEST_CASE("equal probabilities go to the earlier token, and a token may stay without expert") {
    const matrix<float, cpu> u(4, 2);
    const auto r = route(expert_choice{.factor = 1.0}, u);
    CHECK(experts_of(r, 0) == experts{0, 1});
    CHECK(experts_of(r, 1) == experts{0, 1});
    CHECK(experts_of(r, 2).empty());
    CHECK(experts_of(r, 3).empty());
  }

  TEST_CASE("every expert takes a token however few there are") {
    matrix<float, cpu> u(2, 5);
    u(1, 4) = 1.0f;
    const auto r = route(expert_choice{.factor = 1.0}, u);
    CHECK(experts_of(r, 0) == experts{0, 1, 2, 3});
    CHECK(experts_of(r, 1) == experts{4});
  }

  TEST_CASE("padding and rows that cannot be routed are taken by nobody") {
    matrix<double, cpu> u(4, 2);
    u(0, 1) = std::numeric_limits<double>::infinity();
    batch_shape shape(4);
    shape.real[1] = 0;
    // T = 2, c = 1.
    const auto r = route(expert_choice{.factor = 1.0}, u, shape);
    CHECK(std::isnan(r.gates(0, 0)));
    CHECK(std::isnan(r.gates(0, 1)));
    CHECK(experts_of(r, 1).empty());
    CHECK(experts_of(r, 2) == experts{0, 1});
    CHECK(experts_of(r, 3).empty());
  }

  TEST_CASE("a factor of E takes every token: dense, bit for bit") {
    support::test_random random(8);
    const matrix<float, cpu> u = support::random_matrix<float>(random, 90, 7, 3.0);
    CHECK(route(expert_choice{.factor = 7.0}, u) == route(dense{}, u));
    CHECK(route(expert_choice{.factor = 1e300}, u) == route(dense{}, u));
  }

  TEST_CASE("expert_choice agrees with sorting on thousands of rows") {
    std::uint64_t seed = 70;
    for (const index count : {1, 2, 3, 8, 31, 33, 65}) {
      for (const double factor : {0.1, 1.0, 2.5}) {
        compare_with_reference<float>(support::many_rows(400), count, factor, ++seed);
        compare_with_reference<double>(support::many_rows(333), count, factor, ++seed);
      }
    }
  }

  TEST_CASE("a factor outside its range is refused") {
    const matrix<float, cpu> u(2, 3);
    CHECK_THROWS_WITH_AS(route(expert_choice{.factor = -1.0}, u),
                         "talpa::expert_choice: 'factor' is -1, expected > 0 and finite = mean "
                         "number of experts per token",
                         value_error);
    CHECK_THROWS_AS(route(expert_choice{.factor = std::numeric_limits<double>::infinity()}, u),
                    value_error);
    CHECK(expert_choice{}.max_selected(6) == 6);
  }
}

}  // namespace talpa::expert_choice_test
