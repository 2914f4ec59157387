// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/exp_scale.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::exp_scale_test {

TEST_SUITE("ops/exp_scale") {
  TEST_CASE_TEMPLATE("values and gradients equal plain loops for any number of threads", T,
                     TALPA_SCALARS) {
    support::test_random random(3);
    const index rows = 700, cols = 37;
    const auto x = support::random_matrix<T>(random, rows, cols);
    const auto dy = support::random_matrix<T>(random, rows, cols);
    matrix<T, cpu> s(1, 1);
    s(0, 0) = T{0.75};
    const double factor = std::exp(0.75);
    double sum = 0.0, size = 0.0;
    support::table expected(rows, cols), dexpected(rows, cols);
    for (index n = 0; n < rows; ++n) {
      for (index d = 0; d < cols; ++d) {
        expected(n, d) = factor * double(x(n, d));
        dexpected(n, d) = factor * double(dy(n, d));
        sum += double(x(n, d)) * double(dy(n, d));
        size += std::abs(double(x(n, d)) * double(dy(n, d)));
      }
    }
    // The exponential, within 4 ulps, and a product.
    const auto bound = [](double v) { return support::rounding_bound<T>(10, v); };
    T first{};
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(rows, cols), dx(rows, cols);
      matrix<T, cpu> ds(1, 1);
      ops::exp_scale(ctx, s, x, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), expected, support::each(expected, bound)) == "");
      ops::exp_scale_backward(ctx, s, x, dy, dx.view(), grad_mode::overwrite, ds.view());
      CHECK(dx.intact());
      CHECK(support::difference(dx.view(), dexpected, support::each(dexpected, bound)) == "");
      CHECK(support::within(double(ds(0, 0)), factor * sum,
                            support::sum_bound<T>(rows * cols + 10, factor * size)));
      if (threads == 1) first = ds(0, 0);
      CHECK(ds(0, 0) == first);
      ops::exp_scale_backward(ctx, s, x, dy, matrix_view<T, cpu>(), grad_mode::ignore, {});
    }
  }

  TEST_CASE("exp_scale names what does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> s(1, 1), x(2, 3), y(3, 2);
    CHECK_THROWS_WITH_AS(
        ops::exp_scale(ctx, x, x, x.view()),
        "talpa::ops::exp_scale: 's' has shape [2, 3], expected [1, 1] = one number", shape_error);
    CHECK_THROWS_WITH_AS(
        ops::exp_scale(ctx, s, x, y.view()),
        "talpa::ops::exp_scale: 'y' has shape [3, 2], expected [2, 3] = shape of x", shape_error);
    CHECK_THROWS_AS(ops::exp_scale_backward(ctx, s, x, y, x.view(), grad_mode::overwrite, s.view()),
                    shape_error);
  }
}

}  // namespace talpa::exp_scale_test
