// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/kl_divergence.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

namespace talpa::kl_divergence_test {

using namespace support;

namespace {

constexpr double clip = 1e-3;

/// Positive rows, one element in eight outside [clip, 1 - clip].
template <class T>
matrix<T, cpu> shares(test_random& random, index rows, index cols) {
  matrix<T, cpu> p(rows, cols);
  for (index i = 0; i < p.size(); ++i) {
    const index odd = random.below(16);
    p.data()[i] = odd == 0 ? T{0} : (odd == 1 ? T{1} : static_cast<T>(random.uniform(0.01, 0.99)));
  }
  return p;
}

}  // namespace

TEST_SUITE("ops/kl_divergence") {
  TEST_CASE_TEMPLATE("kl_divergence of two rows, by hand", T, TALPA_SCALARS) {
    // 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 3/4) and 0: half of their sum is 1/4 ln(4/3).
    matrix<T, cpu> p(2, 2), q(2, 2), value(1, 1), one(1, 1), dp(2, 2);
    one(0, 0) = T{1};
    p(0, 0) = p(0, 1) = T(0.5);
    q(0, 0) = T(0.25);
    q(0, 1) = T(0.75);
    p(1, 0) = q(1, 0) = T(0.25);
    p(1, 1) = q(1, 1) = T(0.75);
    context<cpu> ctx(1);
    ops::kl_divergence(ctx, p, q, 1e-7, value.view());
    // Two logarithms below 1.4 with 2 roundings each, a product, sums of 4 and a division.
    const double bound = rounding_bound<T>(12.0, 1.5);
    CHECK(within(static_cast<double>(value(0, 0)), 0.25 * std::log(4.0 / 3.0), bound));
    ops::kl_divergence_backward(ctx, p, q, 1e-7, one, dp.view(), grad_mode::overwrite);
    const table expected(
        2, 2, {0.5 * (std::log(2.0) + 1.0), 0.5 * (std::log(2.0 / 3.0) + 1.0), 0.5, 0.5});
    CHECK(difference(dp.view(), expected, bound) == "");
  }

  TEST_CASE_TEMPLATE("kl_divergence and its gradient agree with loops in double", T,
                     TALPA_SCALARS) {
    test_random random(17);
    constexpr index rows = 300, cols = 70;
    const matrix<T, cpu> p = shares<T>(random, rows, cols), q = shares<T>(random, rows, cols);
    const auto clipped = [](double v) { return std::min(std::max(v, clip), 1.0 - clip); };
    double expected = 0.0, size = 0.0;
    table gradient(rows, cols);
    for (index n = 0; n < rows; ++n) {
      for (index c = 0; c < cols; ++c) {
        const double a = static_cast<double>(p(n, c)), b = static_cast<double>(q(n, c));
        const double fall = std::log(clipped(a)) - std::log(clipped(b));
        expected += clipped(a) * fall / rows;
        size += clipped(a) * (-std::log(clipped(a)) - std::log(clipped(b))) / rows;
        gradient(n, c) = a < clip || a > 1.0 - clip ? 0.0 : -2.0 / rows * (fall + 1.0);
      }
    }
    const matrix<T, cpu> start = random_matrix<T>(random, rows, cols);
    const table added =
        each(gradient, to_table(start.view()), [](double a, double b) { return a + b; });
    matrix<T, cpu> dvalue(1, 1);
    dvalue(0, 0) = T{-2};
    T first{0};
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      padded<T> strided(p), dp(rows, cols), more(start);
      matrix<T, cpu> value(1, 1);
      ops::kl_divergence(ctx, strided.view(), q, clip, value.view());
      // A sum of N C terms, each of two logarithms (2 roundings each, relative to clip too), a
      // difference and a product, and a division; `size` sums the terms' absolute values.
      CHECK(within(static_cast<double>(value(0, 0)), expected,
                   rounding_bound<T>(static_cast<double>(rows * cols) + 10.0, size)));
      if (threads == 1) first = value(0, 0);
      CHECK(value(0, 0) == first);
      // ln(1 / clip) < 7 for either logarithm, ten roundings, weight 2 / N.
      const double bound = rounding_bound<T>(10.0, 2.0 / rows * 15.0);
      ops::kl_divergence_backward(ctx, p, q, clip, dvalue, dp.view(), grad_mode::overwrite);
      CHECK(dp.intact());
      CHECK(difference(dp.view(), gradient, bound) == "");
      ops::kl_divergence_backward(ctx, p, q, clip, dvalue, more.view(), grad_mode::accumulate);
      CHECK(difference(more.view(), added, bound + rounding_bound<T>(1.0, 5.0)) == "");
      ops::kl_divergence_backward(ctx, p, q, clip, dvalue, matrix_view<T, cpu>(),
                                  grad_mode::ignore);
    }
  }

