// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/reduce.hpp>

#include <doctest/doctest.h>

#include <limits>

namespace talpa::reduce_test {
using support::sum_bound;
using support::table;
using support::to_table;

namespace {
// More than two blocks of rows and of columns, neither a multiple of a block.
constexpr index rows = 2 * detail::column_block_rows + 77;
constexpr index cols = detail::column_block_cols + 45;
}  // namespace

TEST_SUITE("ops/reduce") {
  TEST_CASE("column_sum of a small matrix") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(1, 3);
    for (index i = 0; i < 6; ++i) x.data()[i] = static_cast<float>(i + 1);
    ops::column_sum(ctx, x, 0.0f, y.view());
    CHECK(y(0, 0) == 5.0f);
    CHECK(y(0, 1) == 7.0f);
    CHECK(y(0, 2) == 9.0f);
    ops::column_sum(ctx, x, 2.0f, y.view());
    CHECK(y(0, 0) == 15.0f);
    CHECK(y(0, 2) == 27.0f);
  }

  TEST_CASE_TEMPLATE("column_sum has the same bits for any threads and agrees with the reference",
                     T, TALPA_SCALARS) {
    support::test_random random(7);
    const matrix<T, cpu> x = support::random_matrix<T>(random, rows, cols);
    const table expected = support::column_sums(to_table(x.view()));
    const table bounds = support::each(support::column_sums(support::absolute(to_table(x.view()))),
                                       [](double sum) { return sum_bound<T>(rows, sum); });
    support::padded<T> strided(x);
    matrix<T, cpu> first(1, cols);
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(1, cols);
      ops::column_sum(ctx, strided.view(), T{0}, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), expected, bounds) == "");
      if (threads == 1) {
        for (index d = 0; d < cols; ++d) first(0, d) = y.view()(0, d);
      }
      CHECK(support::same_bits(y.view(), first.view()));
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("column_sum with beta zero ignores NaN, and of no rows leaves beta y") {
    context<cpu> ctx(1);
    matrix<double, cpu> x(1, 2), y(1, 2);
    x(0, 0) = 3.0;
    y(0, 0) = std::numeric_limits<double>::quiet_NaN();
    ops::column_sum(ctx, x, 0.0, y.view());
    CHECK(y(0, 0) == 3.0);
    const matrix_view<const double, cpu> nothing(nullptr, 0, 2);
    ops::column_sum(ctx, nothing, 0.5, y.view());
    CHECK(y(0, 0) == 1.5);
    ops::column_sum(ctx, nothing, 0.0, y.view());
    CHECK(y(0, 0) == 0.0);
  }

  TEST_CASE_TEMPLATE(
      "sum_of_squares has the same bits for any threads and agrees with the reference", T,
      TALPA_SCALARS) {
    support::test_random random(8);
    const matrix<T, cpu> x = support::random_matrix<T>(random, rows, cols);
    const double expected =
        support::total(support::each(to_table(x.view()), [](double v) { return v * v; }));
    support::padded<T> strided(x);
    T first{0};
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      matrix<T, cpu> y(1, 1);
      ops::sum_of_squares(ctx, strided.view(), T{0}, y.view());
      CHECK(support::within(static_cast<double>(y(0, 0)), expected,
                            sum_bound<T>(rows * cols, expected)));
      if (threads == 1) first = y(0, 0);
      CHECK(y(0, 0) == first);
      ops::sum_of_squares(ctx, x, T{1}, y.view());
      CHECK(y(0, 0) == first + first);
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("sum_of_squares of nothing is zero") {
    context<cpu> ctx(1);
    matrix<float, cpu> y(1, 1);
    y(0, 0) = std::numeric_limits<float>::quiet_NaN();
    ops::sum_of_squares(ctx, matrix_view<const float, cpu>(), 0.0f, y.view());
    CHECK(y(0, 0) == 0.0f);
  }

  TEST_CASE("reductions name the result that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(1, 2);
    CHECK_THROWS_WITH_AS(
        ops::column_sum(ctx, x, 0.0f, y.view()),
        "talpa::ops::column_sum: 'y' has shape [1, 2], expected [1, 3] = one row, columns of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::sum_of_squares(ctx, x, 0.0f, y.view()),
        "talpa::ops::sum_of_squares: 'y' has shape [1, 2], expected [1, 1] = one number",
        shape_error);
  }
}

}  // namespace talpa::reduce_test
