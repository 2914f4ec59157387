// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/add.hpp>

#include <doctest/doctest.h>

namespace talpa::add_test {
using support::difference;
using support::each;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("ops/add") {
  TEST_CASE_TEMPLATE("add agrees with the double reference for strided views and any threads", T,
                     TALPA_SCALARS) {
    support::test_random random(2);
    const matrix<T, cpu> a = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> b = support::random_matrix<T>(random, 700, 70);
    const table expected =
        each(to_table(a.view()), to_table(b.view()), [](double x, double y) { return x + y; });
    const table bounds = each(expected, [](double s) { return rounding_bound<T>(1, s); });
    support::padded<T> strided(a);
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> c(700, 70);
      ops::add(ctx, strided.view(), b, c.view());
      CHECK(c.intact());
      CHECK(difference(c.view(), expected, bounds) == "");
    }
  }

  TEST_CASE("add may write over an operand") {
    context<cpu> ctx(1);
    matrix<float, cpu> a(1, 2), b(1, 2);
    a(0, 0) = 1.0f;
    b(0, 0) = 2.0f;
    a(0, 1) = 3.0f;
    b(0, 1) = 4.0f;
    ops::add(ctx, a, b, a.view());
    CHECK(a(0, 0) == 3.0f);
    CHECK(a(0, 1) == 7.0f);
    ops::add(ctx, a, a, a.view());
    CHECK(a(0, 1) == 14.0f);
  }

  TEST_CASE_TEMPLATE("axpy adds a multiple of x to y", T, TALPA_SCALARS) {
    support::test_random random(3);
    const matrix<T, cpu> x = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> start = support::random_matrix<T>(random, 700, 70);
    const T alpha = T{0.3f};
    const double factor = static_cast<double>(alpha);
    const table xt = to_table(x.view()), yt = to_table(start.view());
    const table expected = each(xt, yt, [&](double a, double b) { return b + factor * a; });
    const table bounds = each(xt, yt, [&](double a, double b) {
      return rounding_bound<T>(2, std::abs(b) + std::abs(factor * a));
    });
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> y(start);
      ops::axpy(ctx, alpha, x, y.view());
      CHECK(y.intact());
      CHECK(difference(y.view(), expected, bounds) == "");
    }
  }

  TEST_CASE("add and axpy name the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> a(2, 3), b(2, 4), c(2, 3);
    CHECK_THROWS_WITH_AS(ops::add(ctx, a, b, c.view()),
                         "talpa::ops::add: 'b' has shape [2, 4], expected [2, 3] = shape of c",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::add(ctx, b, a, c.view()),
                         "talpa::ops::add: 'a' has shape [2, 4], expected [2, 3] = shape of c",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::axpy(ctx, 1.0f, b, c.view()),
                         "talpa::ops::axpy: 'x' has shape [2, 4], expected [2, 3] = shape of y",
                         shape_error);
  }
}

}  // namespace talpa::add_test
