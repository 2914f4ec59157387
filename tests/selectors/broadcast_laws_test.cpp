// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/selectors/top_p.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::broadcast_laws_test {

namespace {

template <class Selector, class T>
void laws(const Selector& selector) {
  for (const index experts : {2, 8, 33, 65}) {
    CAPTURE(experts);
    support::obeys(testing::selector_laws<T>(selector, experts));
  }
}

}  // namespace

TEST_SUITE("selectors/broadcast") {
  TEST_CASE_TEMPLATE("laws of broadcast round a selector of rows", T, TALPA_SCALARS) {
    laws<broadcast<top_k<gate::raw>>, T>({.inner = {.k = 2}, .threshold = 0.7});
    support::obeys(testing::selector_laws<T>(broadcast<top_k<gate::raw>>{.inner = {.k = 1}}, 1));
  }
  // Weights in double are top_k's business.
  TEST_CASE("laws of broadcast round other selectors") {
    laws<broadcast<top_k<gate::softmax_selected>>, float>({.inner = {.k = 2}, .threshold = 0.8});
    laws<broadcast<top_p<gate::renormalised>, entropy::tsallis>, float>({.threshold = 0.6});
  }
  TEST_CASE_TEMPLATE("laws of broadcast that is off", T, TALPA_SCALARS) {
    laws<broadcast<top_k<gate::raw>>, T>(
        {.inner = {.k = 2}, .threshold = 0.0, .broadcasting = false});
  }
}

}  // namespace talpa::broadcast_laws_test
