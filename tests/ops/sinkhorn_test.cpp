// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/sinkhorn.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace talpa::sinkhorn_test {

namespace {

template <class T>
struct scales {
  vector<T, cpu> row;
  matrix<T, cpu> column;
};

template <class T>
scales<T> scale(const matrix<T, cpu>& u, const vector<std::uint8_t, cpu>& real, double tolerance,
                index iterations, int threads = 1) {
  context<cpu> ctx(threads);
  scales<T> s{vector<T, cpu>(u.rows()), matrix<T, cpu>(1, u.cols())};
  ops::sinkhorn(ctx, u.view(), real.view(), tolerance, iterations, s.row.view(), s.column.view());
  return s;
}

/// Scales of the columns after so many iterations, with plain exponentials.
std::vector<double> slow_columns(const std::vector<std::vector<double>>& u, index iterations) {
  const std::size_t tokens = u.size(), experts = u[0].size();
  std::vector<double> d0(tokens, 1.0), d1(experts, 1.0);
  for (index i = 0; i < iterations; ++i) {
    for (std::size_t n = 0; n < tokens; ++n) {
      double sum = 0.0;
      for (std::size_t e = 0; e < experts; ++e) sum += d1[e] * std::exp(u[n][e]);
      d0[n] = 1.0 / static_cast<double>(tokens) / sum;
    }
    for (std::size_t e = 0; e < experts; ++e) {
      double sum = 0.0;
      for (std::size_t n = 0; n < tokens; ++n) sum += d0[n] * std::exp(u[n][e]);
      d1[e] = 1.0 / static_cast<double>(experts) / sum;
    }
  }
  return d1;
}

}  // namespace

