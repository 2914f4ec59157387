// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/mul.hpp>

#include <doctest/doctest.h>

namespace talpa::mul_test {
using support::difference;
using support::each;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("ops/mul") {
  TEST_CASE_TEMPLATE("mul overwrites or accumulates the elementwise product", T, TALPA_SCALARS) {
    support::test_random random(5);
    const matrix<T, cpu> a = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> b = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> start = support::random_matrix<T>(random, 700, 70);
    const table product =
        each(to_table(a.view()), to_table(b.view()), [](double x, double y) { return x * y; });
    const table sum =
        each(product, to_table(start.view()), [](double p, double s) { return p + s; });
    const table sum_bounds = each(product, to_table(start.view()), [](double p, double s) {
      return rounding_bound<T>(2, std::abs(p) + std::abs(s));
    });
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> c(700, 70);
      ops::mul(ctx, a, b, c.view());
      CHECK(c.intact());
      CHECK(difference(c.view(), product,
                       each(product, [](double p) { return rounding_bound<T>(1, p); })) == "");
      support::padded<T> added(start);
      ops::mul(ctx, a, b, added.view(), grad_mode::accumulate);
      CHECK(added.intact());
      CHECK(difference(added.view(), sum, sum_bounds) == "");
    }
  }

  TEST_CASE("mul ignores when told to and may write over an operand") {
    context<cpu> ctx(1);
    matrix<double, cpu> a(1, 1), b(1, 1);
    a(0, 0) = 3.0;
    b(0, 0) = 4.0;
    ops::mul(ctx, a, b, matrix_view<double, cpu>(), grad_mode::ignore);
    ops::mul(ctx, a, b, a.view());
    CHECK(a(0, 0) == 12.0);
  }

  TEST_CASE("mul names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> a(2, 3), b(2, 4), c(2, 3);
    CHECK_THROWS_WITH_AS(ops::mul(ctx, a, b, c.view()),
                         "talpa::ops::mul: 'b' has shape [2, 4], expected [2, 3] = shape of c",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::mul(ctx, b, a, c.view()),
                         "talpa::ops::mul: 'a' has shape [2, 4], expected [2, 3] = shape of c",
                         shape_error);
  }
}

}  // namespace talpa::mul_test
