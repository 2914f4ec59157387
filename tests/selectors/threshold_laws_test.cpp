// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/learned_threshold.hpp>
#include <talpa/selectors/threshold.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <concepts>

namespace talpa::threshold_laws_test {

namespace {

template <class T, class Selector>
void laws(const Selector& selector, const testing::selector_claims& claims) {
  for (const index experts : {1, 2, 8, 33, 65}) {
    CAPTURE(experts);
    support::obeys(testing::selector_laws<T>(selector, experts, claims));
  }
}

}  // namespace

TEST_SUITE("selectors/threshold") {
  TEST_CASE_TEMPLATE("laws of threshold", T, TALPA_SCALARS) {
    laws<T>(threshold<gate::raw>{.least = 0.02}, {.min_selected = 0});
    if (std::same_as<T, double>) return;  // weights in double are top_k's business
    laws<float>(threshold<gate::renormalised>{.least = 0.3}, {.min_selected = 0});
  }
  // The control is at most 2, so the threshold at most 0.881 / E, and the largest p at least 1 / E:
  // the sum of margins is at least 0.119 p and divides errors and slopes by that, 8.4 each time.
  TEST_CASE_TEMPLATE("laws of learned_threshold", T, TALPA_SCALARS) {
    laws<T>(learned_threshold<linear_scorer>{},
            {.amplification = 8.4, .gate_floor = 1.0, .slope = 8.4});
    laws<T>(learned_threshold<linear_scorer>{.relative = 0.25}, {.gate_floor = 1.0});
  }
}

}  // namespace talpa::threshold_laws_test
