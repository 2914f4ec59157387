// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/adamw.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::adamw_test {
using support::rounding_bound;
using support::table;
using support::to_table;

TEST_SUITE("ops/adamw") {
  TEST_CASE(
      "adamw_update moves the first step by the learning rate, whatever the gradient's size") {
    // After one step mhat = g and sqrt(vhat) = |g|.
    for (const double gradient : {1e-3, 1.0, -1e3}) {
      context<cpu> ctx(1);
      matrix<double, cpu> g(1, 1), m(1, 1), v(1, 1), w(1, 1);
      g(0, 0) = gradient;
      w(0, 0) = 2.0;
      ops::adamw_update(ctx, {.learning_rate = 0.5, .epsilon = 1e-30, .weight_decay = 0.0}, g, m, v,
                        w.view());
      const double expected = 2.0 - std::copysign(0.5, gradient);
      CHECK(support::within(w(0, 0), expected, rounding_bound<double>(12, 2.5)));
    }
  }

  TEST_CASE_TEMPLATE("adamw_update agrees with the reference for strided views and any threads", T,
                     TALPA_SCALARS) {
    support::test_random random(17);
    constexpr index rows = 300, cols = 70;
    const matrix<T, cpu> g = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> w0 = support::random_matrix<T>(random, rows, cols);
    const adamw_numbers numbers{.learning_rate = 0.0625,
                                .beta1 = 0.875,
                                .beta2 = 0.96875,
                                .epsilon = 0.0009765625,
                                .weight_decay = 0.125,
                                .step = 1};
    support::adamw_reference reference{numbers.learning_rate, numbers.beta1, numbers.beta2,
                                       numbers.epsilon, numbers.weight_decay};
    table expected = to_table(w0.view());
    reference.step(expected, to_table(g.view()));
    // Up to 14 operations, all on positive terms but the last two; the step itself is at most the
    // learning rate times 1 + weight_decay |w|.
    const double bound = rounding_bound<T>(2, support::largest(to_table(w0.view()))) +
                         rounding_bound<T>(14, 0.0625 * (1.0 + 0.5));
    const double moment = support::largest(to_table(g.view()));
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      support::padded<T> m(matrix<T, cpu>(rows, cols)), v(matrix<T, cpu>(rows, cols)), w(w0);
      ops::adamw_update(ctx, numbers, g, m.view(), v.view(), w.view());
      CHECK(m.intact());
      CHECK(v.intact());
      CHECK(w.intact());
      CHECK(support::difference(w.view(), expected, bound) == "");
      CHECK(support::difference(m.view(), reference.first, rounding_bound<T>(3, moment)) == "");
      CHECK(support::difference(v.view(), reference.second,
                                rounding_bound<T>(4, moment * moment)) == "");
    }
  }

  TEST_CASE("adamw_update with a zero gradient still decays the weights") {
    context<cpu> ctx(1);
    matrix<double, cpu> g(1, 1), m(1, 1), v(1, 1), w(1, 1);
    w(0, 0) = 8.0;
    ops::adamw_update(ctx, {.learning_rate = 0.5, .weight_decay = 0.25}, g, m, v, w.view());
    CHECK(w(0, 0) == 7.0);
    CHECK(m(0, 0) == 0.0);
  }

  TEST_CASE("adamw_update decays weights by a tiny rate in float without bias") {
    // As a factor, 1 - 1e-6 in float is off by 1.3 per cent of 1e-6, for every weight alike.
    // Subtracted, only the last rounding remains: uniform in half a spacing of [1, 2), so its mean
    // has a standard deviation of spacing / sqrt(12 n).
    context<cpu> ctx(1);
    constexpr index rows = 200, cols = 100;
    constexpr double rate = 1e-4, decay = 1e-2;
    matrix<float, cpu> g(rows, cols), m(rows, cols), v(rows, cols), w(rows, cols);
    support::test_random random(18);
    double before = 0.0, after = 0.0;
    for (index i = 0; i < w.size(); ++i) {
      // Away from 1, so that the weights stay in [1, 2).
      w.data()[i] = static_cast<float>(random.uniform(1.1, 1.9));
      before += static_cast<double>(w.data()[i]);
    }
    ops::adamw_update(ctx, {.learning_rate = rate, .weight_decay = decay}, g, m, v, w.view());
    for (index i = 0; i < w.size(); ++i) after += static_cast<double>(w.data()[i]);
    const double n = static_cast<double>(w.size());
    const double spacing = 2.0 * support::unit_roundoff<float>();
    CHECK(support::within((before - after) / n, rate * decay * before / n,
                          5.0 * spacing / std::sqrt(12.0 * n)));
  }

  TEST_CASE("adamw_update names what does not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> w(2, 3), bad(3, 2);
    CHECK_THROWS_WITH_AS(
        ops::adamw_update(ctx, {}, bad, w, w, w.view()),
        "talpa::ops::adamw_update: 'dvalue' has shape [3, 2], expected [2, 3] = shape of value",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::adamw_update(ctx, {}, w, bad, w, w.view()),
        "talpa::ops::adamw_update: 'first' has shape [3, 2], expected [2, 3] = shape of value",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::adamw_update(ctx, {}, w, w, bad, w.view()),
        "talpa::ops::adamw_update: 'second' has shape [3, 2], expected [2, 3] = shape of value",
        shape_error);
    CHECK_THROWS_WITH_AS(
        ops::adamw_update(ctx, {.step = 0}, w, w, w, w.view()),
        "talpa::ops::adamw_update: 'step' is 0, expected >= 1 = number of this step", value_error);
  }
}

}  // namespace talpa::adamw_test
