// SPDX-License-Identifier: Apache-2.0
#include "support/selection.hpp"

#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/learned_threshold.hpp>
#include <talpa/selectors/sparsegen.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_controlled_selectors_test {
using support::all_differences;

TEST_SUITE("cuda_policies/controlled_selectors") {
  TEST_CASE("learned_threshold and sparsegen have the bits of the host, for any control") {
    CHECK(all_differences(learned_threshold<linear_scorer>{}) == "");
    CHECK(all_differences(sparsegen<linear_scorer>{}) == "");
    CHECK(all_differences(fixed_sparsegen{0.5}) == "");
  }
}

}  // namespace talpa::cuda_controlled_selectors_test
