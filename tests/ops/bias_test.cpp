// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>

#include <doctest/doctest.h>

namespace talpa::bias_test {
using support::table;

TEST_SUITE("ops/bias") {
  TEST_CASE_TEMPLATE("add_bias adds one row to every row, in place too", T, TALPA_SCALARS) {
    support::test_random random(6);
    const matrix<T, cpu> x = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> bias = support::random_matrix<T>(random, 1, 70);
    table expected = support::to_table(x.view());
    for (index n = 0; n < 700; ++n) {
      for (index d = 0; d < 70; ++d) expected(n, d) += static_cast<double>(bias(0, d));
    }
    const table bounds =
        support::each(expected, [](double v) { return support::rounding_bound<T>(1, v); });
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(x);
      ops::add_bias(ctx, y.view(), bias, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), expected, bounds) == "");
      matrix<T, cpu> other(700, 70);
      ops::add_bias(ctx, x, bias, other.view());
      CHECK(support::same_bits(other.view(), y.view()));
    }
  }

  TEST_CASE("add_bias names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), bias(1, 2), tall(2, 3), row(1, 3), y(3, 3);
    CHECK_THROWS_WITH_AS(
        ops::add_bias(ctx, x, bias, x.view()),
        "talpa::ops::add_bias: 'bias' has shape [1, 2], expected [1, 3] = one row, columns of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::add_bias(ctx, x, tall, x.view()),
        "talpa::ops::add_bias: 'bias' has shape [2, 3], expected [1, 3] = one row, columns of x",
        shape_error);
    CHECK_THROWS_WITH_AS(ops::add_bias(ctx, x, row, y.view()),
                         "talpa::ops::add_bias: 'y' has shape [3, 3], expected [2, 3] = shape of x",
                         shape_error);
  }
}

}  // namespace talpa::bias_test
