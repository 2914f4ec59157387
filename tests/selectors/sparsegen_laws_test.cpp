// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/sparsegen.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::sparsegen_laws_test {

namespace {

template <class T, class Selector>
void laws(const Selector& selector, double slope, index fewest = 1) {
  // Gates are differences of numbers of size one: (u - tau) / (1 - lambda).
  const testing::selector_claims claims{.gate_floor = 1.0, .slope = slope};
  for (const index experts : {1, 2, 8, 33, 65}) {
    if (experts < fewest) continue;
    CAPTURE(experts);
    support::obeys(testing::selector_laws<T>(selector, experts, claims));
  }
}

}  // namespace

TEST_SUITE("selectors/sparsegen") {
  TEST_CASE_TEMPLATE("laws of fixed_sparsegen", T, TALPA_SCALARS) {
    laws<T>(fixed_sparsegen{}, 1.0);
    laws<T>(fixed_sparsegen{.lambda = -2.0}, 1.0);
    // Two experts lie too far apart to share: the gates are constant.
    laws<T>(fixed_sparsegen{.lambda = 0.75}, 4.0, 8);
  }
  // A control of at most 2 leaves 1 - lambda at least softplus(-2) = 0.127.
  TEST_CASE_TEMPLATE("laws of sparsegen", T, TALPA_SCALARS) {
    laws<T>(sparsegen<linear_scorer>{}, 1.0 / 0.127);
  }
}

}  // namespace talpa::sparsegen_laws_test
