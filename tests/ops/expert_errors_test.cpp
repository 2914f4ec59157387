// SPDX-License-Identifier: Apache-2.0
#include "support/padded.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/expert_errors.hpp>
#include <talpa/testing/bounds.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::expert_errors_test {

using namespace support;

TEST_SUITE("ops/expert_errors") {
  TEST_CASE_TEMPLATE("expert_errors of two experts and two tokens, by hand", T, TALPA_SCALARS) {
    // Half the target is (1, 0) and (2, 2). Expert 0 says (1, 0), (0, 2), expert 1 (3, 4), (2, 1).
    matrix<T, cpu> target(2, 2), outputs(4, 2), errors(2, 2);
    const auto set = [](matrix<T, cpu>& m, index row, double a, double b) {
      m(row, 0) = static_cast<T>(a);
      m(row, 1) = static_cast<T>(b);
    };
    set(target, 0, 2.0, 0.0);
    set(target, 1, 4.0, 4.0);
    set(outputs, 0, 1.0, 0.0);
    set(outputs, 1, 0.0, 2.0);
    set(outputs, 2, 3.0, 4.0);
    set(outputs, 3, 2.0, 1.0);
    context<cpu> ctx(1);
    ops::expert_errors(ctx, outputs, target, 0.5, errors.view());
    CHECK(difference(errors.view(), {2, 2, {0.0, 10.0, 2.0, 0.5}}, 0.0) == "");
  }

  TEST_CASE_TEMPLATE("expert_errors agrees with loops in double for any threads", T,
                     TALPA_SCALARS) {
    test_random random(19);
    constexpr index tokens = 300, experts = 5, width = 70;
    const auto outputs = random_matrix<T>(random, experts * tokens, width);
    const auto target = random_matrix<T>(random, tokens, width);
    table expected(tokens, experts), bounds(tokens, experts);
    for (index n = 0; n < tokens; ++n) {
      for (index e = 0; e < experts; ++e) {
        double sum = 0.0, size = 0.0;
        for (index d = 0; d < width; ++d) {
          const double f = static_cast<double>(outputs(e * tokens + n, d));
          const double t = 1.75 * static_cast<double>(target(n, d));
          sum += (f - t) * (f - t) / width;
          size += (std::abs(f) + std::abs(t)) * (std::abs(f) + std::abs(t)) / width;
        }
        expected(n, e) = sum;
        // Product and difference, squared, in a sum of D terms and a division.
        bounds(n, e) = rounding_bound<T>(width + 6.0, size);
      }
    }
    matrix<T, cpu> first(tokens, experts);
    for (const int threads : {1, 2, 3}) {
      context<cpu> ctx(threads);
      padded<T> errors(tokens, experts), strided(outputs);
      ops::expert_errors(ctx, strided.view(), target, 1.75, errors.view());
      CHECK(errors.intact());
      CHECK(difference(errors.view(), expected, bounds) == "");
      if (threads == 1) first = matrix<T, cpu>(errors.view());
      CHECK(same_bits(errors.view(), first.view()));
    }
  }

  TEST_CASE("expert_errors without tokens, and shapes that do not fit") {
    context<cpu> ctx(1);
    matrix<float, cpu> none(0, 3), no_errors(0, 2);
    ops::expert_errors(ctx, none, none, 1.0, no_errors.view());
    matrix<float, cpu> target(2, 3), outputs(5, 3), errors(2, 2), other(3, 2);
    CHECK_THROWS_WITH_AS(ops::expert_errors(ctx, outputs, target, 1.0, errors.view()),
                         "talpa::ops::expert_errors: 'outputs' has shape [5, 3], expected [4, 3] = "
                         "experts x tokens, width of target",
                         shape_error);
    CHECK_THROWS_WITH_AS(ops::expert_errors(ctx, outputs, target, 1.0, other.view()),
                         "talpa::ops::expert_errors: 'errors' has shape [3, 2], expected [2, 2] = "
                         "tokens, experts",
                         shape_error);
  }
}

}  // namespace talpa::expert_errors_test
