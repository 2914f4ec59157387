// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/selectors/dynamic_entropy.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::dynamic_entropy_laws_test {

namespace {

template <class Selector, class T>
void laws(const Selector& selector) {
  for (const index experts : {1, 2, 8, 33, 65}) {
    CAPTURE(experts);
    support::obeys(testing::selector_laws<T>(selector, experts));
  }
}

}  // namespace

TEST_SUITE("selectors/dynamic_entropy") {
  TEST_CASE_TEMPLATE("laws of dynamic_entropy", T, TALPA_SCALARS) {
    laws<dynamic_entropy<>, T>({});
  }
  // Weights in double are top_k's business.
  TEST_CASE("laws of dynamic_entropy with other entropies and weights") {
    laws<dynamic_entropy<entropy::shannon, gate::renormalised>, float>({.threshold = 0.7});
    laws<dynamic_entropy<entropy::renyi, gate::softmax_selected>, float>({.threshold = 0.5});
  }
}

}  // namespace talpa::dynamic_entropy_laws_test
