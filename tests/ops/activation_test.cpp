// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/activation.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::activation_test {
using support::each;
using support::table;
using support::to_table;

namespace {

// References by libm, and the error bounds that talpa/core/math.hpp documents: relative in ulps,
// absolute in eps.
struct relu_case {
  using activation = relu;
  static constexpr auto value = support::relu_value;
  static constexpr auto slope = support::relu_slope;
  static constexpr double value_ulps = 0.0, value_eps = 0.0, slope_ulps = 0.0, slope_eps = 0.0;
};
struct silu_case {
  using activation = silu;
  static constexpr auto value = support::silu_value;
  static constexpr auto slope = support::silu_slope;
  static constexpr double value_ulps = 3.0, value_eps = 0.0, slope_ulps = 0.0, slope_eps = 2.0;
};
struct gelu_case {
  using activation = gelu_tanh;
  static constexpr auto value = support::gelu_tanh_value;
  static constexpr auto slope = support::gelu_tanh_slope;
  static constexpr double value_ulps = 4.0, value_eps = 1.0, slope_ulps = 0.0, slope_eps = 3.0;
};
struct tanh_case {
  using activation = talpa::tanh;
  static constexpr auto value = support::tanh_value;
  static constexpr auto slope = support::tanh_slope;
  static constexpr double value_ulps = 2.5, value_eps = 0.0, slope_ulps = 4.0, slope_eps = 0.0;
};
struct sigmoid_case {
  using activation = sigmoid;
  static constexpr auto value = support::sigmoid_value;
  static constexpr auto slope = support::sigmoid_slope;
  static constexpr double value_ulps = 2.5, value_eps = 0.0, slope_ulps = 4.0, slope_eps = 0.0;
};

template <class Case, class T>
void check_case() {
  support::test_random random(9);
  const matrix<T, cpu> x = support::random_matrix<T>(random, 300, 70, 3.0);
  const matrix<T, cpu> dy = support::random_matrix<T>(random, 300, 70);
  const matrix<T, cpu> start = support::random_matrix<T>(random, 300, 70);
  const typename Case::activation f;

  const table y_expected = each(to_table(x.view()), Case::value);
  const table y_bounds = each(y_expected, [](double y) {
    return support::function_bound<T>(Case::value_ulps, y) +
           support::function_bound<T>(Case::value_eps, 1.0);
  });
  const table slope = each(to_table(x.view()), Case::slope);
  const table slope_bounds = each(slope, [](double s) {
    return support::function_bound<T>(Case::slope_ulps, s) +
           support::function_bound<T>(Case::slope_eps, 1.0);
  });
  const auto product = [](double a, double b) { return a * b; };
  const auto sum = [](double a, double b) { return a + b; };
  const table dyt = to_table(dy.view());
  const table dx_expected = each(dyt, slope, product);
  // The error of the slope, and the rounding of the product.
  const table dx_bounds =
      each(each(support::absolute(dyt), slope_bounds, product),
           each(dx_expected, [](double v) { return support::rounding_bound<T>(2, v); }), sum);
  const table added = each(dx_expected, to_table(start.view()), sum);
  const table added_bounds =
      each(dx_bounds, each(added, [](double v) { return support::rounding_bound<T>(1, v); }), sum);

  for (const int threads : {1, 2, 3}) {
    context<cpu> ctx(threads);
    support::padded<T> y(300, 70), dx(300, 70), more(start);
    ops::activation(ctx, f, x, y.view());
    CHECK(y.intact());
    CHECK(support::difference(y.view(), y_expected, y_bounds) == "");
    ops::activation_backward(ctx, f, x, dy, dx.view(), grad_mode::overwrite);
    CHECK(dx.intact());
    CHECK(support::difference(dx.view(), dx_expected, dx_bounds) == "");
    ops::activation_backward(ctx, f, x, dy, more.view(), grad_mode::accumulate);
    CHECK(more.intact());
    CHECK(support::difference(more.view(), added, added_bounds) == "");
    ops::activation_backward(ctx, f, x, dy, matrix_view<T, cpu>(), grad_mode::ignore);
  }
}

struct leaky {
  double slope_below = 0.1;
  template <floating T>
  T value(T x) const {
    return x > T{0} ? x : static_cast<T>(slope_below) * x;
  }
  template <floating T>
  T derivative(T x) const {
    return x > T{0} ? T{1} : static_cast<T>(slope_below);
  }
};
static_assert(activation_function<leaky>);
static_assert(!activation_function<int>);

}  // namespace

TEST_SUITE("ops/activation") {
  TEST_CASE_TEMPLATE("every activation and its gradient agree with libm", Case, relu_case,
                     silu_case, gelu_case, tanh_case, sigmoid_case) {
    check_case<Case, float>();
    check_case<Case, double>();
  }

  TEST_CASE("an activation of the user's own, with a parameter, works in place") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(1, 2), dx(1, 2);
    x(0, 0) = -2.0f;
    x(0, 1) = 3.0f;
    const leaky f{.slope_below = 0.25};
    ops::activation_backward(ctx, f, x, x, dx.view(), grad_mode::overwrite);
    CHECK(dx(0, 0) == -0.5f);
    CHECK(dx(0, 1) == 3.0f);
    ops::activation(ctx, f, x, x.view());
    CHECK(x(0, 0) == -0.5f);
    CHECK(x(0, 1) == 3.0f);
  }

  TEST_CASE("the identity passes values and gradients through") {
    context<cpu> ctx(1);
    matrix<double, cpu> x(1, 1), y(1, 1);
    x(0, 0) = 0.7;
    ops::activation(ctx, identity{}, x, y.view());
    CHECK(y(0, 0) == 0.7);
    ops::activation_backward(ctx, identity{}, y, x, y.view(), grad_mode::accumulate);
    CHECK(y(0, 0) == 0.7 + 0.7);
  }

  TEST_CASE("activations keep NaN and take infinity to their limits") {
    context<cpu> ctx(1);
    const float inf = std::numeric_limits<float>::infinity();
    matrix<float, cpu> x(1, 3), y(1, 3);
    x(0, 0) = -inf;
    x(0, 1) = inf;
    x(0, 2) = std::numeric_limits<float>::quiet_NaN();
    ops::activation(ctx, silu{}, x, y.view());
    CHECK(y(0, 0) == 0.0f);
    CHECK(y(0, 1) == inf);
    CHECK(std::isnan(y(0, 2)));
    ops::activation(ctx, relu{}, x, y.view());
    CHECK(y(0, 0) == 0.0f);
    CHECK(y(0, 1) == inf);
    CHECK(std::isnan(y(0, 2)));
    ops::activation(ctx, talpa::tanh{}, x, y.view());
    CHECK(y(0, 0) == -1.0f);
    CHECK(y(0, 1) == 1.0f);
    CHECK(std::isnan(y(0, 2)));
  }

  TEST_CASE("activation names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 3), y(3, 2);
    CHECK_THROWS_WITH_AS(
        ops::activation(ctx, relu{}, x, y.view()),
        "talpa::ops::activation: 'y' has shape [3, 2], expected [2, 3] = shape of x", shape_error);
    CHECK_THROWS_WITH_AS(
        ops::activation_backward(ctx, relu{}, x, y, x.view(), grad_mode::overwrite),
        "talpa::ops::activation_backward: 'dy' has shape [3, 2], expected [2, 3] = shape of x",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::activation_backward(ctx, relu{}, x, x, y.view(), grad_mode::overwrite),
        "talpa::ops::activation_backward: 'dx' has shape [3, 2], expected [2, 3] = shape of x",
        shape_error);
  }
}

}  // namespace talpa::activation_test
