// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/selectors/biased_top_k.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <concepts>

namespace talpa::biased_top_k_laws_test {

namespace {

template <class T, class Selector>
void laws(Selector selector, const testing::selector_claims& claims) {
  const index wanted = selector.k;
  for (const index experts : {1, 2, 8, 33, 65}) {
    CAPTURE(experts);
    selector.k = std::min(wanted, experts);
    support::obeys(testing::selector_laws<T>(selector, experts, claims));
  }
}

}  // namespace

TEST_SUITE("selectors/biased_top_k") {
  // Gates are at most `scale`, and so are their derivatives.
  TEST_CASE_TEMPLATE("laws of biased_top_k by sigmoid", T, TALPA_SCALARS) {
    laws<T>(biased_top_k<>{.k = 2, .scale = 2.5},
            {.shift_invariant = false, .gate_floor = 1.0, .slope = 2.5});
    laws<T>(biased_top_k<score::sigmoid, gate::raw>{.k = 3},
            {.shift_invariant = false, .gate_floor = 1.0});
  }
  TEST_CASE_TEMPLATE("laws of biased_top_k by softmax", T, TALPA_SCALARS) {
    laws<T>(biased_top_k<score::softmax, gate::raw>{.k = 2}, {});
    if (std::same_as<T, double>) return;  // weights in double are top_k's business
    laws<float>(biased_top_k<score::softmax>{.k = 3}, {});
  }
  // Groups are neighbours, so permuting experts changes them.
  TEST_CASE_TEMPLATE("laws of biased_top_k with groups", T, TALPA_SCALARS) {
    for (const index experts : {4, 8, 32, 64}) {
      CAPTURE(experts);
      support::obeys(testing::selector_laws<T>(
          biased_top_k<>{.k = 2, .n_groups = 4, .topk_groups = 2}, experts,
          {.shift_invariant = false, .permutable = false, .gate_floor = 1.0}));
    }
  }
}

}  // namespace talpa::biased_top_k_laws_test
