// SPDX-License-Identifier: Apache-2.0
#include "support/layer_norm_bounds.hpp"
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/layer_norm.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::cuda_layer_norm_test {
using support::device;
using support::each;
using support::gamma_bound;
using support::on_device;
using support::rounding_bound;
using support::sum_bound;
using support::table;
using support::to_table;

namespace {

using support::layer_norm_bounds::bounds_of;
using support::layer_norm_bounds::epsilon;
using support::layer_norm_bounds::norm_bounds;

template <class T>
std::string added_difference(on_device<T>& found, const table& gradient, const table& bounds) {
  const table added =
      each(gradient, to_table(found.host().view()), [](double a, double b) { return a + b; });
  return support::difference(found.now().view(), added, each(bounds, added, [](double b, double v) {
                               return b + rounding_bound<T>(1, v);
                             }));
}

}  // namespace

TEST_SUITE("cuda/layer_norm") {
  TEST_CASE_TEMPLATE("layer_norm and its gradients agree with the reference, also in place", T,
                     TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(13);
    for (const index rows : {index{0}, index{1}, support::device_size(129, 5001)}) {
      constexpr index cols = 37;
      CAPTURE(rows);
      // Far from mean zero, which costs a one-pass variance its digits.
      matrix<T, cpu> values = support::random_matrix<T>(random, rows, cols);
      for (index i = 0; i < values.size(); ++i) values.data()[i] += T{20};
      on_device<T> x(values), dy(support::random_matrix<T>(random, rows, cols));
      on_device<T> gamma(support::random_matrix<T>(random, 1, cols));
      on_device<T> beta(support::random_matrix<T>(random, 1, cols));
      on_device<T> y(matrix<T, cpu>(rows, cols)), dx(support::random_matrix<T>(random, rows, cols));
      on_device<T> dgamma(support::random_matrix<T>(random, 1, cols));
      on_device<T> dbeta(support::random_matrix<T>(random, 1, cols));
      on_device<T> only_dgamma(matrix<T, cpu>(1, cols)), only_dbeta(matrix<T, cpu>(1, cols));
      const table xt = to_table(x.host().view()), gt = to_table(gamma.host().view());
      const table bt = to_table(beta.host().view()), dyt = to_table(dy.host().view());
      const double eps = static_cast<double>(static_cast<T>(epsilon));
      const support::layer_norm_result expected = support::layer_norm(xt, gt, bt, eps);
      const support::layer_norm_gradients gradients =
          support::layer_norm_gradient(xt, gt, eps, dyt);
      const norm_bounds bounds = bounds_of<T>(xt, gt, bt, dyt);

      const typename workspace<device>::scope scope(ctx.memory);
      const auto saved = ops::layer_norm(ctx, x.view(), gamma.view(), beta.view(),
                                         static_cast<T>(epsilon), y.view());
      constexpr grad_mode accumulate = grad_mode::accumulate, ignore = grad_mode::ignore,
                          overwrite = grad_mode::overwrite;
      ops::layer_norm_backward(ctx, saved, x.view(), gamma.view(), dy.view(), dx.view(), accumulate,
                               dgamma.view(), accumulate, dbeta.view(), accumulate);
      ops::layer_norm_backward(ctx, saved, x.view(), gamma.view(), dy.view(), {}, ignore,
                               only_dgamma.view(), overwrite, only_dbeta.view(), overwrite);
      ops::layer_norm_backward(ctx, saved, x.view(), gamma.view(), dy.view(), dy.view(), overwrite,
                               {}, ignore, {}, ignore);
      on_device<T> place(values);
      ops::layer_norm(ctx, place.view(), gamma.view(), beta.view(), static_cast<T>(epsilon),
                      place.view());
      ctx.synchronise();

      CHECK(support::difference(y.now().view(), expected.y, bounds.y) == "");
      CHECK(support::bit_difference(place.now(), y.now()) == "");
      CHECK(support::difference(dy.now().view(), gradients.dx, bounds.dx) == "");
      CHECK(added_difference(dx, gradients.dx, bounds.dx) == "");
      CHECK(added_difference(dgamma, gradients.dgamma, bounds.dgamma) == "");
      CHECK(added_difference(dbeta, gradients.dbeta, bounds.dbeta) == "");
      if (rows > 0) {
        CHECK(support::difference(only_dgamma.now().view(), gradients.dgamma, bounds.dgamma) == "");
        CHECK(support::difference(only_dbeta.now().view(), gradients.dbeta, bounds.dbeta) == "");
      } else {
        CHECK(support::bit_difference(only_dgamma.now(), matrix<T, cpu>(1, cols)) == "");
        CHECK(support::bit_difference(only_dbeta.now(), matrix<T, cpu>(1, cols)) == "");
      }
      CHECK(y.intact());
      CHECK(dx.intact());
      CHECK(dgamma.intact());
      CHECK(dbeta.intact());
      CHECK(ctx.scratch.used() == 0);
    }
  }

  TEST_CASE("a constant row gives beta") {
    context<device> ctx;
    matrix<float, cpu> sevens(2, 33), ones(1, 33), shift(1, 33);
    for (index d = 0; d < 33; ++d) {
      sevens(0, d) = 7.0f;
      sevens(1, d) = std::numeric_limits<float>::quiet_NaN();
      ones(0, d) = 1.0f;
      shift(0, d) = static_cast<float>(d);
    }
    on_device<float> x(sevens), gamma(ones), beta(shift);
    ops::layer_norm(ctx, x.view(), gamma.view(), beta.view(), 1e-5f, x.view());
    ctx.synchronise();
    const matrix<float, cpu> y = x.now();
    for (index d = 0; d < 33; ++d) {
      CHECK(y(0, d) == shift(0, d));
      CHECK(std::isnan(y(1, d)));
    }
  }
}

}  // namespace talpa::cuda_layer_norm_test
