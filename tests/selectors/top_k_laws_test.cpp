// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/sanitized.hpp"

#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::top_k_laws_test {

namespace {

/// One expert, few, k = E, and both sides of one and of two words of the mask.
template <class Weight, class T>
void laws(const testing::selector_claims& claims = {}) {
  struct sizes {
    index experts, k;
  };
  for (const sizes s : {sizes{1, 1}, sizes{2, 1}, sizes{8, 2}, sizes{8, 8}, sizes{33, 5},
                        sizes{65, 2}, sizes{200, 3}}) {
    if (support::sanitized && s.experts > 33) continue;
    CAPTURE(s.experts);
    CAPTURE(s.k);
    support::obeys(testing::selector_laws<T>(top_k<Weight>{.k = s.k}, s.experts, claims));
  }
}

}  // namespace

TEST_SUITE("selectors/top_k") {
  TEST_CASE("laws of top_k with raw gates") {
    laws<gate::raw, float>();
    laws<gate::raw, double>();
  }
  TEST_CASE("laws of top_k with renormalised gates") {
    laws<gate::renormalised, float>();
    laws<gate::renormalised, double>();
  }
  TEST_CASE("laws of top_k with softmax over the selected") {
    laws<gate::softmax_selected, float>();
    laws<gate::softmax_selected, double>();
  }
  TEST_CASE("laws of top_k with hard gates") {
    laws<gate::hard, float>({.constant_gates = true});
    laws<gate::hard, double>({.constant_gates = true});
  }
}

}  // namespace talpa::top_k_laws_test
