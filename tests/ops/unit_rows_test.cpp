// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/unit_rows.hpp>
#include <talpa/testing/gradient_check.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::unit_rows_test {

TEST_SUITE("ops/unit_rows") {
  TEST_CASE_TEMPLATE("rows are divided by their length", T, TALPA_SCALARS) {
    support::test_random random(3);
    for (const index cols : {1, 2, 8, 33, 65}) {
      const matrix<T, cpu> x = support::random_matrix<T>(random, 300, cols);
      support::table expected(300, cols), bounds(300, cols);
      for (index n = 0; n < 300; ++n) {
        double square = 0.0;
        for (index d = 0; d < cols; ++d) square += double(x(n, d)) * double(x(n, d));
        for (index d = 0; d < cols; ++d) {
          expected(n, d) = double(x(n, d)) / std::sqrt(square);
          // D squares and additions, halved by the root, a root, a reciprocal and a product.
          bounds(n, d) = support::rounding_bound<T>(double(cols) + 4.0, expected(n, d));
        }
      }
      for (const int threads : {1, 3}) {
        context<cpu> ctx(threads);
        support::padded<T> y(300, cols), inverse(300, 1);
        ops::unit_rows(ctx, x, 1e-12, y.view(), inverse.view());
        CHECK(y.intact());
        CHECK(inverse.intact());
        if (cols > 1) CHECK(support::difference(y.view(), expected, bounds) == "");
      }
    }
  }

  TEST_CASE("a short row is divided by epsilon, NaN stays, no rows and no columns are legal") {
    context<cpu> ctx(1);
    matrix<double, cpu> x(3, 2), y(3, 2), inverse(3, 1);
    x(0, 0) = 0.25;
    x(2, 0) = std::numeric_limits<double>::quiet_NaN();
    ops::unit_rows(ctx, x, 0.5, y.view(), inverse.view());
    CHECK(y(0, 0) == 0.5);
    CHECK(inverse(0, 0) == 2.0);
    CHECK(y(1, 0) == 0.0);
    CHECK(std::isnan(y(2, 1)));
    ops::unit_rows_backward(ctx, y, inverse, 0.5, x, x.view(), grad_mode::overwrite);
    CHECK(x(0, 0) == 0.5);  // twice dy, which was 0.25
    matrix<double, cpu> none(0, 2), no_inverse(0, 1), flat(2, 0), two(2, 1);
    ops::unit_rows(ctx, none, 0.5, none.view(), no_inverse.view());
    ops::unit_rows(ctx, flat, 0.5, flat.view(), two.view());
    CHECK(two(1, 0) == 2.0);
  }

  TEST_CASE("gradients equal differences") {
    support::test_random random(5);
    matrix<double, cpu> x = support::random_matrix<double>(random, 6, 7);
    matrix<double, cpu> y(6, 7), inverse(6, 1), dx(6, 7);
    const auto upstream = testing::cotangent(6, 7, 1);
    context<cpu> ctx(1);
    ops::unit_rows(ctx, x, 1e-12, y.view(), inverse.view());
    ops::unit_rows_backward(ctx, y, inverse, 1e-12, upstream, dx.view(), grad_mode::overwrite);
    const auto found = testing::gradient_check(
        "unit_rows", {{"x", x.view(), dx.view()}}, upstream,
        {.roundings = 2.0 * 7.0 + 4.0, .magnitude = 42.0},
        [&] {
          ops::unit_rows(ctx, x, 1e-12, y.view(), inverse.view());
          return y.view();
        },
        [] { return 0; });
    CHECK_MESSAGE(found.passed(), found.text());
    matrix<double, cpu> more(6, 7);
    for (index i = 0; i < more.size(); ++i) more.data()[i] = 1.0;
    ops::unit_rows(ctx, x, 1e-12, y.view(), inverse.view());
    ops::unit_rows_backward(ctx, y, inverse, 1e-12, upstream, more.view(), grad_mode::accumulate);
    for (index i = 0; i < more.size(); ++i) {
      CHECK(support::within(more.data()[i], 1.0 + dx.data()[i],
                            support::rounding_bound<double>(2, 1.0 + std::abs(dx.data()[i]))));
    }
  }

  TEST_CASE("unit_rows names what does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(3, 2), inverse(2, 1);
    CHECK_THROWS_WITH_AS(ops::unit_rows(ctx, x, 1.0, y.view(), inverse.view()),
                         "talpa::ops::unit_rows: 'y' has shape [3, 2], expected [2, 3] = shape of "
                         "x",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::unit_rows(ctx, x, 1.0, x.view(), y.view()),
                         "talpa::ops::unit_rows: 'inverse' has shape [3, 2], expected [2, 1] = "
                         "rows of x, one number each",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::unit_rows(ctx, x, 0.0, x.view(), inverse.view()),
                         "talpa::ops::unit_rows: 'epsilon' is 0, expected > 0", value_error);
    CHECK_THROWS_AS(
        ops::unit_rows_backward(ctx, x, inverse, 1.0, y, x.view(), grad_mode::overwrite),
        shape_error);
  }
}

}  // namespace talpa::unit_rows_test
