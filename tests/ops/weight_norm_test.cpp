// SPDX-License-Identifier: Apache-2.0
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/weight_norm.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::weight_norm_test {

TEST_SUITE("ops/weight_norm") {
  TEST_CASE_TEMPLATE("lengths, ratios and shifts of rows", T, TALPA_SCALARS) {
    support::test_random random(3);
    constexpr index rows = 300;
    for (const index cols : {1, 5, 65}) {
      const matrix<T, cpu> v = support::random_matrix<T>(random, rows, cols);
      const matrix<T, cpu> m = support::random_matrix<T>(random, 1, rows);
      for (const int threads : {1, 3}) {
        context<cpu> ctx(threads);
        matrix<T, cpu> norm(1, rows), ratio(1, rows), shift(1, rows);
        ops::weight_norm(ctx, v, m, norm.view(), ratio.view(), shift.view());
        // Squares and sums, halved by the root, the root, a difference and a quotient.
        const double relative = testing::gamma<T>(static_cast<double>(cols) + 4.0);
        for (index o = 0; o < rows; ++o) {
          double square = 0.0;
          for (index d = 0; d < cols; ++d) square += double(v(o, d)) * double(v(o, d));
          const double length = std::sqrt(square), c = double(m(0, o)) / length;
          CHECK(std::abs(double(norm(0, o)) - length) <= relative * length);
          CHECK(std::abs(double(ratio(0, o)) - c) <= relative * std::abs(c));
          CHECK(std::abs(double(shift(0, o)) - (c - 1.0)) <= relative * (std::abs(c) + 1.0));
        }
        // Magnitudes that are the lengths change nothing, exactly.
        matrix<T, cpu> same(1, rows);
        ops::weight_norm(ctx, v, norm, same.view(), ratio.view(), shift.view());
        CHECK(testing::largest(shift.view()) == 0.0);
        for (index o = 0; o < rows; ++o) CHECK(ratio(0, o) == T{1});
      }
    }
  }

  TEST_CASE("a row of zeros keeps ratio 1 and gets no gradient, NaN stays") {
    context<cpu> ctx(1);
    matrix<double, cpu> v(2, 2), m(1, 2), norm(1, 2), ratio(1, 2), shift(1, 2), dm(1, 2), up(1, 2);
    m(0, 0) = 3.0;
    v(1, 0) = std::numeric_limits<double>::quiet_NaN();
    ops::weight_norm(ctx, v, m, norm.view(), ratio.view(), shift.view());
    CHECK(ratio(0, 0) == 1.0);
    CHECK(shift(0, 0) == 0.0);
    CHECK(std::isnan(ratio(0, 1)));
    up(0, 0) = 1.0;
    ops::weight_norm_backward(ctx, v, norm, ratio, up, dm.view(), v.view());
    CHECK(dm(0, 0) == 0.0);
    CHECK(v(0, 0) == 0.0);
  }

  TEST_CASE("gradients equal differences, and dm is added to") {
    support::test_random random(5);
    matrix<double, cpu> v = support::random_matrix<double>(random, 6, 7);
    matrix<double, cpu> m = support::random_matrix<double>(random, 1, 6);
    matrix<double, cpu> norm(1, 6), ratio(1, 6), shift(1, 6), dm(1, 6), dv(6, 7);
    const auto upstream = testing::cotangent(1, 6, 1);
    context<cpu> ctx(1);
    ops::weight_norm(ctx, v, m, norm.view(), ratio.view(), shift.view());
    ops::weight_norm_backward(ctx, v, norm, ratio, upstream, dm.view(), dv.view());
    const auto found = testing::gradient_check(
        "weight_norm", {{"v", v.view(), dv.view()}, {"m", m.view(), dm.view()}}, upstream,
        {.roundings = 2.0 * 7.0 + 4.0, .magnitude = 42.0},
        [&] {
          ops::weight_norm(ctx, v, m, norm.view(), ratio.view(), shift.view());
          return ratio.view();
        },
        [] { return 0; });
    CHECK_MESSAGE(found.passed(), found.text());
    const matrix<double, cpu> once = dm;
    ops::weight_norm_backward(ctx, v, norm, ratio, upstream, dm.view(), {});
    for (index o = 0; o < 6; ++o) CHECK(dm(0, o) == 2.0 * once(0, o));
  }

  TEST_CASE("weight_norm names what does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> v(2, 3), row(1, 2), other(1, 3);
    CHECK_THROWS_WITH_AS(
        ops::weight_norm(ctx, v, other, row.view(), row.view(), row.view()),
        "talpa::ops::weight_norm: 'm' has shape [1, 3], expected [1, 2] = one number a row of v",
        shape_error);
    CHECK_THROWS_AS(ops::weight_norm_backward(ctx, v, row, row, row, row.view(), other.view()),
                    shape_error);
  }
}

}  // namespace talpa::weight_norm_test
