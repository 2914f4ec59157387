// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/losses/load_cv2.hpp>
#include <talpa/testing/loss_laws.hpp>

#include <doctest/doctest.h>

#include <type_traits>
#include <vector>

namespace talpa::load_cv2_laws_test {

using namespace support;

TEST_SUITE("losses/load_cv2") {
  TEST_CASE_TEMPLATE("load_cv2 obeys the laws of losses", T, TALPA_SCALARS) {
    // Gradients are checked in double whatever T is, so float needs few numbers of experts.
    const bool few = std::is_same_v<T, float>;
    for (const index experts : few ? std::vector<index>{1, 33} : std::vector<index>{1, 2, 8, 33}) {
      CAPTURE(experts);
      for (const bool alone : {false, true}) {
        testing::loss_claims c;
        c.at_balance = 0.0;
        // A distribution function is good to 8 ulp; the value grows with E^2 / (E - 1) relative
        // errors of a load.
        c.amplification = 8.0 * static_cast<double>(experts + 1);
        c.noise = true;
        obeys(testing::loss_laws<T>(load_cv2{.noise_alone = alone}, experts, c));
      }
    }
  }
}

}  // namespace talpa::load_cv2_laws_test
