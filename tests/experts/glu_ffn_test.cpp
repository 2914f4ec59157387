// SPDX-License-Identifier: Apache-2.0
#include "experts/networks.hpp"
#include "support/scalars.hpp"

#include <talpa/experts/glu_ffn.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <concepts>

namespace talpa::glu_ffn_test {

using namespace support;

TEST_SUITE("experts/glu_ffn") {
  TEST_CASE_TEMPLATE("laws of glu_ffn", T, TALPA_SCALARS) {
    obeys(testing::expert_laws<T>(swiglu{.hidden = 4}, network));
    obeys(testing::expert_laws<T>(swiglu{.hidden = 1}, network, one));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    obeys(testing::expert_laws<float>(glu_ffn<gelu_tanh>{.hidden = 2}, network, many));
  }
  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(swiglu{}.validate(),
                         "talpa::glu_ffn: 'hidden' is 0, expected >= 1 = neurons of one expert",
                         value_error);
  }
}

}  // namespace talpa::glu_ffn_test
