// SPDX-License-Identifier: Apache-2.0
#include "support/selection.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cuda/limit_experts.hpp>
#include <talpa/selectors/expert_choice.hpp>
#include <talpa/selectors/intervene.hpp>
#include <talpa/selectors/top_k.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_intervene_test {
using support::selection_difference;

namespace {

using inner = top_k<gate::renormalised>;

}  // namespace

TEST_SUITE("cuda_policies/intervene") {
  TEST_CASE("intervene has the bits of the host, round rows and round columns") {
    const index tokens = support::device_size(29, 1000);
    const intervene<inner> rows{{2}, {1}, {0, 4}};
    CHECK(selection_difference<float>(rows, tokens, 8) == "");
    CHECK(selection_difference<float>(rows, tokens, 40) == "");
    const intervene<expert_choice> columns{{1.3}, {1}, {0, 4}};
    CHECK(selection_difference<float>(columns, tokens, 8) == "");
    CHECK(selection_difference<float>(columns, 0, 8) == "");
  }
}

}  // namespace talpa::cuda_intervene_test
