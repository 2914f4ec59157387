// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/cpu/overlay_rows.hpp>
#include <talpa/selectors/broadcast.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::broadcast_coupled_laws_test {

namespace {

template <class Selector, class T>
void laws(const Selector& selector, const testing::selector_claims& claims = {}) {
  for (const index experts : {2, 8, 33, 65}) {
    CAPTURE(experts);
    support::obeys(testing::selector_laws<T>(selector, experts, claims));
  }
}

}  // namespace

TEST_SUITE("selectors/broadcast") {
  TEST_CASE_TEMPLATE("laws of broadcast with few slots", T, TALPA_SCALARS) {
    using limited = broadcast<top_k<gate::raw>, entropy::shannon, slots::per_sequence>;
    laws<limited, T>({.inner = {.k = 2}, .threshold = 0.7, .slots = {.most = 5}});
    support::obeys(testing::selector_laws<T>(limited{.inner = {.k = 1}}, 1));
  }
  TEST_CASE("laws of broadcast round a selector that couples rows") {
    laws<broadcast<capacity_top_k<gate::raw>>, float>({.inner = {.k = 1}, .threshold = 0.7},
                                                      {.min_selected = 0});
    laws<broadcast<capacity_top_k<gate::raw>, entropy::shannon, slots::per_sequence>, double>(
        {.inner = {.k = 2}, .threshold = 0.7}, {.min_selected = 0});
  }
}

}  // namespace talpa::broadcast_coupled_laws_test
