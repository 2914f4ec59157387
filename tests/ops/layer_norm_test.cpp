// SPDX-License-Identifier: Apache-2.0
#include "support/layer_norm_bounds.hpp"
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/layer_norm.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::layer_norm_test {
using support::each;
using support::gamma_bound;
using support::rounding_bound;
using support::sum_bound;
using support::table;
using support::to_table;

namespace {

using support::layer_norm_bounds::bounds_of;
using support::layer_norm_bounds::epsilon;
using support::layer_norm_bounds::norm_bounds;

}  // namespace

TEST_SUITE("ops/layer_norm") {
  TEST_CASE("layer_norm of one row worked by hand") {
    // Mean 3, variance 4: xhat = (-1, 1) up to epsilon.
    context<cpu> ctx(1);
    matrix<double, cpu> x(1, 2), gamma(1, 2), beta(1, 2), y(1, 2);
    x(0, 0) = 1.0;
    x(0, 1) = 5.0;
    gamma(0, 0) = gamma(0, 1) = 3.0;
    beta(0, 0) = 10.0;
    const auto saved = ops::layer_norm(ctx, x, gamma, beta, 0.25, y.view());
    const double rstd = 1.0 / std::sqrt(4.25);
    CHECK(saved.mean[0] == 3.0);
    CHECK(support::within(saved.rstd[0], rstd, rounding_bound<double>(3, rstd)));
    CHECK(support::difference(y.view(), table(1, 2, {10.0 - 6.0 * rstd, 6.0 * rstd}),
                              rounding_bound<double>(6, 10.0)) == "");
  }

  TEST_CASE_TEMPLATE("layer_norm and its gradients agree with the reference for any threads", T,
                     TALPA_SCALARS) {
    support::test_random random(13);
    constexpr index rows = 600, cols = 37;
    // Far from mean zero, which costs a one-pass variance its digits.
    matrix<T, cpu> x = support::random_matrix<T>(random, rows, cols);
    for (index i = 0; i < x.size(); ++i) x.data()[i] += T{20};
    const matrix<T, cpu> gamma = support::random_matrix<T>(random, 1, cols);
    const matrix<T, cpu> beta = support::random_matrix<T>(random, 1, cols);
    const matrix<T, cpu> dy = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> start = support::random_matrix<T>(random, rows, cols);
    const T eps = static_cast<T>(epsilon);
    const table xt = to_table(x.view()), gt = to_table(gamma.view()), bt = to_table(beta.view()),
                dyt = to_table(dy.view());
    const norm_bounds bounds = bounds_of<T>(xt, gt, bt, dyt);
    const table y_expected = support::layer_norm(xt, gt, bt, epsilon).y;
    const support::layer_norm_gradients expected =
        support::layer_norm_gradient(xt, gt, epsilon, dyt);
    const auto sum = [](double a, double b) { return a + b; };
    const auto rounding = [](double v) { return rounding_bound<T>(1, v); };

    matrix<T, cpu> first(1, cols);
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> strided(x), y(rows, cols), dx(rows, cols), dgamma(1, cols), dbeta(1, cols);
      const auto saved = ops::layer_norm(ctx, strided.view(), gamma, beta, eps, y.view());
      CHECK(y.intact());
      CHECK(support::difference(y.view(), y_expected, bounds.y) == "");
      ops::layer_norm_backward(ctx, saved, x, gamma, dy, dx.view(), grad_mode::overwrite,
                               dgamma.view(), grad_mode::overwrite, dbeta.view(),
                               grad_mode::overwrite);
      CHECK(dx.intact());
      CHECK(dgamma.intact());
      CHECK(dbeta.intact());
      CHECK(support::difference(dx.view(), expected.dx, bounds.dx) == "");
      CHECK(support::difference(dgamma.view(), expected.dgamma, bounds.dgamma) == "");
      CHECK(support::difference(dbeta.view(), expected.dbeta, bounds.dbeta) == "");
      if (threads == 1) {
        for (index d = 0; d < cols; ++d) first(0, d) = dgamma.view()(0, d);
      }
      CHECK(support::same_bits(dgamma.view(), first.view()));

      support::padded<T> more(start);
      ops::layer_norm_backward(ctx, saved, x, gamma, dy, more.view(), grad_mode::accumulate,
                               dgamma.view(), grad_mode::accumulate, dbeta.view(),
                               grad_mode::accumulate);
      const table added = each(expected.dx, to_table(start.view()), sum);
      CHECK(support::difference(more.view(), added, each(bounds.dx, each(added, rounding), sum)) ==
            "");
      const auto twice = [](double v) { return 2.0 * v; };
      CHECK(support::difference(
                dgamma.view(), each(expected.dgamma, twice),
                each(each(bounds.dgamma, twice), each(expected.dgamma, rounding), sum)) == "");
      CHECK(support::difference(
                dbeta.view(), each(expected.dbeta, twice),
                each(each(bounds.dbeta, twice), each(expected.dbeta, rounding), sum)) == "");
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("layer_norm_backward leaves out what is ignored") {
    context<cpu> ctx(1);
    support::test_random random(14);
    const matrix<double, cpu> x = support::random_matrix<double>(random, 3, 4);
    const matrix<double, cpu> gamma = support::random_matrix<double>(random, 1, 4);
    matrix<double, cpu> y(3, 4), dx(3, 4), all(3, 4), dgamma(1, 4), dbeta(1, 4), only(1, 4);
    const auto saved = ops::layer_norm(ctx, x, gamma, gamma, 1e-5, y.view());
    const matrix_view<double, cpu> none;
    ops::layer_norm_backward(ctx, saved, x, gamma, y, all.view(), grad_mode::overwrite,
                             dgamma.view(), grad_mode::overwrite, dbeta.view(),
                             grad_mode::overwrite);
    ops::layer_norm_backward(ctx, saved, x, gamma, y, dx.view(), grad_mode::overwrite, none,
                             grad_mode::ignore, none, grad_mode::ignore);
    CHECK(support::same_bits(dx.view(), all.view()));
    ops::layer_norm_backward(ctx, saved, x, gamma, y, none, grad_mode::ignore, only.view(),
                             grad_mode::overwrite, none, grad_mode::ignore);
    CHECK(support::same_bits(only.view(), dgamma.view()));
    ops::layer_norm_backward(ctx, saved, x, gamma, y, none, grad_mode::ignore, none,
                             grad_mode::ignore, only.view(), grad_mode::overwrite);
    CHECK(support::same_bits(only.view(), dbeta.view()));
  }

  TEST_CASE_TEMPLATE("layer_norm of a constant row is beta and of no rows does nothing", T,
                     TALPA_SCALARS) {
    context<cpu> ctx(1);
    matrix<T, cpu> x(1, 3), gamma(1, 3), beta(1, 3), y(1, 3);
    for (index d = 0; d < 3; ++d) {
      x(0, d) = T{0.5};
      gamma(0, d) = T{2};
      beta(0, d) = static_cast<T>(d);
    }
    ops::layer_norm(ctx, x, gamma, beta, T{1e-5f}, y.view());
    CHECK(support::same_bits(y.view(), beta.view()));
    const matrix_view<T, cpu> nothing(nullptr, 0, 3);
    const auto saved = ops::layer_norm(ctx, nothing, gamma, beta, T{1e-5f}, nothing);
    ops::layer_norm_backward(ctx, saved, nothing, gamma, nothing, nothing, grad_mode::overwrite,
                             y.view(), grad_mode::overwrite, nothing, grad_mode::ignore);
    for (index d = 0; d < 3; ++d) CHECK(y(0, d) == T{0});
  }

  TEST_CASE("layer_norm names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), row(1, 3), bad(1, 2), y(2, 3);
    CHECK_THROWS_WITH_AS(
        ops::layer_norm(ctx, x, bad, row, 1e-5f, y.view()),
        "talpa::ops::layer_norm: 'gamma' has shape [1, 2], expected [1, 3] = one row, columns of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::layer_norm(ctx, x, row, bad, 1e-5f, y.view()),
        "talpa::ops::layer_norm: 'beta' has shape [1, 2], expected [1, 3] = one row, columns of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::layer_norm(ctx, x, row, row, 1e-5f, bad.view()),
        "talpa::ops::layer_norm: 'y' has shape [1, 2], expected [2, 3] = shape of x", shape_error);
    CHECK_THROWS_WITH_AS(ops::layer_norm(ctx, x, row, row, 0.0f, y.view()),
                         "talpa::ops::layer_norm: 'epsilon' is 0, expected a number > 0",
                         value_error);
    CHECK_THROWS_WITH_AS(
        ops::layer_norm(ctx, x, row, row, std::numeric_limits<float>::infinity(), y.view()),
        "talpa::ops::layer_norm: 'epsilon' is inf, expected a number > 0", value_error);
    CHECK(ctx.memory.used() == 0);

    const auto saved = ops::layer_norm(ctx, x, row, row, 1e-5f, y.view());
    const auto backward = [&](matrix_view<float, cpu> dy, matrix_view<float, cpu> dx,
                              matrix_view<float, cpu> dgamma, matrix_view<float, cpu> dbeta) {
      ops::layer_norm_backward(ctx, saved, x, row, dy, dx, grad_mode::overwrite, dgamma,
                               grad_mode::overwrite, dbeta, grad_mode::overwrite);
    };
    CHECK_THROWS_WITH_AS(
        backward(bad, y, row, row),
        "talpa::ops::layer_norm_backward: 'dy' has shape [1, 2], expected [2, 3] = shape of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        backward(y, bad, row, row),
        "talpa::ops::layer_norm_backward: 'dx' has shape [1, 2], expected [2, 3] = shape of x",
        shape_error);
    CHECK_THROWS_WITH_AS(backward(y, y, bad, row),
                         "talpa::ops::layer_norm_backward: 'dgamma' has shape [1, 2], expected [1, "
                         "3] = one row, columns of x",
                         shape_error);
    CHECK_THROWS_WITH_AS(backward(y, y, row, bad),
                         "talpa::ops::layer_norm_backward: 'dbeta' has shape [1, 2], expected [1, "
                         "3] = one row, columns of x",
                         shape_error);
    CHECK_THROWS_WITH_AS(
        ops::layer_norm_backward(ctx, layer_norm_saved<float, cpu>(), x, row, y, y,
                                 grad_mode::overwrite, row, grad_mode::ignore, row,
                                 grad_mode::ignore),
        "talpa::ops::layer_norm_backward: 'saved' has shape [0], expected [2] = rows of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::layer_norm_backward(ctx, saved, x, bad, y, y, grad_mode::overwrite, row,
                                 grad_mode::ignore, row, grad_mode::ignore),
        "talpa::ops::layer_norm_backward: 'gamma' has shape [1, 2], expected [1, 3] = one row, "
        "columns of x",
        shape_error);
  }
}

}  // namespace talpa::layer_norm_test
