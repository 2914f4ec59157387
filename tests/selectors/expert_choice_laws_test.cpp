// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/cpu/limit_experts.hpp>
#include <talpa/selectors/expert_choice.hpp>
#include <talpa/testing/selector_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::expert_choice_laws_test {

namespace {

template <class T>
void laws() {
  for (const index experts : {1, 2, 8, 33, 65}) {
    CAPTURE(experts);
    for (const double factor : {1.0, 2.5}) {
      support::obeys(
          testing::selector_laws<T>(expert_choice{.factor = factor}, experts, {.min_selected = 0}));
    }
  }
}

}  // namespace

TEST_SUITE("selectors/expert_choice") {
  TEST_CASE("laws of expert_choice") {
    laws<float>();
    laws<double>();
  }
}

}  // namespace talpa::expert_choice_laws_test
