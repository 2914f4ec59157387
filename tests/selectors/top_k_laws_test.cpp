// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa {

namespace {

template <class Weight, class T>
void laws() {
  for (const index experts : {1, 2, 8, 33, 65, 200}) {
    for (const index k : {1, 2, 5}) {
      CAPTURE(experts);
      CAPTURE(k);
      if (k <= experts) {
        support::obeys(testing::selector_laws<T>(top_k<Weight>{.k = k}, experts));
      }
    }
  }
  support::obeys(testing::selector_laws<T>(top_k<Weight>{.k = 8}, 8));
  support::obeys(testing::selector_laws<T>(top_k<Weight>{.k = 33}, 33));
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
}

}  // namespace talpa
