// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/experts/adapted_glu.hpp>
#include <talpa/experts/glu_ffn.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/testing/expert_laws.hpp>

#include <doctest/doctest.h>

#include <concepts>

namespace talpa::adapted_glu_test {

namespace {

using adapted = adapted_glu<swiglu, lora>;
static_assert(expert_policy<adapted> && !rank_space_expert<adapted>);

/// The same without train_experts, which freezes the networks: the laws train parts of everything.
struct all_train : adapted {
  template <class T, class B>
  void train_experts(params<T, B>&, std::span<const index>) const = delete;
};

}  // namespace

TEST_SUITE("experts/adapted_glu") {
  TEST_CASE_TEMPLATE("laws of adapted_glu", T, TALPA_SCALARS) {
    const testing::expert_claims claims{.fresh_is_zero = false, .amplification = 16.0};
    const auto check = [&](const adapted& expert, const testing::expert_sizes& sizes) {
      support::obeys(testing::expert_laws<T>(all_train{expert}, claims, sizes));
    };
    check({.network = {.hidden = 4}, .adapter = {.rank = 2, .alpha = 3.0}}, {});
    check({.network = {.hidden = 1}, .adapter = {.rank = 1}},
          {.tokens = 5, .inputs = 1, .outputs = 1, .experts = 1});
    if (std::same_as<T, double>) return;  // gradients are in double either way
    check({.network = {.hidden = 2}, .adapter = {.rank = 1, .alpha = -0.5}},
          {.tokens = 9, .inputs = 2, .outputs = 3, .experts = 33});
  }

  TEST_CASE("adapters of chosen experts train, and nothing else has gradient storage") {
    const adapted expert{.network = {.hidden = 3}, .adapter = {.rank = 2}};
    generator random(1);
    auto p = expert.init<float, cpu>(5, 4, 6, random, "");
    const index chosen[] = {0, 5};
    expert.train_experts(p, chosen);
    index trained = 0;
    p.visit([&](const parameter<float, cpu>& q) { trained += q.trained_size(); });
    CHECK(trained == 2 * 2 * ((5 + 3) + (5 + 3) + (3 + 4)));
    p.network.visit([](const parameter<float, cpu>& q) { CHECK(q.grad().size() == 0); });
    const index unknown[] = {6};
    CHECK_THROWS_WITH_AS(
        expert.train_experts(p, unknown),
        "talpa::parameter::train_blocks: 'blocks' is 6, expected 0..5 = blocks of the parameter",
        value_error);
  }

  TEST_CASE("ranges are those of the parts") {
    CHECK_THROWS_WITH_AS((adapted{.network = {.hidden = 0}}.validate()),
                         "talpa::glu_ffn: 'hidden' is 0, expected >= 1 = neurons of one expert",
                         value_error);
    CHECK_THROWS_WITH_AS((adapted{.network = {.hidden = 2}, .adapter = {.rank = 0}}.validate()),
                         "talpa::lora: 'rank' is 0, expected >= 1 = width of the adapter",
                         value_error);
  }
}

}  // namespace talpa::adapted_glu_test
