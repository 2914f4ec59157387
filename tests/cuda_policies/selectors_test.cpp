// SPDX-License-Identifier: Apache-2.0
#include "support/selection.hpp"

#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/rectified.hpp>
#include <talpa/selectors/straight_through.hpp>
#include <talpa/selectors/threshold.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_selectors_test {
using support::all_differences;

TEST_SUITE("cuda_policies/selectors") {
  TEST_CASE("dense, rectified and threshold have the bits of the host") {
    CHECK(all_differences(dense{}) == "");
    CHECK(all_differences(rectified{}) == "");
    CHECK(all_differences(threshold<gate::renormalised>{0.2}) == "");
  }

  TEST_CASE("straight_through has the bits of the host in either mode") {
    CHECK(all_differences(straight_through{1}) == "");
    CHECK(all_differences(straight_through{1}.at(mode::inference)) == "");
  }
}

}  // namespace talpa::cuda_selectors_test
