// SPDX-License-Identifier: Apache-2.0
#include "support/selection.hpp"

#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/sinkhorn.hpp>
#include <talpa/cuda/assign_balanced.hpp>
#include <talpa/cuda/limit_experts.hpp>
#include <talpa/cuda/sinkhorn.hpp>
#include <talpa/selectors/base_assignment.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/expert_choice.hpp>
#include <talpa/selectors/sinkhorn.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_coupled_selectors_test {

namespace {

using dropped_by_probability = capacity_top_k<gate::renormalised, overflow::by_probability>;
using switch_capacity =
    capacity_top_k<gate::raw, overflow::by_position, capacity::fixed, capacity::per_sequence>;

}  // namespace

TEST_SUITE("cuda/coupled_selectors") {
  TEST_CASE("capacity_top_k has the bits of the host") {
    for (const index tokens : {index{0}, index{1}, support::device_size(60, 3000)}) {
      CAPTURE(tokens);
      CHECK(support::selection_difference<float>(dropped_by_probability{2, {0.7}}, tokens, 5) ==
            "");
    }
    CHECK(support::selection_difference<float>(dropped_by_probability{3, {0.9}},
                                               support::device_size(20, 900), 40) == "");
  }

  TEST_CASE("capacity of each sequence has the bits of the host") {
    const index length = support::device_size(15, 600);
    CHECK(support::selection_difference<float>(switch_capacity{1, {2}}, 3 * length, 4, length) ==
          "");
    CHECK(support::selection_difference<float>(switch_capacity{1, {length}}, 3 * length, 4) == "");
  }

  TEST_CASE("expert_choice has the bits of the host") {
    for (const index tokens : {index{0}, index{1}, support::device_size(60, 3000)}) {
      CAPTURE(tokens);
      CHECK(support::selection_difference<float>(expert_choice{1.3}, tokens, 5) == "");
    }
    CHECK(support::selection_difference<float>(expert_choice{100.0}, 20, 5) == "");
    CHECK(support::selection_difference<float>(expert_choice{2.0}, support::device_size(20, 900),
                                               40) == "");
  }

  TEST_CASE("sinkhorn has the bits of the host, in one block of tokens and in several") {
    const index tokens = support::device_size(30, 3000);
    CHECK(support::selection_difference<float>(sinkhorn{1, 1e-2, 2}, 0, 5) == "");
    CHECK(support::selection_difference<float>(sinkhorn{1, 1e-2, 2}, 1, 5) == "");
    CHECK(support::selection_difference<float>(sinkhorn{1, 1e-2, 3}, tokens, 5) == "");
    CHECK(support::selection_difference<float>(sinkhorn{2, 1e-4, 2}, tokens, 5) == "");
    CHECK(support::selection_difference<float>(sinkhorn{2}.at(mode::inference), tokens, 5) == "");
    CHECK(support::selection_difference<float>(sinkhorn{3, 1e-2, 2}, 10, 40) == "");
    CHECK(support::selection_difference<float>(sinkhorn{1, 1e-2, 2}, 300, 4) == "");
  }

  TEST_CASE("base_assignment has the bits of the host") {
    for (const index tokens : {index{0}, index{1}, support::device_size(17, 700)}) {
      CAPTURE(tokens);
      CHECK(support::selection_difference<float>(base_assignment{}, tokens, 5) == "");
      CHECK(support::selection_difference<float>(base_assignment{}.at(mode::inference), tokens,
                                                 5) == "");
    }
    CHECK(support::selection_difference<float>(base_assignment{}, support::device_size(9, 300),
                                               40) == "");
  }
}

}  // namespace talpa::cuda_coupled_selectors_test
