// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/experts/mlp.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/experts/swiglu.hpp>
#include <talpa/testing/expert_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <concepts>

namespace talpa {

namespace {

/// Networks begin with weights that do something.
constexpr testing::expert_claims network{.fresh_is_zero = false, .amplification = 8.0};
constexpr testing::expert_claims adapter{.fresh_is_zero = true, .amplification = 8.0};

constexpr testing::expert_sizes one{.tokens = 5, .inputs = 1, .outputs = 1, .experts = 1};
constexpr testing::expert_sizes many{.tokens = 9, .inputs = 2, .outputs = 3, .experts = 33};

}  // namespace

TEST_SUITE("experts/parallel_adapter") {
  TEST_CASE_TEMPLATE("laws of parallel_adapter", T, float, double) {
    support::obeys(testing::expert_laws<T>(parallel_adapter<>{.rank = 3}, adapter));
    support::obeys(
        testing::expert_laws<T>(parallel_adapter<>{.rank = 1, .scale = -0.5}, adapter, one));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    support::obeys(testing::expert_laws<float>(
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

TEST_SUITE("experts/glu_ffn") {
  TEST_CASE_TEMPLATE("laws of glu_ffn", T, float, double) {
    support::obeys(testing::expert_laws<T>(swiglu{.hidden = 4}, network));
    support::obeys(testing::expert_laws<T>(swiglu{.hidden = 1}, network, one));
    if (std::same_as<T, double>) return;  // gradients are in double either way
    support::obeys(testing::expert_laws<float>(glu_ffn<gelu_tanh>{.hidden = 2}, network, many));
  }
  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(swiglu{}.validate(),
                         "talpa::glu_ffn: 'hidden' is 0, expected >= 1 = neurons of one expert",
                         value_error);
  }
}

TEST_SUITE("experts/mlp") {
  TEST_CASE_TEMPLATE("laws of mlp", T, float, double) {
    support::obeys(testing::expert_laws<T>(mlp<tanh>{.hidden = 4, .bias = true}, network));
    support::obeys(testing::expert_laws<T>(mlp<silu>{.hidden = 1}, network, one));
    support::obeys(
        testing::expert_laws<T>(mlp<gelu_tanh>{.hidden = 2, .bias = true}, network, many));
  }
  TEST_CASE("ranges") {
    CHECK_THROWS_WITH_AS(mlp<>{}.validate(),
                         "talpa::mlp: 'hidden' is 0, expected >= 1 = neurons of one expert",
                         value_error);
  }
}

}  // namespace talpa
