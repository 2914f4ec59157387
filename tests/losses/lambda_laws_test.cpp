// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/losses/lambda.hpp>
#include <talpa/testing/loss_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <type_traits>
#include <vector>

namespace talpa::lambda_laws_test {

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

TEST_SUITE("losses/lambda") {
  TEST_CASE_TEMPLATE("lambda_mean and lambda_sparsity obey the laws of losses", T, TALPA_SCALARS) {
    for (const index experts : sizes<T>()) {
      CAPTURE(experts);
      testing::loss_claims c = claims(std::log(2.0) + 0.01);
      c.control = true;
      c.constant_logits = true;
      obeys(testing::loss_laws<T>(lambda_mean{}, experts, c));
      for (index k = 1; k < experts && k < 3; ++k) {
        obeys(testing::loss_laws<T>(lambda_sparsity{.k = k}, experts, c));
      }
    }
  }
}

}  // namespace talpa::lambda_laws_test
