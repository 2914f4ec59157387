// SPDX-License-Identifier: Apache-2.0
#include "support/selection.hpp"

#include <talpa/selectors/biased_top_k.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_biased_top_k_test {
using support::all_differences;

TEST_SUITE("cuda_policies/biased_top_k") {
  TEST_CASE("biased_top_k has the bits of the host, in groups of experts too") {
    CHECK(all_differences(biased_top_k<>{.k = 1}) == "");
    CHECK(all_differences(biased_top_k<>{.k = 3, .n_groups = 4, .topk_groups = 2, .scale = 2.5},
                          8) == "");
    CHECK(all_differences(biased_top_k<score::softmax, gate::raw>{.k = 1, .group_best = 1}) == "");
  }
}

}  // namespace talpa::cuda_biased_top_k_test
