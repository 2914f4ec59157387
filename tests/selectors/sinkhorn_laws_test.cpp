// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/cpu/sinkhorn.hpp>
#include <talpa/selectors/sinkhorn.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::sinkhorn_laws_test {

namespace {

template <class T>
void laws() {
  struct sizes {
    index experts, k;
  };
  for (const sizes s : {sizes{1, 1}, sizes{2, 1}, sizes{8, 1}, sizes{8, 2}, sizes{8, 8},
                        sizes{33, 5}, sizes{65, 1}, sizes{65, 2}}) {
    CAPTURE(s.experts);
    CAPTURE(s.k);
    // The sigmoid of one logit is not a softmax.
    const testing::selector_claims claims{.shift_invariant = s.k > 1};
    support::obeys(testing::selector_laws<T>(sinkhorn{.k = s.k}, s.experts, claims));
    support::obeys(
        testing::selector_laws<T>(sinkhorn{.k = s.k}.at(mode::inference), s.experts, claims));
  }
}

}  // namespace

TEST_SUITE("selectors/sinkhorn") {
  TEST_CASE("laws of sinkhorn in float") { laws<float>(); }
  TEST_CASE("laws of sinkhorn in double") { laws<double>(); }
}

}  // namespace talpa::sinkhorn_laws_test
