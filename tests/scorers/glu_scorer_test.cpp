// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/scorers/glu_scorer.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::glu_scorer_test {

TEST_SUITE("scorers/glu_scorer") {
  TEST_CASE("one token and three experts, by hand") {
    const glu_scorer scorer;
    generator random(1);
    auto p = scorer.init<double, cpu>(1, 3, random, "");
    // x = 1: u = [2, -3, 0], v = [1, 1, 1]; silu(1) = 1 / (1 + 1 / e).
    const double u[] = {2.0, -3.0, 0.0};
    for (index e = 0; e < 3; ++e) {
      p.up.weight.value().data[e] = u[e];
      p.gate.weight.value().data[e] = 1.0;
    }
    matrix<double, cpu> x(1, 1), logits(1, 3), dlogits(1, 3), dx(1, 1);
    x(0, 0) = 1.0;
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, {});
    CHECK(ctx.memory.used() == scorer.saved_bytes<double, cpu>(1, 1, 3));
    const double s = 1.0 / (1.0 + std::exp(-1.0)), slope = s * (1.0 + 1.0 * (1.0 - s));
    // silu within a few ulps and two products.
    const double bound = support::rounding_bound<double>(24, 4.0);
    CHECK(support::within(logits(0, 0), 2.0 * s, bound));
    CHECK(support::within(logits(0, 1), 3.0 * s, bound));
    CHECK(logits(0, 2) == 0.0);
    for (index e = 0; e < 3; ++e) dlogits(0, e) = 1.0;
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    CHECK(support::within(p.up.weight.grad()(0, 0), s, bound));
    CHECK(support::within(p.up.weight.grad()(1, 0), -s, bound));
    CHECK(p.up.weight.grad()(2, 0) == 0.0);  // at the kink
    CHECK(support::within(p.gate.weight.grad()(0, 0), 2.0 * slope, bound));
    CHECK(support::within(p.gate.weight.grad()(1, 0), 3.0 * slope, bound));
    CHECK(support::within(dx(0, 0), 5.0 * s + 5.0 * slope, 4.0 * bound));
  }

  TEST_CASE("scores equal plain loops over random sizes") {
    support::test_random random(5);
    generator weights(3);
    for (int trial = 0; trial < 60; ++trial) {
      const index n = 1 + random.below(60), d = 1 + random.below(30), e = 1 + random.below(70);
      const glu_scorer scorer;
      auto p = scorer.init<float, cpu>(d, e, weights, "");
      const auto x = support::random_matrix<float>(random, n, d);
      matrix<float, cpu> logits(n, e);
      context<cpu> ctx(2);
      scorer.forward(ctx, p, x, logits.view(), mode::inference, {});
      for (index t = 0; t < n; ++t) {
        for (index i = 0; i < e; ++i) {
          double u = 0.0, v = 0.0, us = 1.0, vs = 1.0;
          for (index j = 0; j < d; ++j) {
            const double a = double(p.up.weight.value()(i, j)) * double(x(t, j));
            const double b = double(p.gate.weight.value()(i, j)) * double(x(t, j));
            u += a;
            v += b;
            us += std::abs(a);
            vs += std::abs(b);
          }
          // Two sums of d terms; |silu(v)| <= |v| and its slope is at most 1.1.
          CHECK(support::within(double(logits(t, i)), std::abs(u * v / (1.0 + std::exp(-v))),
                                support::rounding_bound<float>(3.0 * double(d) + 16.0, us * vs)));
        }
      }
    }
  }

  TEST_CASE_TEMPLATE("laws of glu_scorer", T, TALPA_SCALARS) {
    // A product of two linear maps, each of size up to D times the largest input.
    const testing::scorer_claims claims{.amplification = 256.0};
    support::obeys(testing::scorer_laws<T>(glu_scorer{}, claims));
    support::obeys(
        testing::scorer_laws<T>(glu_scorer{}, claims, {.tokens = 2, .inputs = 2, .experts = 1}));
    support::obeys(
        testing::scorer_laws<T>(glu_scorer{}, claims, {.tokens = 9, .inputs = 8, .experts = 33}));
  }
}

}  // namespace talpa::glu_scorer_test
