// SPDX-License-Identifier: Apache-2.0
#include "selectors/coupled.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/selectors/base_assignment.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace talpa::base_assignment_test {

namespace {

using support::backward_of;
using support::batch_shape;
using support::experts_of;
using support::route;
using experts = std::vector<index>;

}  // namespace

TEST_SUITE("selectors/base_assignment") {
  // Both tokens like expert 0 better: ln 3 + ln 3 is more than ln 4 + 0.
  TEST_CASE_TEMPLATE("base_assignment on two tokens, by hand", T, TALPA_SCALARS) {
    matrix<T, cpu> u(2, 2);
    u(0, 0) = static_cast<T>(std::log(4.0));
    u(0, 1) = static_cast<T>(std::log(3.0));
    u(1, 0) = static_cast<T>(std::log(3.0));
    const auto r = route(base_assignment{}, u);
    CHECK(experts_of(r, 0) == experts{1});
    CHECK(experts_of(r, 1) == experts{0});
    // sigmoid(ln 3) = 3 / 4 with slope 3 / 16.
    const double bound = support::rounding_bound<T>(16.0, 1.0);
    CHECK(support::difference(r.gates.view(), {2, 2, {0, 0.75, 0.75, 0}}, bound) == "");
    matrix<T, cpu> dg(2, 2);
    dg(0, 0) = std::numeric_limits<T>::quiet_NaN();
    dg(0, 1) = T{16};
    dg(1, 0) = T{-8};
    const auto du = backward_of(base_assignment{}, u, r, dg);
    CHECK(support::difference(du.view(), {2, 2, {0, 3.0, -1.5, 0}}, 16.0 * bound) == "");
    // At inference both take the larger logit.
    const auto greedy = route(selector_at(base_assignment{}, mode::inference), u);
    CHECK(experts_of(greedy, 0) == experts{0});
    CHECK(experts_of(greedy, 1) == experts{0});
    CHECK(route(selector_at(base_assignment{}, mode::training), u) == r);
  }

  TEST_CASE("thousands of tokens: one expert each, equal loads, gates and gradients of it") {
    support::test_random random(3);
    for (const index count : {1, 2, 7, 32, 65}) {
      CAPTURE(count);
      const index tokens = 1040;
      const matrix<double, cpu> u = support::random_matrix<double>(random, tokens, count, 3.0);
      const matrix<double, cpu> dg = support::random_matrix<double>(random, tokens, count);
      const batch_shape shape(random, tokens, tokens);
      index real = 0;
      for (index n = 0; n < tokens; ++n) real += shape.takes_part(n) ? 1 : 0;
      for (const bool greedy : {false, true}) {
        const base_assignment selector{.greedy = greedy};
        const auto r = route(selector, u, shape, 2);
        const auto du = backward_of(selector, u, r, dg);
        std::vector<index> load(static_cast<std::size_t>(count), 0);
        std::string problem;
        for (index n = 0; n < tokens && problem.empty(); ++n) {
          const experts on = experts_of(r, n);
          if (on.size() != (shape.takes_part(n) ? 1u : 0u)) problem = "experts";
          if (on.empty()) continue;
          ++load[static_cast<std::size_t>(on[0])];
          const double* const row = u.view().row(n);
          if (greedy && on[0] != std::max_element(row, row + count) - row) problem = "arg max";
          for (index e = 0; e < count; ++e) {
            const double s = e == on[0] ? 1.0 / (1.0 + std::exp(-u(n, e))) : 0.0;
            // Exponential, sum, quotient, two products; |dg| is at most 4.
            const double bound = support::rounding_bound<double>(16.0, 1.0);
            if (!support::within(r.gates(n, e), s, bound) ||
                !support::within(du(n, e), dg(n, e) * s * (1.0 - s), 4.0 * bound)) {
              problem = "token " + std::to_string(n);
            }
          }
        }
        CHECK(problem == "");
        if (!greedy) {
          CHECK(*std::max_element(load.begin(), load.end()) <= ceil_div(real, count));
        }
      }
    }
  }

  TEST_CASE("rows that cannot be routed, padding and ties") {
    matrix<float, cpu> u(6, 2);
    u(0, 1) = std::numeric_limits<float>::quiet_NaN();
    u(1, 1) = std::numeric_limits<float>::infinity();
    batch_shape shape(6);
    shape.real[2] = 0;
    // T = 3: two places each; all sums are equal, and the order of the search decides.
    const auto r = route(base_assignment{}, u, shape);
    for (const index n : {0, 1}) {
      CHECK(experts_of(r, n) == experts{0});
      CHECK(std::isnan(r.gates(n, 0)));
    }
    CHECK(experts_of(r, 2).empty());
    CHECK(experts_of(r, 3) == experts{0});
    CHECK(experts_of(r, 4) == experts{0});
    CHECK(experts_of(r, 5) == experts{1});
    CHECK(base_assignment{}.max_selected(7) == 1);
  }
}

}  // namespace talpa::base_assignment_test
