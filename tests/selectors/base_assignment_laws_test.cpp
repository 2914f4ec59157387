// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/cpu/assign_balanced.hpp>
#include <talpa/selectors/base_assignment.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::base_assignment_laws_test {

namespace {

template <class T>
void laws() {
  for (const index experts : {1, 2, 8, 33, 65}) {
    CAPTURE(experts);
    // The sigmoid of one logit is not a softmax. Logits of the laws lie on a grid, so assignments
    // of equal sum are common, and which one is found depends on the order of the experts.
    support::obeys(testing::selector_laws<T>(
        base_assignment{}, experts,
        {.shift_invariant = false, .permutable = false, .min_selected = 0}));
    support::obeys(testing::selector_laws<T>(base_assignment{}.at(mode::inference), experts,
                                             {.shift_invariant = false}));
  }
}

}  // namespace

TEST_SUITE("selectors/base_assignment") {
  TEST_CASE("laws of base_assignment in float") { laws<float>(); }
  TEST_CASE("laws of base_assignment in double") { laws<double>(); }
}

}  // namespace talpa::base_assignment_laws_test
