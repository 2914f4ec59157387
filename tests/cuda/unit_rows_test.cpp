// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/unit_rows.hpp>
#include <talpa/cuda/unit_rows.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::cuda_unit_rows_test {
using support::device;
using support::each;
using support::in_double;
using support::on_device;
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("cuda/unit_rows") {
  TEST_CASE_TEMPLATE("unit_rows and its gradient agree with those in double, also in place", T,
                     TALPA_SCALARS) {
    constexpr double epsilon = 0.5;  // its reciprocal is exact
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(3);
    for (const index rows : {index{0}, index{1}, index{9}, support::device_size(129, 5001)}) {
      const index cols = rows < 10 ? 2 : 70;
      CAPTURE(rows);
      CAPTURE(cols);
      matrix<T, cpu> values = support::random_matrix<T>(random, rows, cols);
      // Every fifth row is shorter than epsilon.
      for (index n = 4; n < rows; n += 5) {
        for (index d = 0; d < cols; ++d) values(n, d) *= T{0x1p-8f};
      }
      on_device<T> x(values), dy(support::random_matrix<T>(random, rows, cols));
      on_device<T> more(support::random_matrix<T>(random, rows, cols));
      on_device<T> inverse(matrix<T, cpu>(rows, 1));
      ops::unit_rows(ctx, x.view(), epsilon, x.view(), inverse.view());
      ops::unit_rows_backward(ctx, x.view(), inverse.view(), epsilon, dy.view(), more.view(),
                              grad_mode::accumulate);
      ops::unit_rows_backward(ctx, x.view(), inverse.view(), epsilon, dy.view(), dy.view(),
                              grad_mode::overwrite);
      ctx.synchronise();

      matrix<double, cpu> y(rows, cols), r(rows, 1), dx(rows, cols);
      ops::unit_rows(host, in_double(values), epsilon, y.view(), r.view());
      // D squares and additions, halved by the root, a root, a reciprocal and a product.
      const auto bound = [&](double v) {
        return rounding_bound<T>(static_cast<double>(cols) + 4.0, v);
      };
      CHECK(support::difference(x.now().view(), to_table(y.view()),
                                each(to_table(y.view()), bound)) == "");
      const matrix<T, cpu> found_y = x.now(), found_r = inverse.now();
      for (index n = 0; n < rows; ++n) {
        CHECK(support::within(static_cast<double>(found_r(n, 0)), r(n, 0), bound(r(n, 0))));
      }
      // From the same y and inverse: a sum of D products, a product, a difference and a product.
      ops::unit_rows_backward(host, in_double(found_y), in_double(found_r), epsilon,
                              in_double(dy.host()), dx.view(), grad_mode::overwrite);
      table size(rows, cols);
      for (index n = 0; n < rows; ++n) {
        double mass = 0.0;
        const auto at = [&](const matrix<T, cpu>& m, index d) {
          return std::abs(static_cast<double>(m(n, d)));
        };
        for (index d = 0; d < cols; ++d) mass += at(found_y, d) * at(dy.host(), d);
        for (index d = 0; d < cols; ++d) {
          size(n, d) =
              static_cast<double>(found_r(n, 0)) * (at(dy.host(), d) + at(found_y, d) * mass);
        }
      }
      CHECK(support::difference(dy.now().view(), to_table(dx.view()), each(size, bound)) == "");
      const table start = to_table(more.host().view());
      CHECK(support::difference(
                more.now().view(),
                each(start, to_table(dx.view()), [](double a, double b) { return a + b; }),
                each(start, size, [&](double a, double b) { return bound(std::abs(a) + b); })) ==
            "");
      CHECK(x.intact());
      CHECK(dy.intact());
      CHECK(more.intact());
      CHECK(inverse.intact());
    }
  }

  TEST_CASE("a short row is divided by epsilon, NaN stays, no columns are legal") {
    context<device> ctx;
    matrix<double, cpu> values(3, 2);
    values(0, 0) = 0.25;
    values(2, 0) = std::numeric_limits<double>::quiet_NaN();
    on_device<double> x(values), y(matrix<double, cpu>(3, 2)), inverse(matrix<double, cpu>(3, 1));
    on_device<double> flat(matrix<double, cpu>(2, 0)), two(matrix<double, cpu>(2, 1));
    ops::unit_rows(ctx, x.view(), 0.5, y.view(), inverse.view());
    ops::unit_rows_backward(ctx, y.view(), inverse.view(), 0.5, x.view(), x.view(),
                            grad_mode::overwrite);
    ops::unit_rows(ctx, flat.view(), 0.5, flat.view(), two.view());
    ctx.synchronise();
    CHECK(y.now()(0, 0) == 0.5);
    CHECK(y.now()(1, 0) == 0.0);
    CHECK(std::isnan(y.now()(2, 1)));
    CHECK(inverse.now()(0, 0) == 2.0);
    CHECK(x.now()(0, 0) == 0.5);  // twice dy, which was 0.25
    CHECK(two.now()(1, 0) == 2.0);
  }
}

}  // namespace talpa::cuda_unit_rows_test