TEST_SUITE("ops/sinkhorn") {
  // exp(u) = (1, 1), (1, 3). Rows: r = 1/4, 1/8. Columns: 1/4 + 1/8 = 3/8 and 1/4 + 3/8 = 5/8,
  // so c = 4/3 and 4/5.
  TEST_CASE_TEMPLATE("one iteration by hand", T, TALPA_SCALARS) {
    matrix<T, cpu> u(2, 2);
    u(1, 1) = static_cast<T>(std::log(3.0));
    const auto s = scale(u, {}, 0.0, 1);
    // A handful of sums, exponentials and logarithms of numbers below 3.
    const double bound = support::rounding_bound<T>(16.0, 3.0);
    CHECK(support::within(static_cast<double>(s.row[0]), std::log(0.25), bound));
    CHECK(support::within(static_cast<double>(s.row[1]), std::log(0.125), bound));
    CHECK(support::within(static_cast<double>(s.column(0, 0)), std::log(4.0 / 3.0), bound));
    CHECK(support::within(static_cast<double>(s.column(0, 1)), std::log(0.8), bound));
    // The scales change by 1/3 and 1/5, 4/15 in the mean: a tolerance on either side.
    CHECK(testing::first_difference(scale(u, {}, 0.27, 50).column, s.column) == "");
    CHECK(testing::first_difference(scale(u, {}, 0.26, 50).column, s.column) != "");
    CHECK(testing::first_difference(scale(u, {}, 0.0, 0).column, matrix<T, cpu>(1, 2)) == "");
  }

  TEST_CASE_TEMPLATE("sinkhorn agrees with plain exponentials, and the plan has its sums", T,
                     TALPA_SCALARS) {
    support::test_random random(4);
    for (const index experts : {1, 2, 7, 33}) {
      for (const index tokens : {1, 5, 256, 700}) {
        CAPTURE(experts);
        CAPTURE(tokens);
        matrix<T, cpu> u = support::random_matrix<T>(random, tokens, experts, 2.0);
        vector<std::uint8_t, cpu> real(tokens);
        std::vector<std::vector<double>> kept;
        for (index n = 0; n < tokens; ++n) {
          real[n] = n == 0 || random.below(6) != 0 ? 1 : 0;
          // A token that cannot be routed is left out like padding.
          if (n % 9 == 4) u(n, n % experts) = std::numeric_limits<T>::infinity();
          if (real[n] == 0 || n % 9 == 4) continue;
          kept.emplace_back();
          for (index e = 0; e < experts; ++e) kept.back().push_back(static_cast<double>(u(n, e)));
        }
        const index iterations = 6;
        const auto s = scale(u, real, 0.0, iterations);
        const std::vector<double> expected = slow_columns(kept, iterations);
        // log-sum-exp passes errors on without growth, so those of the steps add up: in each, two
        // sums of E and N terms, and exponents below 2 * 8 + |c| + log N < 32 in size.
        const double bound = support::rounding_bound<T>(
            static_cast<double>(iterations * (experts + tokens + 2 * 32 + 16)), 1.0);
        for (index e = 0; e < experts; ++e) {
          CHECK(support::within(static_cast<double>(s.column(0, e)),
                                std::log(expected[static_cast<std::size_t>(e)]), bound));
          double sum = 0.0;
          for (index n = 0; n < tokens; ++n) {
            if (real[n] == 0 || n % 9 == 4) continue;
            sum += std::exp(static_cast<double>(u(n, e)) + static_cast<double>(s.row[n]) +
                            static_cast<double>(s.column(0, e)));
          }
          CHECK(support::within(sum * static_cast<double>(experts), 1.0, bound));
        }
        for (const int threads : {2, 3}) {
          const auto again = scale(u, real, 0.0, iterations, threads);
          CHECK(testing::first_difference(again.column, s.column) == "");
          CHECK(std::equal(again.row.data(), again.row.data() + tokens, s.row.data()));
        }
      }
    }
  }

  TEST_CASE("large logits, experts that nobody may use, and no tokens") {
    matrix<float, cpu> u(3, 3);
    for (index n = 0; n < 3; ++n) u(n, 2) = -std::numeric_limits<float>::infinity();
    u(0, 0) = 1000.0f;
    u(1, 1) = 3e38f;
    u(2, 0) = -3e38f;
    const auto s = scale(u, {}, 1e-4, 200);
    for (index e = 0; e < 3; ++e) CHECK(std::isfinite(s.column(0, e)));
    for (index n = 0; n < 3; ++n) CHECK(std::isfinite(s.row[n]));
    CHECK(s.column(0, 2) == 0.0f);
    CHECK(scale(matrix<float, cpu>(0, 3), {}, 0.0, 5).column(0, 1) == 0.0f);
    // Nobody takes part.
    for (index n = 0; n < 3; ++n) u(n, 1) = std::numeric_limits<float>::quiet_NaN();
    CHECK(scale(u, {}, 0.0, 5).column(0, 1) == 0.0f);
  }

  TEST_CASE("shapes and numbers that do not fit are refused") {
    context<cpu> ctx(1);
    const matrix<float, cpu> u(4, 3);
    vector<float, cpu> row(4), wrong_row(3);
    matrix<float, cpu> column(1, 3), wrong(1, 2);
    vector<std::uint8_t, cpu> real(5);
    const auto run = [&](vector<float, cpu>& r, matrix<float, cpu>& c, double tolerance,
                         index iterations, vector_view<const std::uint8_t, cpu> padding = {}) {
      ops::sinkhorn(ctx, u.view(), padding, tolerance, iterations, r.view(), c.view());
    };
    CHECK_THROWS_WITH_AS(run(wrong_row, column, 0.0, 1),
                         "talpa::ops::sinkhorn: 'row' has shape [3], expected [4] = tokens",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        run(row, wrong, 0.0, 1),
        "talpa::ops::sinkhorn: 'column' has shape [1, 2], expected [1, 3] = one number an expert",
        shape_error);
    CHECK_THROWS_WITH_AS(
        run(row, column, 0.0, 1, real.view()),
        "talpa::ops::sinkhorn: 'padding_mask' has shape [5], expected [4] = one flag a token",
        shape_error);
    CHECK_THROWS_WITH_AS(run(row, column, -1.0, 1),
                         "talpa::ops::sinkhorn: 'tolerance' is -1, expected >= 0 and finite = "
                         "change of a scale to stop at",
                         value_error);
    CHECK_THROWS_WITH_AS(
        run(row, column, 0.0, -1),
        "talpa::ops::sinkhorn: 'iterations' is -1, expected >= 0 = times to scale at most",
        value_error);
  }
}

}  // namespace talpa::sinkhorn_test
