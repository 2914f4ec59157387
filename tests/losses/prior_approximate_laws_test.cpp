// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/losses/prior_approximate.hpp>
#include <talpa/testing/loss_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <type_traits>
#include <vector>

namespace talpa::prior_approximate_laws_test {

using namespace support;

TEST_SUITE("losses/prior_approximate") {
  TEST_CASE_TEMPLATE("prior_approximate obeys the laws of losses", T, TALPA_SCALARS) {
    // Gradients are checked in double whatever T is, so float needs few numbers of experts.
    const std::vector<index> sizes =
        std::is_same_v<T, float> ? std::vector<index>{1, 33} : std::vector<index>{1, 2, 8, 33};
    for (const index experts : sizes) {
      CAPTURE(experts);
      // Of equal logits with one label: ln(mass / E) - 1 / E, mass the sum of exp(label).
      const auto e = static_cast<double>(experts);
      testing::loss_claims claims;
      claims.at_balance = std::log((std::exp(1.0) + e - 1.0) / e) - 1.0 / e;
      // A row passes through two softmaxes and 2 E logarithms of at most 17.
      claims.amplification = 64.0;
      obeys(testing::loss_laws<T>(prior_approximate{}, experts, claims));
    }
  }
}

}  // namespace talpa::prior_approximate_laws_test
