// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/losses/load_balance.hpp>
#include <talpa/testing/loss_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <type_traits>
#include <vector>

namespace talpa::load_balance_affinity_laws_test {

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

TEST_SUITE("losses/load_balance") {
  TEST_CASE_TEMPLATE("load_balance of every affinity obeys the laws of losses", T, TALPA_SCALARS) {
    for (const index experts : sizes<T>()) {
      CAPTURE(experts);
      testing::loss_claims c = claims(1.0);
      obeys(testing::loss_laws<T>(
          load_balance<balance::per_target, balance::per_layer, affinity::gates>{}, experts, c));
      obeys(testing::loss_laws<T>(
          load_balance<balance::soft_mass, balance::pooled, affinity::gates>{}, experts, c));
      obeys(testing::loss_laws<T>(
          load_balance<balance::per_selection, balance::per_sequence, affinity::sigmoid>{}, experts,
          c));
      // The thresholds are 1 / (2 E).
      c.control = true;
      c.at_balance = 0.5;
      obeys(testing::loss_laws<T>(
          load_balance<balance::per_token, balance::per_layer, affinity::margin>{}, experts, c));
    }
  }
}

}  // namespace talpa::load_balance_affinity_laws_test
