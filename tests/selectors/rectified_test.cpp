// SPDX-License-Identifier: Apache-2.0
#include "selectors/sided.hpp"
#include "selectors/slow_selection.hpp"
#include "support/laws.hpp"
#include "support/sanitized.hpp"
#include "support/scalars.hpp"

#include <talpa/optim/sparsity_controller.hpp>
#include <talpa/selectors/rectified.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

namespace talpa::rectified_test {

TEST_SUITE("selectors/rectified") {
  // Every number is exact: nothing is computed.
  TEST_CASE_TEMPLATE("rectified by hand", T, TALPA_SCALARS) {
    const auto u = support::row_matrix<T>({-1.0, 0.0, 2.0, 0.5});
    const auto found =
        support::run_sided<T>(rectified{}, u, support::row_matrix<T>({3.0, 4.0, 5.0, -6.0}));
    const double gates[] = {0.0, 0.0, 2.0, 0.5}, du[] = {0.0, 0.0, 5.0, -6.0};
    for (index e = 0; e < 4; ++e) {
      CHECK(static_cast<double>(found.r.gates(0, e)) == gates[e]);
      CHECK(static_cast<double>(found.dlogits(0, e)) == du[e]);
      CHECK(found.on(0, e) == (e >= 2));
    }
  }

  TEST_CASE_TEMPLATE("rectified is relu on thousands of rows", T, TALPA_SCALARS) {
    for (const index experts : {1, 2, 7, 33, 65}) {
      support::test_random random(5 + static_cast<std::uint64_t>(experts));
      const auto u = support::eventful_logits<T>(random, support::many_rows(1000), experts);
      const auto dg = support::random_matrix<T>(random, support::many_rows(1000), experts);
      const auto found = support::run_sided<T>(rectified{}, u, dg);
      bool same = true;
      for (index n = 0; n < u.rows(); ++n) {
        for (index e = 0; e < experts; ++e) {
          const bool on = u(n, e) > T{0};
          same = same && found.on(n, e) == on && found.r.gates(n, e) == (on ? u(n, e) : T{0}) &&
                 found.dlogits(n, e) == (on ? dg(n, e) : T{0});
        }
      }
      CHECK(same);
    }
  }

  TEST_CASE_TEMPLATE("laws of rectified", T, TALPA_SCALARS) {
    for (const index experts : {1, 2, 8, 33, 65}) {
      CAPTURE(experts);
      support::obeys(testing::selector_laws<T>(rectified{}, experts,
                                               {.shift_invariant = false, .min_selected = 0}));
    }
  }
}

TEST_SUITE("optim/sparsity_controller") {
  TEST_CASE("the coefficient follows the target, and equality divides") {
    statistics_report report;
    report.tokens = 4;
    report.counts = {4, 3, 2, 0};  // 9 of 16: sparsity 7 / 16
    CHECK(sparsity_controller::sparsity(report) == 0.4375);
    sparsity_controller c{.k = 2.0};
    CHECK(c.coefficient == 1e-8);
    c.step(report);  // below 1 / 2
    CHECK(c.coefficient == 1e-8 * 1.2);
    report.counts = {4, 4, 0, 0};
    c.coefficient = 0.5;
    c.step(report);
    CHECK(c.coefficient == 0.5 / 1.2);
    report.counts = {1, 0, 0, 0};
    c.coefficient = 0.5;
    c.step(report);
    CHECK(c.coefficient == 0.5 / 1.2);
    report.tokens = 0;
    c.step(report);
    CHECK(c.coefficient == 0.5 / 1.2);
    CHECK(sparsity_controller::sparsity(report) == 0.0);
  }

  TEST_CASE("what does not fit is refused") {
    statistics_report report;
    report.counts = {0, 0};
    const auto text = [&](sparsity_controller c) -> std::string {
      try {
        c.step(report);
      } catch (const value_error& error) {
        return error.what();
      }
      return {};
    };
    CHECK(text({.k = 3.0}) ==
          "talpa::sparsity_controller: 'k' is 3, expected in (0, experts] = experts a token");
    CHECK(text({.factor = 1.0}) == "talpa::sparsity_controller: 'factor' is 1, expected > 1");
    CHECK(text({.coefficient = 0.0}) ==
          "talpa::sparsity_controller: 'coefficient' is 0, expected > 0");
    CHECK(text({}) == "");
  }
}

}  // namespace talpa::rectified_test
