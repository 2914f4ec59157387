// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/update_bias.hpp>
#include <talpa/cuda/update_bias.hpp>

#include <doctest/doctest.h>

namespace talpa::cuda_update_bias_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/update_bias") {
  TEST_CASE_TEMPLATE("the bias has the bits of the host's", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(91);
    for (const index experts : {0, 1, 8, 130, 512}) {
      CAPTURE(experts);
      matrix<index, cpu> counts(1, experts);
      for (index e = 0; e < experts; ++e) {
        counts(0, e) = static_cast<index>(random.uniform(0.0, 1000.0));
      }
      on_device<T> bias(support::random_matrix<T>(random, 1, experts));
      matrix<T, cpu> expected = bias.host();
      const auto counts_on = to_device<device>(counts.view());
      for (const double rate : {1e-3, 0.0, 0.25}) {
        ops::update_bias(ctx, counts_on, rate, bias.view());
        ops::update_bias(host, counts, rate, expected.view());
        CHECK(support::same_bits(bias.now().view(), expected.view()));
        CHECK(bias.intact());
      }
    }
  }
}

}  // namespace talpa::cuda_update_bias_test
