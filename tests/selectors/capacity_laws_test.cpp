// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/selectors/capacity.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::capacity_laws_test {

namespace {

/// Every selection of a token may be dropped.
constexpr testing::selector_claims may_be_empty{.min_selected = 0};

/// `one`: experts per token in the smallest sizes. A single gate that sums to one has no gradient,
/// which would prove nothing.
template <class Selector, class T>
void laws(index one) {
  struct sizes {
    index experts, k;
  };
  for (const sizes s :
       {sizes{1, 1}, sizes{2, one}, sizes{8, 2}, sizes{8, 8}, sizes{33, 5}, sizes{65, 2}}) {
    CAPTURE(s.experts);
    CAPTURE(s.k);
    support::obeys(testing::selector_laws<T>(Selector{.k = s.k}, s.experts, may_be_empty));
  }
}

}  // namespace

TEST_SUITE("selectors/capacity") {
  TEST_CASE("laws of capacity_top_k with raw gates, by position") {
    laws<capacity_top_k<gate::raw>, float>(1);
  }
  TEST_CASE("laws of capacity_top_k with renormalised gates, by probability") {
    laws<capacity_top_k<gate::renormalised, overflow::by_probability>, float>(2);
    laws<capacity_top_k<gate::renormalised, overflow::by_probability>, double>(2);
  }
  TEST_CASE("laws of capacity_top_k with softmax over the selected, by position") {
    laws<capacity_top_k<gate::softmax_selected>, float>(2);  // in double top_k's business
  }
}

}  // namespace talpa::capacity_laws_test
