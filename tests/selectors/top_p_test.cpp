// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "selectors/slow_mass.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_p.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <concepts>
#include <limits>

namespace talpa::top_p_test {

namespace {

using support::backward_of;
using support::experts_of;
using support::one_row;
using support::route;
using support::weighing;
using experts = std::vector<index>;

using huang = top_p<gate::raw, crossing::kept>;
using exclusive = top_p<gate::raw, crossing::dropped>;

template <class Weight>
constexpr weighing how = std::same_as<Weight, gate::raw> ? weighing::raw : weighing::renormalised;

template <class Weight, class Crossing>
void compare() {
  std::uint64_t seed = 500;
  for (const index count : {1, 2, 3, 8, 31, 33, 65, 130}) {
    for (const double p : {0.0, 0.23, 0.71, 0.965, 1.0}) {
      for (const index min_k : {1, 3}) {
        CAPTURE(count);
        CAPTURE(p);
        CAPTURE(min_k);
        const top_p<Weight, Crossing> selector{.p = p, .min_k = min_k};
        const auto slow = [&](const std::vector<double>& u) {
          return support::slow_top_p(u, p, min_k, Crossing::keeps, how<Weight>);
        };
        CHECK(support::compare_with_slow<float>(selector, support::many_rows(200), count, ++seed,
                                                how<Weight>, 1.0, slow) == "");
        CHECK(support::compare_with_slow<double>(selector, support::many_rows(200), count, ++seed,
                                                 how<Weight>, 1.0, slow) == "");
      }
    }
  }
}

}  // namespace

TEST_SUITE("selectors/top_p") {
  // p = (1, 3, 2, 4) / 10; by rank 4, 3, 2, 1 with sums 0.4, 0.7, 0.9, 1.
  TEST_CASE_TEMPLATE("top_p on four experts, by hand", T, TALPA_SCALARS) {
    const matrix<T, cpu> u = one_row<T>({0.0, std::log(3.0), std::log(2.0), std::log(4.0)});
    const matrix<T, cpu> dg = one_row<T>({9.0, 1.0, -9.0, 0.0});
    // Four exponentials of logits of size one or two, their sum and a division.
    const double bound = support::rounding_bound<T>(2.0 * (4.0 + 4.0), 1.0);

    CHECK(experts_of(route(huang{.p = 0.3}, u), 0) == experts{3});
    CHECK(experts_of(route(huang{.p = 0.5}, u), 0) == experts{1, 3});
    CHECK(experts_of(route(huang{.p = 0.8}, u), 0) == experts{1, 2, 3});
    CHECK(experts_of(route(exclusive{.p = 0.3}, u), 0) == experts{3});
    CHECK(experts_of(route(exclusive{.p = 0.5}, u), 0) == experts{3});
    CHECK(experts_of(route(exclusive{.p = 0.8}, u), 0) == experts{1, 3});
    CHECK(experts_of(route(exclusive{.p = 0.3, .min_k = 3}, u), 0) == experts{1, 2, 3});

    const auto raw = route(huang{.p = 0.5}, u);
    CHECK(support::difference(raw.gates.view(), {1, 4, {0.0, 0.3, 0.0, 0.4}}, bound) == "");
    // sum of p dg over {1, 3} is 0.3; du = p (dg on the mask - 0.3).
    CHECK(support::difference(backward_of(huang{.p = 0.5}, u, raw, dg).view(),
                              {1, 4, {-0.03, 0.21, -0.06, -0.12}}, bound) == "");
    const top_p<gate::renormalised> unit{.p = 0.5};
    const auto whole = route(unit, u);
    CHECK(support::difference(whole.gates.view(), {1, 4, {0.0, 3.0 / 7.0, 0.0, 4.0 / 7.0}},
                              bound) == "");
    CHECK(support::difference(backward_of(unit, u, whole, dg).view(),
                              {1, 4, {0.0, 12.0 / 49.0, 0.0, -12.0 / 49.0}}, bound) == "");
  }

  TEST_CASE_TEMPLATE("top_p agrees with sorting on thousands of rows", Weight, gate::raw,
                     gate::renormalised, gate::softmax_selected) {
    compare<Weight, crossing::kept>();
    compare<Weight, crossing::dropped>();
  }

  // Equal logits of two, four or eight experts: every sum is exact.
  TEST_CASE_TEMPLATE("a sum equal to p crosses where inclusive", T, TALPA_SCALARS) {
    const matrix<T, cpu> u = one_row<T>({2.0, 2.0, 2.0, 2.0});
    CHECK(experts_of(route(huang{.p = 0.5}, u), 0) == experts{0, 1, 2});
    CHECK(experts_of(route(huang{.p = 0.5, .inclusive = true}, u), 0) == experts{0, 1});
    CHECK(experts_of(route(exclusive{.p = 0.5}, u), 0) == experts{0, 1});
    CHECK(experts_of(route(exclusive{.p = 0.5, .inclusive = true}, u), 0) == experts{0});
    // The sum of all is one and does not exceed p = 1.
    CHECK(experts_of(route(huang{.p = 1.0}, u), 0) == experts{0, 1, 2, 3});
    CHECK(experts_of(route(exclusive{.p = 1.0}, u), 0) == experts{0, 1, 2, 3});
    CHECK(experts_of(route(huang{.p = 1.0, .inclusive = true}, u), 0) == experts{0, 1, 2, 3});
    CHECK(experts_of(route(exclusive{.p = 1.0, .inclusive = true}, u), 0) == experts{0, 1, 2});
    // p = 0: the first expert crosses; without it min_k is left.
    CHECK(experts_of(route(huang{.p = 0.0}, u), 0) == experts{0});
    CHECK(experts_of(route(huang{.p = 0.0, .inclusive = true}, u), 0) == experts{0});
    CHECK(experts_of(route(exclusive{.p = 0.0, .min_k = 2}, u), 0) == experts{0, 1});
    CHECK(experts_of(route(exclusive{.p = 0.0, .min_k = 9}, u), 0) == experts{0, 1, 2, 3});
  }

  // Sums that round above one must not drop the last experts.
  TEST_CASE_TEMPLATE("p = 1 is dense, bit for bit", T, TALPA_SCALARS) {
    for (const index count : {1, 3, 6, 32, 49, 70}) {
      CAPTURE(count);
      support::test_random random(11);
      const matrix<T, cpu> u = support::eventful_logits<T>(random, 300, count);
      const auto all = route(dense{}, u);
      CHECK(route(huang{.p = 1.0}, u) == all);
      CHECK(route(exclusive{.p = 1.0}, u) == all);
    }
  }

  TEST_CASE("masked experts are never on, and rows that are not valid have NaN everywhere") {
    const float infinity = std::numeric_limits<float>::infinity();
    matrix<float, cpu> u(4, 5);
    for (index n = 0; n < 4; ++n) {
      for (index e = 0; e < 5; ++e) u(n, e) = n == 1 || (n == 0 && e % 2 == 1) ? -infinity : 1.0f;
    }
    u(2, 3) = std::numeric_limits<float>::quiet_NaN();
    u(3, 0) = infinity;
    const auto r = route(huang{.p = 0.9, .min_k = 4}, u);
    CHECK(experts_of(r, 0) == experts{0, 2, 4});
    for (index n = 1; n < 4; ++n) {
      CHECK(experts_of(r, n) == experts{0, 1, 2, 3, 4});
      for (index e = 0; e < 5; ++e) CHECK(std::isnan(r.gates(n, e)));
    }
  }

  TEST_CASE("hyperparameters out of range are refused with their range") {
    const matrix<float, cpu> u(2, 8);
    CHECK_THROWS_WITH_AS(route(huang{.p = 1.5}, u),
                         "talpa::top_p: 'p' is 1.5, expected 0..1 = cumulative probability",
                         value_error);
    CHECK_THROWS_WITH_AS(route(huang{.p = -0.25}, u),
                         "talpa::top_p: 'p' is -0.25, expected 0..1 = cumulative probability",
                         value_error);
    CHECK_THROWS_WITH_AS(route(huang{.p = std::nan("")}, u),
                         "talpa::top_p: 'p' is nan, expected 0..1 = cumulative probability",
                         value_error);
    CHECK_THROWS_WITH_AS(
        route(huang{.min_k = 0}, u),
        "talpa::top_p: 'min_k' is 0, expected >= 1 = experts a token gets in any case",
        value_error);
    CHECK(huang{}.max_selected(8) == 8);
  }
}

}  // namespace talpa::top_p_test
