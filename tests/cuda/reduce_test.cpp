// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/reduce.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace talpa::cuda_reduce_test {
using support::device;
using support::on_device;
using support::sum_bound;
using support::table;
using support::to_table;

TEST_SUITE("cuda/reduce") {
  TEST_CASE_TEMPLATE("column_sum agrees with sums in double", T, TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(7);
    for (const index rows : {index{0}, index{1}, index{129}, support::device_size(300, 7001)}) {
      CAPTURE(rows);
      on_device<T> x(support::random_matrix<T>(random, rows, 37));
      on_device<T> y(support::random_matrix<T>(random, 1, 37));
      const table sums = support::column_sums(to_table(x.host().view()));
      const table sizes = support::column_sums(support::absolute(to_table(x.host().view())));
      // beta y + the sum: one more product and addition.
      const table start = to_table(y.host().view());
      const table expected =
          support::each(start, sums, [](double held, double sum) { return 2.0 * held + sum; });
      const table bounds = support::each(start, sizes, [&](double held, double size) {
        return sum_bound<T>(rows + 2, 2.0 * std::abs(held) + size);
      });
      ops::column_sum(ctx, x.view(), T{2}, y.view());
      ctx.synchronise();
      CHECK(support::difference(y.now().view(), expected, bounds) == "");
      CHECK(y.intact());
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("column_sum with beta zero ignores NaN, and of no rows leaves beta y") {
    context<device> ctx;
    matrix<double, cpu> one(1, 2), nan(1, 2);
    one(0, 0) = 3.0;
    nan(0, 0) = nan(0, 1) = std::numeric_limits<double>::quiet_NaN();
    on_device<double> x(one), y(nan), none(matrix<double, cpu>(0, 2));
    ops::column_sum(ctx, x.view(), 0.0, y.view());
    ctx.synchronise();
    CHECK(support::bit_difference(y.now(), one) == "");
    ops::column_sum(ctx, none.view(), 0.5, y.view());
    ctx.synchronise();
    CHECK(y.now()(0, 0) == 1.5);
    ops::column_sum(ctx, none.view(), 0.0, y.view());
    ctx.synchronise();
    CHECK(support::bit_difference(y.now(), matrix<double, cpu>(1, 2)) == "");
  }

  TEST_CASE_TEMPLATE("sum_of_squares agrees with a sum in double and is the same again", T,
                     TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(8);
    for (const index rows : {index{0}, index{1}, support::device_size(129, 7001)}) {
      CAPTURE(rows);
      constexpr index cols = 45;
      on_device<T> x(support::random_matrix<T>(random, rows, cols));
      matrix<T, cpu> nan(1, 1);
      nan(0, 0) = std::numeric_limits<T>::quiet_NaN();
      on_device<T> y(nan);
      const double expected =
          support::total(support::each(to_table(x.host().view()), [](double v) { return v * v; }));
      ops::sum_of_squares(ctx, x.view(), T{0}, y.view());
      ctx.synchronise();
      const T first = y.now()(0, 0);
      CHECK(support::within(static_cast<double>(first), expected,
                            sum_bound<T>(rows * cols, expected)));
      ops::sum_of_squares(ctx, x.view(), T{1}, y.view());
      ctx.synchronise();
      CHECK(y.now()(0, 0) == first + first);
      CHECK(y.intact());
      CHECK(ctx.scratch.used() == 0);
    }
  }
}

}  // namespace talpa::cuda_reduce_test
