// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/softmax.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::softmax_test {
using support::each;
using support::gamma_bound;
using support::table;
using support::to_table;

namespace {

// exp(x - max) has the error of the difference, |x - max| u in absolute terms, that of exp, 2 u,
// and the quotient those of the sum of D terms and of the division.
template <class T>
double probability_bound(const table& x) {
  return gamma_bound<T>(2.0 * (2.0 * support::largest(x) + 2.0) + static_cast<double>(x.cols) +
                        1.0);
}

}  // namespace

TEST_SUITE("ops/softmax") {
  TEST_CASE("softmax of logarithms is the normalised numbers") {
    context<cpu> ctx(1);
    matrix<double, cpu> x(1, 3);
    x(0, 0) = std::log(1.0);
    x(0, 1) = std::log(2.0);
    x(0, 2) = std::log(5.0);
    matrix<double, cpu> y(1, 3);
    ops::softmax(ctx, x, y.view());
    const double bound = probability_bound<double>(to_table(x.view()));
    CHECK(support::difference(y.view(), table(1, 3, {0.125, 0.25, 0.625}), bound) == "");
  }

  TEST_CASE_TEMPLATE("softmax and its gradient agree with the reference for any threads", T,
                     TALPA_SCALARS) {
    support::test_random random(10);
    for (const index cols : {index{1}, index{5}, index{16}, index{70}}) {
      CAPTURE(cols);
      const matrix<T, cpu> x = support::random_matrix<T>(random, 700, cols, 3.0);
      const matrix<T, cpu> dy = support::random_matrix<T>(random, 700, cols);
      const matrix<T, cpu> start = support::random_matrix<T>(random, 700, cols);
      const table expected = support::softmax(to_table(x.view()));
      const double relative = probability_bound<T>(to_table(x.view()));
      const table bounds = each(expected, [&](double p) { return relative * p; });
      matrix<T, cpu> first(700, cols), first_dx(700, cols);
      for (const int threads : {1, 2, 3}) {
        context<cpu> ctx(threads);
        support::padded<T> y(x), dx(700, cols), more(start);
        ops::softmax(ctx, y.view(), y.view());
        CHECK(y.intact());
        if (cols > 1) CHECK(support::difference(y.view(), expected, bounds) == "");
        if (cols == 1) CHECK(y.view()(699, 0) == T{1});

        // The gradient from the computed y, so that only its own roundings count: those of a sum of
        // D products, of the difference, and of the product with y.
        const table yt = to_table(y.view()), dyt = to_table(dy.view());
        const table gradient = support::softmax_gradient(yt, dyt);
        table gradient_bounds(700, cols);
        for (index n = 0; n < 700; ++n) {
          double mass = 0.0;
          for (index d = 0; d < cols; ++d) mass += yt(n, d) * std::abs(dyt(n, d));
          for (index d = 0; d < cols; ++d) {
            gradient_bounds(n, d) =
                yt(n, d) * (support::sum_bound<T>(cols, mass) +
                            support::rounding_bound<T>(2, std::abs(dyt(n, d)) + mass));
          }
        }
        ops::softmax_backward(ctx, y.view(), dy, dx.view(), grad_mode::overwrite);
        CHECK(dx.intact());
        if (cols > 1) CHECK(support::difference(dx.view(), gradient, gradient_bounds) == "");
        if (cols == 1) CHECK(dx.view()(699, 0) == T{0});
        ops::softmax_backward(ctx, y.view(), dy, more.view(), grad_mode::accumulate);
        CHECK(more.intact());
        const auto sum = [](double a, double b) { return a + b; };
        const table added = each(gradient, to_table(start.view()), sum);
        CHECK(support::difference(
                  more.view(), added,
                  each(gradient_bounds,
                       each(added, [](double v) { return support::rounding_bound<T>(1, v); }),
                       sum)) == "");
        ops::softmax_backward(ctx, y.view(), dy, matrix_view<T, cpu>(), grad_mode::ignore);
        if (threads == 1) {
          for (index n = 0; n < 700; ++n) {
            for (index d = 0; d < cols; ++d) {
              first(n, d) = y.view()(n, d);
              first_dx(n, d) = dx.view()(n, d);
            }
          }
        }
        CHECK(support::same_bits(y.view(), first.view()));
        CHECK(support::same_bits(dx.view(), first_dx.view()));
      }
    }
  }

  TEST_CASE_TEMPLATE("softmax of huge, masked and broken rows", T, TALPA_SCALARS) {
    context<cpu> ctx(1);
    const T inf = std::numeric_limits<T>::infinity();
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const T huge = std::numeric_limits<T>::max();
    // Longer than the lanes of a sum, so that each case meets the tail as well.
    constexpr index cols = 19;
    matrix<T, cpu> x(6, cols), y(6, cols);
    for (index d = 0; d < cols; ++d) {
      x(0, d) = -huge;
      x(1, d) = -inf;
      x(3, d) = -inf;
    }
    x(0, 3) = huge;
    x(1, 17) = T{2};
    x(2, 18) = nan;
    x(4, 18) = inf;
    x(5, 0) = nan;
    ops::softmax(ctx, x, y.view());
    CHECK(y(0, 3) == T{1});
    CHECK(y(0, 0) == T{0});
    CHECK(y(1, 17) == T{1});
    CHECK(y(1, 18) == T{0});
    for (index d = 0; d < cols; ++d) {
      CHECK(std::isnan(y(2, d)));
      CHECK(std::isnan(y(3, d)));
      CHECK(std::isnan(y(4, d)));
      CHECK(std::isnan(y(5, d)));
    }
    ops::softmax(ctx, matrix_view<const T, cpu>(), matrix_view<T, cpu>());
  }

  TEST_CASE("softmax names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(3, 2);
    CHECK_THROWS_WITH_AS(ops::softmax(ctx, x, y.view()),
                         "talpa::ops::softmax: 'y' has shape [3, 2], expected [2, 3] = shape of x",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::softmax_backward(ctx, x, y, x.view(), grad_mode::overwrite),
        "talpa::ops::softmax_backward: 'dy' has shape [3, 2], expected [2, 3] = shape of y",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::softmax_backward(ctx, x, x, y.view(), grad_mode::overwrite),
        "talpa::ops::softmax_backward: 'dx' has shape [3, 2], expected [2, 3] = shape of y",
        shape_error);
  }
}

}  // namespace talpa::softmax_test
