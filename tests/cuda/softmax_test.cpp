// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/softmax.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::cuda_softmax_test {
using support::device;
using support::each;
using support::on_device;
using support::table;
using support::to_table;

namespace {

// exp(x - max) has the error of the difference, |x - max| u in absolute terms, that of exp, 2 u,
// and the quotient those of the sum of D terms and of the division.
template <class T>
table probability_bounds(const table& x) {
  const double relative = support::gamma_bound<T>(2.0 * (2.0 * support::largest(x) + 2.0) +
                                                  static_cast<double>(x.cols) + 1.0);
  return each(support::softmax(x), [&](double p) { return relative * p; });
}

// Of the gradient from given y: a sum of D products, a difference, and the product with y.
template <class T>
table gradient_bounds(const table& y, const table& dy) {
  table bounds(y.rows, y.cols);
  for (index n = 0; n < y.rows; ++n) {
    double mass = 0.0;
    for (index d = 0; d < y.cols; ++d) mass += y(n, d) * std::abs(dy(n, d));
    for (index d = 0; d < y.cols; ++d) {
      bounds(n, d) = y(n, d) * (support::sum_bound<T>(y.cols, mass) +
                                support::rounding_bound<T>(2, std::abs(dy(n, d)) + mass));
    }
  }
  return bounds;
}

}  // namespace

TEST_SUITE("cuda/softmax") {
  TEST_CASE_TEMPLATE("softmax and its gradient agree with the reference, also in place", T,
                     TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(10);
    for (const index rows : {index{0}, index{1}, index{9}, support::device_size(129, 5001)}) {
      const index cols = rows < 10 ? 5 : 70;
      CAPTURE(rows);
      CAPTURE(cols);
      on_device<T> x(support::random_matrix<T>(random, rows, cols, 3.0));
      on_device<T> dy(support::random_matrix<T>(random, rows, cols));
      on_device<T> dx(support::random_matrix<T>(random, rows, cols));
      const table xt = to_table(x.host().view()), dyt = to_table(dy.host().view());
      ops::softmax(ctx, x.view(), x.view());
      ops::softmax_backward(ctx, x.view(), dy.view(), dx.view(), grad_mode::accumulate);
      ops::softmax_backward(ctx, x.view(), dy.view(), dy.view(), grad_mode::overwrite);
      ctx.synchronise();
      const matrix<T, cpu> y = x.now();
      CHECK(support::difference(y.view(), support::softmax(xt), probability_bounds<T>(xt)) == "");
      const table yt = to_table(y.view());
      const table gradient = support::softmax_gradient(yt, dyt);
      const table bounds = gradient_bounds<T>(yt, dyt);
      CHECK(support::difference(dy.now().view(), gradient, bounds) == "");
      const table added =
          each(gradient, to_table(dx.host().view()), [](double a, double b) { return a + b; });
      CHECK(support::difference(dx.now().view(), added, each(bounds, added, [](double b, double v) {
                                  return b + support::rounding_bound<T>(1, v);
                                })) == "");
      CHECK(x.intact());
      CHECK(dx.intact());
      CHECK(dy.intact());
    }
  }

  TEST_CASE("softmax of rows of -inf, NaN and +inf is NaN; -inf among numbers gives 0") {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    constexpr index cols = 33;
    context<device> ctx;
    matrix<double, cpu> values(5, cols);
    for (index d = 0; d < cols; ++d) {
      values(0, d) = -infinity;
      values(1, d) = values(2, d) = values(3, d) = static_cast<double>(d);
      values(4, d) = 1e300;
    }
    values(1, 32) = std::numeric_limits<double>::quiet_NaN();
    values(2, 7) = infinity;
    values(3, 32) = -infinity;
    on_device<double> x(values), y(matrix<double, cpu>(5, cols));
    ops::softmax(ctx, x.view(), y.view());
    ctx.synchronise();
    const matrix<double, cpu> found = y.now();
    for (index n = 0; n < 3; ++n) {
      for (index d = 0; d < cols; ++d) CHECK(std::isnan(found(n, d)));
    }
    CHECK(found(3, 32) == 0.0);
    CHECK(found(3, 31) > 0.5);
    // exp(0) / 33, where the sum is exact.
    for (index d = 0; d < cols; ++d) CHECK(found(4, d) == 1.0 / 33.0);
  }
}

}  // namespace talpa::cuda_softmax_test
