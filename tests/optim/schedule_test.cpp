// SPDX-License-Identifier: Apache-2.0
#include "support/tolerance.hpp"

#include <talpa/optim/schedule.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::schedule_test {

using support::rounding_bound;
using support::within;

TEST_SUITE("optim/schedule") {
  TEST_CASE("warm-up rises from the first update on and reaches one") {
    const warmup_constant constant{.warmup_steps = 4};
    CHECK(constant.factor(0) == 0.25);
    CHECK(constant.factor(1) == 0.5);
    CHECK(constant.factor(3) == 1.0);
    CHECK(constant.factor(4) == 1.0);
    CHECK(constant.factor(1000000) == 1.0);
    CHECK(warmup_constant{}.factor(0) == 1.0);
    const warmup_linear linear{.warmup_steps = 4, .total_steps = 8};
    const warmup_cosine cosine{.warmup_steps = 4, .total_steps = 8};
    for (index step = 0; step < 4; ++step) {
      CHECK(linear.factor(step) == constant.factor(step));
      CHECK(cosine.factor(step) == constant.factor(step));
    }
  }

  TEST_CASE("the line goes from one at the end of warm-up to the final factor at total_steps") {
    const warmup_linear linear{.warmup_steps = 2, .total_steps = 10, .final_factor = 0.5};
    CHECK(linear.factor(2) == 1.0);
    CHECK(linear.factor(6) == 0.75);
    CHECK(linear.factor(10) == 0.5);
    CHECK(linear.factor(11) == 0.5);
    CHECK(warmup_linear{.total_steps = 4}.factor(3) == 0.25);
  }

  TEST_CASE("the cosine agrees with libm, is one at its start and the final factor at its end") {
    const warmup_cosine cosine{.warmup_steps = 3, .total_steps = 103, .final_factor = 0.125};
    CHECK(cosine.factor(3) == 1.0);
    CHECK(cosine.factor(53) == 0.5625);
    CHECK(cosine.factor(103) == 0.125);
    CHECK(cosine.factor(500) == 0.125);
    const double pi = std::acos(-1.0);
    for (index step = 3; step <= 103; ++step) {
      const double p = static_cast<double>(step - 3) / 100.0;
      const double expected = 0.125 + 0.875 * 0.5 * (1.0 + std::cos(pi * p));
      // The rounding of pi p and five operations on numbers of at most 2.
      CHECK(within(cosine.factor(step), expected, rounding_bound<double>(8, 2.0)));
    }
  }

  TEST_CASE("schedules name numbers outside their ranges") {
    CHECK_THROWS_WITH_AS(warmup_constant{.warmup_steps = -1}.factor(0),
                         "talpa::warmup_constant: 'warmup_steps' is -1, expected >= 0 = updates of "
                         "warm-up",
                         value_error);
    CHECK_THROWS_WITH_AS(warmup_constant{}.factor(-1),
                         "talpa::warmup_constant: 'step' is -1, expected >= 0 = updates so far",
                         value_error);
    CHECK_THROWS_WITH_AS((warmup_linear{.warmup_steps = -2, .total_steps = 5}.factor(0)),
                         "talpa::warmup_linear: 'warmup_steps' is -2, expected >= 0 = updates of "
                         "warm-up",
                         value_error);
    CHECK_THROWS_WITH_AS(
        (warmup_linear{.warmup_steps = 5, .total_steps = 5}.factor(0)),
        "talpa::warmup_linear: 'total_steps' is 5, expected >= 6 = updates in all, "
        "more than warmup_steps",
        value_error);
    CHECK_THROWS_WITH_AS((warmup_cosine{.total_steps = 5, .final_factor = 1.5}.factor(0)),
                         "talpa::warmup_cosine: 'final_factor' is 1.5, expected a number in [0, 1]",
                         value_error);
    CHECK_THROWS_WITH_AS(warmup_cosine{.total_steps = 5}.factor(-1),
                         "talpa::warmup_cosine: 'step' is -1, expected >= 0 = updates so far",
                         value_error);
  }
}

}  // namespace talpa::schedule_test
