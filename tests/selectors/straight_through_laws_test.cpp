// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/selectors/straight_through.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::straight_through_laws_test {

using namespace support;

TEST_SUITE("selectors/straight_through") {
  TEST_CASE_TEMPLATE("straight_through obeys the laws of selectors in training", T, TALPA_SCALARS) {
    // Its gradient stands in for the derivative, which is zero.
    const testing::selector_claims claims{.derivative = false};
    obeys(testing::selector_laws<T>(straight_through{.k = 1}, 1, claims));
    obeys(testing::selector_laws<T>(straight_through{.k = 2}, 8, claims));
    obeys(testing::selector_laws<T>(straight_through{.k = 8}, 8, claims));
    obeys(testing::selector_laws<T>(straight_through{.k = 3}, 70, claims));
  }
  TEST_CASE("straight_through obeys the laws of selectors at inference") {
    const testing::selector_claims claims{.derivative = false};
    obeys(testing::selector_laws<float>(straight_through{.k = 2, .training = false}, 8, claims));
    obeys(testing::selector_laws<double>(straight_through{.k = 3, .training = false}, 33, claims));
  }
}

}  // namespace talpa::straight_through_laws_test
