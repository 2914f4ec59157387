// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/mse.hpp>

#include <doctest/doctest.h>

namespace talpa::mse_test {
using support::each;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("ops/mse") {
  TEST_CASE_TEMPLATE("mse and its gradient agree with the reference for any threads", T,
                     TALPA_SCALARS) {
    support::test_random random(12);
    constexpr index rows = 700, cols = 70;
    const matrix<T, cpu> y = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> target = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> start = support::random_matrix<T>(random, rows, cols);
    matrix<T, cpu> dvalue(1, 1);
    dvalue(0, 0) = T{-3};
    const support::scalar_and_gradient expected =
        support::mean_squared_error(to_table(y.view()), to_table(target.view()));
    const table gradient = each(expected.gradient, [](double g) { return -3.0 * g; });
    const table bounds = each(gradient, [](double g) { return rounding_bound<T>(5, g); });
    const table added =
        each(gradient, to_table(start.view()), [](double a, double b) { return a + b; });
    const table added_bounds =
        each(bounds, added, [](double b, double v) { return b + rounding_bound<T>(1, v); });
    T first{0};
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      matrix<T, cpu> value(1, 1);
      support::padded<T> strided(y), dy(rows, cols), more(start);
      ops::mse(ctx, strided.view(), target, value.view());
      // Squares of differences, 3 roundings each, in a sum of positive terms and a division.
      CHECK(support::within(
          static_cast<double>(value(0, 0)), expected.value,
          rounding_bound<T>(static_cast<double>(rows * cols) + 4.0, expected.value)));
      if (threads == 1) first = value(0, 0);
      CHECK(value(0, 0) == first);
      ops::mse_backward(ctx, y, target, dvalue, dy.view(), grad_mode::overwrite);
      CHECK(dy.intact());
      CHECK(support::difference(dy.view(), gradient, bounds) == "");
      ops::mse_backward(ctx, y, target, dvalue, more.view(), grad_mode::accumulate);
      CHECK(more.intact());
      CHECK(support::difference(more.view(), added, added_bounds) == "");
      ops::mse_backward(ctx, y, target, dvalue, matrix_view<T, cpu>(), grad_mode::ignore);
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("mse of nothing is zero") {
    context<cpu> ctx(1);
    matrix<float, cpu> value(1, 1);
    value(0, 0) = 7.0f;
    ops::mse(ctx, matrix_view<const float, cpu>(nullptr, 0, 3),
             matrix_view<const float, cpu>(nullptr, 0, 3), value.view());
    CHECK(value(0, 0) == 0.0f);
    ops::mse_backward(ctx, matrix_view<const float, cpu>(nullptr, 0, 3),
                      matrix_view<const float, cpu>(nullptr, 0, 3), value,
                      matrix_view<float, cpu>(nullptr, 0, 3), grad_mode::overwrite);
  }

  TEST_CASE("mse names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> y(2, 3), target(3, 2), value(1, 1);
    CHECK_THROWS_WITH_AS(ops::mse(ctx, y, target, value.view()),
                         "talpa::ops::mse: 'target' has shape [3, 2], expected [2, 3] = shape of y",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::mse(ctx, y, y, target.view()),
                         "talpa::ops::mse: 'value' has shape [3, 2], expected [1, 1] = one number",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::mse_backward(ctx, y, target, value, y.view(), grad_mode::overwrite),
        "talpa::ops::mse_backward: 'target' has shape [3, 2], expected [2, 3] = shape of y",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::mse_backward(ctx, y, y, target, y.view(), grad_mode::overwrite),
        "talpa::ops::mse_backward: 'dvalue' has shape [3, 2], expected [1, 1] = one number",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::mse_backward(ctx, y, y, value, target.view(), grad_mode::overwrite),
        "talpa::ops::mse_backward: 'dy' has shape [3, 2], expected [2, 3] = shape of y",
        shape_error);
  }
}

}  // namespace talpa::mse_test
