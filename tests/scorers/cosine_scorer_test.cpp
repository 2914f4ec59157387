// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/exp_scale.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/scorers/cosine_scorer.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::cosine_scorer_test {

TEST_SUITE("scorers/cosine_scorer") {
  TEST_CASE("one token and two experts, by hand") {
    for (const bool learned : {false, true}) {
      const cosine_scorer scorer{.temperature = 0.5, .learned = learned};
      generator random(1);
      auto p = scorer.init<double, cpu>(2, 2, random, "");
      CHECK(p.log_scale.exists() == learned);
      // w_0 = [2, 0], w_1 = [0, 5]; x = [3, 4]: cosines 3/5 and 4/5.
      const double w[] = {2.0, 0.0, 0.0, 5.0};
      for (index i = 0; i < 4; ++i) p.weight.value().data[i] = w[i];
      matrix<double, cpu> x(2, 2), logits(2, 2), dlogits(2, 2), dx(2, 2);
      x(0, 0) = 3.0;
      x(0, 1) = 4.0;
      context<cpu> ctx(1);
      const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, {});
      CHECK(ctx.memory.used() == scorer.saved_bytes<double, cpu>(2, 2, 2));
      const double bound = support::rounding_bound<double>(16, 4.0);
      CHECK(support::within(logits(0, 0), 1.2, bound));
      CHECK(support::within(logits(0, 1), 1.6, bound));
      CHECK(logits(1, 0) == 0.0);  // a token of zeros
      dlogits(0, 0) = 1.0;
      scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
      // du = [2, 0]; dx = (du - u (u . du)) / 5 with u = [3/5, 4/5].
      CHECK(support::within(dx(0, 0), (2.0 - 0.72) / 5.0, bound));
      CHECK(support::within(dx(0, 1), -0.96 / 5.0, bound));
      // d(w_0 / 2) = 2 u; its part across w_0, halved.
      CHECK(support::within(p.weight.grad()(0, 0), 0.0, bound));
      CHECK(support::within(p.weight.grad()(0, 1), 0.8, bound));
      CHECK(p.weight.grad()(1, 0) == 0.0);
      if (learned) CHECK(support::within(p.log_scale.grad()(0, 0), 1.2, bound));
    }
  }

  TEST_CASE("scores equal plain loops over random sizes") {
    support::test_random random(5);
    generator weights(3);
    for (int trial = 0; trial < 60; ++trial) {
      const index n = 1 + random.below(60), d = 1 + random.below(30), e = 1 + random.below(70);
      const cosine_scorer scorer{.temperature = 0.25, .learned = trial % 2 == 0};
      auto p = scorer.init<float, cpu>(d, e, weights, "");
      const auto x = support::random_matrix<float>(random, n, d);
      matrix<float, cpu> logits(n, e);
      context<cpu> ctx(2);
      scorer.forward(ctx, p, x, logits.view(), mode::inference, {});
      for (index t = 0; t < n; ++t) {
        for (index i = 0; i < e; ++i) {
          double xx = 0.0, ww = 0.0, xw = 0.0;
          for (index j = 0; j < d; ++j) {
            const double a = double(x(t, j)), b = double(p.weight.value()(i, j));
            xx += a * a;
            ww += b * b;
            xw += a * b;
          }
          // Lengths with d + 4 roundings each, a product of d terms whose absolute values sum to at
          // most 1, and a factor 4 that exp makes of -ln 1/4.
          if (xx > 1e-6 && ww > 1e-6) {
            CHECK(support::within(double(logits(t, i)), 4.0 * xw / std::sqrt(xx * ww),
                                  support::rounding_bound<float>(3.0 * double(d) + 16.0, 4.0)));
          }
        }
      }
    }
  }

  TEST_CASE("hyperparameters out of range are refused") {
    generator random(1);
    CHECK_THROWS_WITH_AS((cosine_scorer{.temperature = 0.0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::cosine_scorer: 'temperature' is 0, expected > 0", value_error);
    CHECK_THROWS_WITH_AS((cosine_scorer{.epsilon = -1.0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::cosine_scorer: 'epsilon' is -1, expected > 0", value_error);
  }

  TEST_CASE_TEMPLATE("laws of cosine_scorer", T, TALPA_SCALARS) {
    // Two lengths that divide by no less than about a fiftieth, and the factor 2.
    const testing::scorer_claims claims{.amplification = 512.0};
    for (const bool learned : {false, true}) {
      const cosine_scorer scorer{.temperature = 0.5, .learned = learned};
      support::obeys(testing::scorer_laws<T>(scorer, claims));
      support::obeys(
          testing::scorer_laws<T>(scorer, claims, {.tokens = 2, .inputs = 2, .experts = 1}));
      support::obeys(
          testing::scorer_laws<T>(scorer, claims, {.tokens = 9, .inputs = 8, .experts = 33}));
    }
  }
}

}  // namespace talpa::cosine_scorer_test
