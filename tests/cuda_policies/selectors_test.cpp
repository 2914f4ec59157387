// SPDX-License-Identifier: Apache-2.0
#include "support/selection.hpp"

#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/biased_top_k.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/learned_threshold.hpp>
#include <talpa/selectors/rectified.hpp>
#include <talpa/selectors/sparsegen.hpp>
#include <talpa/selectors/straight_through.hpp>
#include <talpa/selectors/threshold.hpp>

#include <doctest/doctest.h>

#include <string>

namespace talpa::cuda_selectors_test {

namespace {

/// Few experts, one, more than a word of a mask holds, no tokens; and gates of a given mask.
template <class Selector>
std::string difference(const Selector& selector, index least_experts = 1) {
  const index tokens = support::device_size(29, 1000);
  std::string text = support::selection_difference<float>(selector, tokens, 8) +
                     support::selection_difference<float>(selector, tokens, 40) +
                     support::selection_difference<float>(selector, 0, 8) +
                     support::replay_difference<float>(selector, tokens, 8);
  if (least_experts == 1) text += support::selection_difference<float>(selector, tokens, 1);
  return text;
}

}  // namespace

TEST_SUITE("cuda_policies/selectors") {
  TEST_CASE("dense, rectified and threshold have the bits of the host") {
    CHECK(difference(dense{}) == "");
    CHECK(difference(rectified{}) == "");
    CHECK(difference(threshold<gate::renormalised>{0.2}) == "");
  }

  TEST_CASE("learned_threshold and sparsegen have the bits of the host, for any control") {
    CHECK(difference(learned_threshold<linear_scorer>{}) == "");
    CHECK(difference(sparsegen<linear_scorer>{}) == "");
    CHECK(difference(fixed_sparsegen{0.5}) == "");
  }

  TEST_CASE("biased_top_k has the bits of the host, in groups of experts too") {
    CHECK(difference(biased_top_k<>{.k = 1}) == "");
    CHECK(difference(biased_top_k<>{.k = 3, .n_groups = 4, .topk_groups = 2, .scale = 2.5}, 8) ==
          "");
    CHECK(difference(biased_top_k<score::softmax, gate::raw>{.k = 1, .group_best = 1}) == "");
  }

  TEST_CASE("straight_through has the bits of the host in either mode") {
    CHECK(difference(straight_through{1}) == "");
    CHECK(difference(straight_through{1}.at(mode::inference)) == "");
  }
}

}  // namespace talpa::cuda_selectors_test
