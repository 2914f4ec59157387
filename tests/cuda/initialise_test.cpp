// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"

#include <talpa/experts/mixed_rank_lora.hpp>
#include <talpa/scorers/cosine_scorer.hpp>
#include <talpa/scorers/mlp_scorer.hpp>

#include <doctest/doctest.h>

#include <utility>
#include <vector>

namespace talpa::cuda_initialise_test {

namespace {

using support::device;

/// The values of all parameters, in order.
template <class Params>
std::vector<matrix<float, cpu>> values_of(Params params) {
  std::vector<matrix<float, cpu>> all;
  params.visit([&](const auto& p) { all.push_back(to_host(std::as_const(p).value())); });
  return all;
}

void check_same(const std::vector<matrix<float, cpu>>& found,
                const std::vector<matrix<float, cpu>>& expected) {
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    CHECK(support::bit_difference(found[i], expected[i]) == "");
  }
}

}  // namespace

// No op of a device runs here: what is set number by number is set on the host and copied.
TEST_SUITE("cuda/initialise") {
  TEST_CASE("a scorer with biases begins with the numbers of the host") {
    const mlp_scorer<> scorer{.hidden = 5, .hidden_bias = true, .bias = true, .initial_bias = -2.5};
    generator on_host(1), on_device(1);
    check_same(values_of(scorer.init<float, device>(7, 3, on_device, "s.")),
               values_of(scorer.init<float, cpu>(7, 3, on_host, "s.")));
  }

  TEST_CASE("a scorer with a learned temperature begins with the numbers of the host") {
    const cosine_scorer scorer{.temperature = 0.3, .learned = true};
    generator on_host(2), on_device(2);
    check_same(values_of(scorer.init<float, device>(7, 3, on_device, "s.")),
               values_of(scorer.init<float, cpu>(7, 3, on_host, "s.")));
  }

  TEST_CASE("experts of several ranks begin with the numbers of the host") {
    const mixed_rank_lora expert{.ranks = {1, 4, 2}};
    generator on_host(3), on_device(3);
    auto found = expert.init<float, device>(7, 5, 3, on_device, "e.");
    auto expected = expert.init<float, cpu>(7, 5, 3, on_host, "e.");
    CHECK(support::bit_difference(to_host(as_column(found.blocks.view())),
                                  to_host(as_column(expected.blocks.view()))) == "");
    CHECK(support::bit_difference(to_host(as_column(found.scales.view())),
                                  to_host(as_column(expected.scales.view()))) == "");
    const index last[] = {2};
    expert.train_experts(found, last);
    CHECK(found.a.trained_size() == 2 * 7);
    check_same(values_of(std::move(found)), values_of(std::move(expected)));
  }
}

}  // namespace talpa::cuda_initialise_test
