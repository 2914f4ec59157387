// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/gated_activation.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::gated_activation_test {

using support::difference;
using support::rounding_bound;
using support::table;
using support::to_table;

namespace {

/// silu and its derivative, independently of talpa::math.
double slow_silu(double x) { return x / (1.0 + std::exp(-x)); }
double slow_silu_derivative(double x) {
  const double s = 1.0 / (1.0 + std::exp(-x));
  return s + x * s * (1.0 - s);
}

/// f(a[r, c], b[r, c], c[r, c]) for each element.
template <class F>
table combined(const table& a, const table& b, const table& c, F f) {
  table r = a;
  for (index n = 0; n < r.rows; ++n) {
    for (index d = 0; d < r.cols; ++d) r(n, d) = f(a(n, d), b(n, d), c(n, d));
  }
  return r;
}

}  // namespace

TEST_SUITE("ops/gated_activation") {
  // exp in silu and its derivative is off by 2 roundings, the rest of each by 6 on terms of at most
  // 1 + |a|.
  TEST_CASE_TEMPLATE("gated_activation and its gradient are those of the formula", T,
                     TALPA_SCALARS) {
    support::test_random random(6);
    const matrix<T, cpu> a = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> b = support::random_matrix<T>(random, 700, 70);
    const matrix<T, cpu> dh = support::random_matrix<T>(random, 700, 70);
    const table ta = to_table(a.view()), tb = to_table(b.view()), td = to_table(dh.view());
    const auto bound = [](double x, double y, double z) {
      return rounding_bound<T>(8, (1.0 + std::abs(x)) * (1.0 + std::abs(y)) * (1.0 + std::abs(z)));
    };
    const table bounds = combined(ta, tb, td, bound);
    const table h =
        combined(ta, tb, td, [](double x, double y, double) { return slow_silu(x) * y; });
    const table da = combined(
        ta, tb, td, [](double x, double y, double z) { return z * y * slow_silu_derivative(x); });
    const table db =
        combined(ta, tb, td, [](double x, double, double z) { return z * slow_silu(x); });
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> out(700, 70), out_a(700, 70), out_b(700, 70);
      ops::gated_activation(ctx, silu{}, a, b, out.view());
      ops::gated_activation_backward(ctx, silu{}, a, b, dh, out_a.view(), out_b.view());
      CHECK(out.intact());
      CHECK(out_a.intact());
      CHECK(out_b.intact());
      CHECK(difference(out.view(), h, bounds) == "");
      CHECK(difference(out_a.view(), da, bounds) == "");
      CHECK(difference(out_b.view(), db, bounds) == "");
    }
  }

  TEST_CASE("da may take the place of dh") {
    context<cpu> ctx(1);
    matrix<double, cpu> a(1, 1), b(1, 1), d(1, 1), db(1, 1);
    a(0, 0) = 2.0;
    b(0, 0) = 3.0;
    d(0, 0) = 5.0;
    ops::gated_activation_backward(ctx, relu{}, a, b, d, d.view(), db.view());
    CHECK(d(0, 0) == 15.0);
    CHECK(db(0, 0) == 10.0);
  }

  TEST_CASE("gated_activation names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> a(2, 3), b(2, 4), c(2, 3);
    CHECK_THROWS_WITH_AS(
        ops::gated_activation(ctx, silu{}, a, b, c.view()),
        "talpa::ops::gated_activation: 'b' has shape [2, 4], expected [2, 3] = shape of h",
        shape_error);
    CHECK_THROWS_WITH_AS(ops::gated_activation_backward(ctx, silu{}, a, c, b, c.view(), c.view()),
                         "talpa::ops::gated_activation_backward: 'dh' has shape [2, 4], expected "
                         "[2, 3] = shape of a",
                         shape_error);
  }
}

}  // namespace talpa::gated_activation_test
