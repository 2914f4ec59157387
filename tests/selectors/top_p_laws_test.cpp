// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/selectors/top_p.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::top_p_laws_test {

namespace {

template <class Selector, class T>
void laws(const Selector& selector) {
  for (const index experts : {1, 2, 8, 33, 65}) {
    CAPTURE(experts);
    support::obeys(testing::selector_laws<T>(selector, experts));
  }
}

}  // namespace

TEST_SUITE("selectors/top_p") {
  TEST_CASE_TEMPLATE("laws of top_p", T, TALPA_SCALARS) {
    laws<top_p<gate::raw>, T>({.p = 0.7});
    laws<top_p<gate::raw, crossing::dropped>, T>({.p = 0.75, .min_k = 2});
  }
  // Weights in double are top_k's business.
  TEST_CASE("laws of top_p with other weights") {
    laws<top_p<gate::renormalised>, float>({.p = 0.9, .inclusive = true});
    laws<top_p<gate::softmax_selected>, float>({.p = 0.3, .min_k = 2});
    laws<top_p<gate::renormalised, crossing::dropped>, float>({.p = 0.9, .min_k = 2});
    laws<top_p<gate::softmax_selected, crossing::dropped>, float>({.p = 1.0});
  }
}

}  // namespace talpa::top_p_laws_test
