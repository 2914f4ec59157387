// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/selectors/intervene.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::intervene_laws_test {

TEST_SUITE("selectors/intervene") {
  TEST_CASE_TEMPLATE("laws of intervene", T, TALPA_SCALARS) {
    using changed = intervene<top_k<gate::raw>>;
    const auto laws = [](const changed& selector, index experts) {
      CAPTURE(experts);
      support::obeys(testing::selector_laws<T>(selector, experts, {.permutable = false}));
    };
    laws({.inner = {.k = 1}}, 1);
    laws({.inner = {.k = 1}, .stimulated = {1}}, 2);
    laws({.inner = {.k = 2}, .stimulated = {1, 6}}, 8);
    laws({.inner = {.k = 2}, .stimulated = {0, 32}}, 33);
    laws({.inner = {.k = 3}, .stimulated = {5, 64}}, 65);
  }
  // The law of masked experts leaves token 2, 5, 8... only one: a block of that one would leave the
  // row nothing, which is another law. The sizes avoid that.
  TEST_CASE_TEMPLATE("laws of intervene that blocks", T, TALPA_SCALARS) {
    using changed = intervene<top_k<gate::renormalised>>;
    const auto laws = [](const changed& selector, index experts, index tokens) {
      CAPTURE(experts);
      support::obeys(testing::selector_laws<T>(selector, experts, {.permutable = false}, tokens));
    };
    laws({.inner = {.k = 2}, .blocked = {3}, .stimulated = {1}}, 8, 8);
    laws({.inner = {.k = 2}, .blocked = {0, 31}, .stimulated = {7}}, 33, 37);
    laws({.inner = {.k = 2}, .blocked = {0, 64}, .stimulated = {63}}, 65, 37);
  }
}

}  // namespace talpa::intervene_laws_test
