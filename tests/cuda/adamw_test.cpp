// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"

#include <talpa/cuda/adamw.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_adamw_test {
using support::device;
using support::on_device;
using support::rounding_bound;
using support::to_table;

namespace {

const index rows = support::device_size(129, 5003);
constexpr index cols = 7;
constexpr adamw_numbers numbers{.learning_rate = 0.0625,
                                .beta1 = 0.875,
                                .beta2 = 0.96875,
                                .epsilon = 0.0009765625,
                                .weight_decay = 0.125};

}  // namespace

TEST_SUITE("cuda/adamw") {
  TEST_CASE_TEMPLATE("adamw_update agrees with the reference, counted here or there", T, float,
                     double) {
    context<device> ctx;
    support::test_random random(17);
    const matrix<T, cpu> g0 = support::random_matrix<T>(random, rows, cols);
    const matrix<T, cpu> w0 = support::random_matrix<T>(random, rows, cols);
    support::adamw_reference reference{numbers.learning_rate, numbers.beta1, numbers.beta2,
                                       numbers.epsilon, numbers.weight_decay};
    support::table expected = to_table(w0.view());
    reference.step(expected, to_table(g0.view()));
    // Up to 14 operations, all on positive terms but the last two; the step itself is at most the
    // learning rate times 1 + weight_decay |w|, |w| <= 4.
    const double bound = rounding_bound<T>(2, support::largest(to_table(w0.view()))) +
                         rounding_bound<T>(14, 0.0625 * (1.0 + 0.5));
    const double moment = support::largest(to_table(g0.view()));
    for (const bool counted : {false, true}) {
      CAPTURE(counted);
      on_device<T> g(g0), w(w0), m(matrix<T, cpu>(rows, cols)), v(matrix<T, cpu>(rows, cols));
      if (counted) {
        matrix<double, cpu> ones(1, 2);
        ones(0, 0) = ones(0, 1) = 1.0;
        on_device<double> powers(ones);
        ops::adamw_advance(ctx, numbers, powers.view());
        ops::adamw_update_counted(ctx, numbers, powers.view(), g.view(), m.view(), v.view(),
                                  w.view());
        ctx.synchronise();
        CHECK(powers.now()(0, 0) == numbers.beta1);
        CHECK(powers.now()(0, 1) == numbers.beta2);
        CHECK(powers.intact());
      } else {
        ops::adamw_update(ctx, numbers, g.view(), m.view(), v.view(), w.view());
        ctx.synchronise();
      }
      CHECK(support::difference(w.now().view(), expected, bound) == "");
      CHECK(support::difference(m.now().view(), reference.first, rounding_bound<T>(3, moment)) ==
            "");
      CHECK(support::difference(v.now().view(), reference.second,
                                rounding_bound<T>(4, moment * moment)) == "");
      CHECK(w.intact());
      CHECK(m.intact());
      CHECK(v.intact());
    }
  }

  TEST_CASE("the powers of the betas count the steps") {
    context<device> ctx;
    matrix<double, cpu> ones(1, 2);
    ones(0, 0) = ones(0, 1) = 1.0;
    on_device<double> powers(ones);
    double first = 1.0, second = 1.0;
    for (int step = 1; step <= 4; ++step) {
      ops::adamw_advance(ctx, numbers, powers.view());
      first *= numbers.beta1;
      second *= numbers.beta2;
    }
    ctx.synchronise();
    // One rounding a step, in the same order.
    CHECK(powers.now()(0, 0) == first);
    CHECK(powers.now()(0, 1) == second);
  }

  TEST_CASE("no rows are legal") {
    context<device> ctx;
    on_device<float> none(matrix<float, cpu>(0, cols));
    CHECK_NOTHROW(
        ops::adamw_update(ctx, numbers, none.view(), none.view(), none.view(), none.view()));
    ctx.synchronise();
    CHECK(none.intact());
  }
}

}  // namespace talpa::cuda_adamw_test
