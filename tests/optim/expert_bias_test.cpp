// SPDX-License-Identifier: Apache-2.0
#include "support/refused.hpp"

#include <talpa/core/matrix.hpp>
#include <talpa/optim/expert_bias.hpp>

#include <doctest/doctest.h>

#include <vector>

namespace talpa::expert_bias_test {

using support::refused;

TEST_SUITE("optim/expert_bias") {
  TEST_CASE("update_bias moves by the sign, and not at the mean") {
    matrix<double, cpu> bias(1, 3);
    bias(0, 0) = 0.5;
    update_bias(bias.view(), {4, 1, 7}, 0.25);
    CHECK(bias(0, 0) == 0.5);
    CHECK(bias(0, 1) == 0.25);
    CHECK(bias(0, 2) == -0.25);
    update_bias(bias.view(), {0, 0, 0}, 0.25);
    CHECK(bias(0, 1) == 0.25);
    // A mean that is not whole: 2 is above 5 / 3.
    update_bias(bias.view(), {2, 1, 2}, 0.25);
    CHECK(bias(0, 0) == 0.25);
    CHECK(bias(0, 1) == 0.5);
    CHECK(bias(0, 2) == -0.5);
  }

  TEST_CASE("what does not fit is refused") {
    matrix<double, cpu> bias(1, 3);
    CHECK(refused([&] { update_bias(bias.view(), {1, 2}, 0.1); }) != "");
    CHECK(refused([&] {
            update_bias(bias.view(), {1, 2, 3}, -1.0);
          }) == "talpa::update_bias: 'rate' is -1, expected >= 0");
  }
}

}  // namespace talpa::expert_bias_test
