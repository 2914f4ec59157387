// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/balance_quantiles.hpp>
#include <talpa/cuda/balance_quantiles.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace talpa::cuda_balance_quantiles_test {
using support::device;
using support::on_device;

TEST_SUITE("cuda/balance_quantiles") {
  TEST_CASE_TEMPLATE("the bias has the bits of the host's", T, TALPA_SCALARS) {
    context<device> ctx;
    context<cpu> host(1);
    support::test_random random(92);
    for (const index experts : {2, 8, 130}) {
      // On a simulated device each step of a collective takes its time: k + 1 of them a token.
      const index few = experts == 2 ? 270 : 20;
      for (const index tokens : {index{0}, index{1}, support::device_size(few, 4100)}) {
        CAPTURE(experts);
        CAPTURE(tokens);
        matrix<T, cpu> scores = support::random_matrix<T>(random, tokens, experts);
        matrix<std::uint8_t, cpu> real(1, tokens);
        for (index n = 0; n < tokens; ++n) {
          real(0, n) = n % 5 == 3 ? 0 : 1;
          // Equal scores, of both zeros, some of NaN and -inf.
          if (n % 7 == 2) scores(n, n % experts) = scores(n, (n + 1) % experts);
          if (n % 11 == 4) scores(n, n % experts) = n % 2 == 0 ? T{0} : -T{0};
          if (n % 13 == 5) scores(n, n % experts) = std::numeric_limits<T>::quiet_NaN();
          if (n % 17 == 6) {
            for (index e = 1; e < experts; ++e) {
              scores(n, e) = -std::numeric_limits<T>::infinity();
            }
          }
        }
        const matrix<T, cpu> start = support::random_matrix<T>(random, 1, experts);
        const auto scores_on = to_device<device>(scores.view());
        const auto real_on = to_device<device>(real.view());
        for (const index k : {index{1}, std::min<index>(experts - 1, 20)}) {
          CAPTURE(k);
          on_device<T> bias(start);
          matrix<T, cpu> expected = start;
          ops::balance_quantiles(ctx, scores_on, k, {}, bias.view());
          ops::balance_quantiles(host, scores, k, {}, expected.view());
          CHECK(support::same_bits(bias.now().view(), expected.view()));
          ops::balance_quantiles(ctx, scores_on, k, {real_on.data(), tokens}, bias.view());
          ops::balance_quantiles(host, scores, k, {real.data(), tokens}, expected.view());
          CHECK(support::same_bits(bias.now().view(), expected.view()));
          CHECK(bias.intact());
          CHECK(ctx.scratch.used() == 0);
        }
      }
    }
  }
}

}  // namespace talpa::cuda_balance_quantiles_test
