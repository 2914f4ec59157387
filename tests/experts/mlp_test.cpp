// SPDX-License-Identifier: Apache-2.0
#include "experts/networks.hpp"
#include "support/scalars.hpp"

#include <talpa/experts/mlp.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <concepts>

namespace talpa::mlp_test {

using namespace support;

TEST_SUITE("experts/mlp") {
  TEST_CASE_TEMPLATE("laws of mlp", T, TALPA_SCALARS) {
    obeys(testing::expert_laws<T>(mlp<tanh>{.hidden = 4, .bias = true}, network));
    obeys(testing::expert_laws<T>(mlp<silu>{.hidden = 1}, network, one));
    obeys(testing::expert_laws<T>(mlp<gelu_tanh>{.hidden = 2, .bias = true}, network, many));
  }
  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(mlp<>{}.validate(),
                         "talpa::mlp: 'hidden' is 0, expected >= 1 = neurons of one expert",
                         value_error);
  }
}

}  // namespace talpa::mlp_test
