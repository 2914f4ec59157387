// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/losses/localized_balance.hpp>
#include <talpa/testing/loss_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <type_traits>
#include <vector>

namespace talpa::localized_balance_laws_test {

using namespace support;

namespace {

/// Numbers of experts; gradients are checked in double whatever T is, so float needs few.
template <class T>
std::vector<index> sizes() {
  if (std::is_same_v<T, float>) return {1, 33};
  return {1, 2, 8, 33};
}

/// Claims with that value at balance. A row passes through softmax, logarithms and sums of its own:
/// some 32 times the roundings of a plain sum over tokens and experts.
testing::loss_claims claims(double at_balance) {
  testing::loss_claims c;
  c.at_balance = at_balance;
  c.amplification = 32.0;
  return c;
}

}  // namespace

TEST_SUITE("losses/localized_balance") {
  TEST_CASE_TEMPLATE("localized_balance obeys the laws of losses", T, TALPA_SCALARS) {
    for (const index experts : sizes<T>()) {
      CAPTURE(experts);
      testing::loss_claims c = claims(std::nan(""));
      // Twice the sequences is another number less one.
      c.duplication_invariant = false;
      // A sum of squares over experts over a squared mean.
      c.amplification = 32.0 * static_cast<double>(experts);
      obeys(testing::loss_laws<T>(localized_balance{.delta = 0.25}, experts, c));
      c.at_balance = 0.0;
      obeys(testing::loss_laws<T>(localized_balance{.delta = 0.0}, experts, c));
    }
  }
}

}  // namespace talpa::localized_balance_laws_test
