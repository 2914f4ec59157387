// SPDX-License-Identifier: Apache-2.0
#include "experts/networks.hpp"

#include <talpa/experts/parallel_adapter.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <concepts>

namespace talpa::parallel_adapter_test {

using namespace support;

TEST_SUITE("experts/parallel_adapter") {
  TEST_CASE_TEMPLATE("laws of parallel_adapter", T, float, double) {
    obeys(testing::expert_laws<T>(parallel_adapter<>{.rank = 3}, adapter));
    obeys(testing::expert_laws<T>(parallel_adapter<>{.rank = 1, .scale = -0.5}, adapter, one));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    obeys(testing::expert_laws<float>(
        parallel_adapter<tanh>{.rank = 2, .scale = 4.0, .init_factors = adapter_init::perft},
        network, many));
  }
  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(
        parallel_adapter<>{.rank = 0}.validate(),
        "talpa::parallel_adapter: 'rank' is 0, expected >= 1 = width of the bottleneck",
        value_error);
    CHECK_THROWS_WITH_AS(parallel_adapter<>{.scale = INFINITY}.validate(),
                         "talpa::parallel_adapter: 'scale' is inf, expected a finite number",
                         value_error);
  }
}

}  // namespace talpa::parallel_adapter_test
