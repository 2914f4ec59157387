// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/mse.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_mse_test {
using support::device;
using support::each;
using support::on_device;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("cuda/mse") {
  TEST_CASE_TEMPLATE("mse and its gradient agree with the reference, also in place", T,
                     TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(12);
    for (const index rows : {index{0}, index{1}, support::device_size(129, 5001)}) {
      constexpr index cols = 70;
      CAPTURE(rows);
      on_device<T> y(support::random_matrix<T>(random, rows, cols));
      on_device<T> target(support::random_matrix<T>(random, rows, cols));
      on_device<T> more(support::random_matrix<T>(random, rows, cols));
      on_device<T> value(support::random_matrix<T>(random, 1, 1));
      matrix<T, cpu> slope(1, 1);
      slope(0, 0) = T{-3};
      on_device<T> dvalue(slope);
      const support::scalar_and_gradient expected =
          support::mean_squared_error(to_table(y.host().view()), to_table(target.host().view()));
      ops::mse(ctx, y.view(), target.view(), value.view());
      ops::mse_backward(ctx, y.view(), target.view(), dvalue.view(), more.view(),
                        grad_mode::accumulate);
      ops::mse_backward(ctx, y.view(), target.view(), dvalue.view(), y.view(),
                        grad_mode::overwrite);
      ctx.synchronise();
      // Squares of differences, 3 roundings each, in a sum of positive terms and a division.
      CHECK(support::within(
          static_cast<double>(value.now()(0, 0)), expected.value,
          rounding_bound<T>(static_cast<double>(rows * cols) + 4.0, expected.value)));
      const table gradient = each(expected.gradient, [](double g) { return -3.0 * g; });
      const table bounds = each(gradient, [](double g) { return rounding_bound<T>(5, g); });
      const table added =
          each(gradient, to_table(more.host().view()), [](double a, double b) { return a + b; });
      const table added_bounds =
          each(bounds, added, [](double b, double v) { return b + rounding_bound<T>(1, v); });
      CHECK(support::difference(y.now().view(), gradient, bounds) == "");
      CHECK(support::difference(more.now().view(), added, added_bounds) == "");
      CHECK(y.intact());
      CHECK(more.intact());
      CHECK(value.intact());
      CHECK(ctx.scratch.used() == 0);
    }
  }
}

}  // namespace talpa::cuda_mse_test