  TEST_CASE("the gradient is that of the clipped value") {
    test_random random(18);
    const matrix<double, cpu> q = shares<double>(random, 3, 5);
    matrix<double, cpu> p = shares<double>(random, 3, 5), one(1, 1), dp(3, 5), value(1, 1);
    p(0, 0) = 0.0;
    one(0, 0) = 1.0;
    context<cpu> ctx(1);
    ops::kl_divergence_backward(ctx, p, q, clip, one, dp.view(), grad_mode::overwrite);
    CHECK(dp(0, 0) == 0.0);
    const double step = 1e-4;  // no element is so near to a bound
    const table slow = central_differences(to_table(p.view()), step, [&](const table& at) {
      matrix<double, cpu> moved(3, 5);
      for (index i = 0; i < 15; ++i) moved.data()[i] = at.values[static_cast<std::size_t>(i)];
      ops::kl_divergence(ctx, moved, q, clip, value.view());
      return value(0, 0);
    });
    // Third derivative of p ln p is 1 / p^2 <= 1e4 for p >= 0.01.
    CHECK(difference(dp.view(), slow, central_difference_bound(step, 1e4, 32.0, 10.0)) == "");
  }

  TEST_CASE("kl_divergence of nothing is zero, and NaN stays NaN") {
    context<cpu> ctx(1);
    matrix<float, cpu> value(1, 1), p(1, 2), q(1, 2);
    value(0, 0) = 7.0F;
    const matrix_view<const float, cpu> none(nullptr, 0, 3);
    ops::kl_divergence(ctx, none, none, clip, value.view());
    CHECK(value(0, 0) == 0.0F);
    p(0, 1) = std::nanf("");
    ops::kl_divergence(ctx, p, q, clip, value.view());
    CHECK(std::isnan(value(0, 0)));
  }

  TEST_CASE("kl_divergence names the argument that does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> p(2, 3), q(3, 2), value(1, 1);
    CHECK_THROWS_WITH_AS(
        ops::kl_divergence(ctx, p, q, clip, value.view()),
        "talpa::ops::kl_divergence: 'q' has shape [3, 2], expected [2, 3] = shape of p",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::kl_divergence(ctx, p, p, clip, q.view()),
        "talpa::ops::kl_divergence: 'value' has shape [3, 2], expected [1, 1] = one number",
        shape_error);
    CHECK_THROWS_WITH_AS(ops::kl_divergence(ctx, p, p, 0.0, value.view()),
                         "talpa::ops::kl_divergence: 'clip' is 0, expected above 0, below 0.5 = "
                         "least probability",
                         value_error);
    CHECK_THROWS_WITH_AS(
        ops::kl_divergence_backward(ctx, p, p, 0.5, value, p.view(), grad_mode::overwrite),
        "talpa::ops::kl_divergence_backward: 'clip' is 0.5, expected above 0, below 0.5 = least "
        "probability",
        value_error);
    CHECK_THROWS_WITH_AS(
        ops::kl_divergence_backward(ctx, p, p, clip, value, q.view(), grad_mode::overwrite),
        "talpa::ops::kl_divergence_backward: 'dp' has shape [3, 2], expected [2, 3] = shape of p",
        shape_error);
  }
}

}  // namespace talpa::kl_divergence_test
