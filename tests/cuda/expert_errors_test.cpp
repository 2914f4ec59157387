// SPDX-License-Identifier: Apache-2.0
#include "support/parity.hpp"
#include "support/scalars.hpp"

#include <talpa/cuda/expert_errors.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::cuda_expert_errors_test {
using support::device;
using support::on_device;
using support::rounding_bound;
using support::table;

TEST_SUITE("cuda/expert_errors") {
  TEST_CASE_TEMPLATE("expert_errors agrees with loops in double", T, TALPA_SCALARS) {
    context<device> ctx;
    support::test_random random(19);
    for (const index tokens : {index{0}, index{1}, support::device_size(43, 1001)}) {
      constexpr index experts = 3, width = 70;
      CAPTURE(tokens);
      on_device<T> outputs(support::random_matrix<T>(random, experts * tokens, width));
      on_device<T> target(support::random_matrix<T>(random, tokens, width));
      on_device<T> errors(matrix<T, cpu>(tokens, experts));
      table expected(tokens, experts), bounds(tokens, experts);
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          double sum = 0.0, size = 0.0;
          for (index d = 0; d < width; ++d) {
            const double f = static_cast<double>(outputs.host()(e * tokens + n, d));
            const double t = 1.75 * static_cast<double>(target.host()(n, d));
            sum += (f - t) * (f - t) / width;
            size += (std::abs(f) + std::abs(t)) * (std::abs(f) + std::abs(t)) / width;
          }
          expected(n, e) = sum;
          // Product and difference, squared, in a sum of D terms and a division.
          bounds(n, e) = rounding_bound<T>(width + 6.0, size);
        }
      }
      ops::expert_errors(ctx, outputs.view(), target.view(), 1.75, errors.view());
      ctx.synchronise();
      CHECK(support::difference(errors.now().view(), expected, bounds) == "");
      CHECK(errors.intact());
    }
  }

  TEST_CASE("expert_errors of outputs without columns are zero") {
    context<device> ctx;
    matrix<float, cpu> sevens(2, 3);
    for (index i = 0; i < sevens.size(); ++i) sevens.data()[i] = 7.0f;
    on_device<float> outputs(matrix<float, cpu>(6, 0)), target(matrix<float, cpu>(2, 0));
    on_device<float> errors(sevens);
    ops::expert_errors(ctx, outputs.view(), target.view(), 1.0, errors.view());
    ctx.synchronise();
    CHECK(support::bit_difference(errors.now(), matrix<float, cpu>(2, 3)) == "");
  }
}

}  // namespace talpa::cuda_expert_errors_test
