// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/unit_rows.hpp>
#include <talpa/scorers/mlp_scorer.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

namespace talpa::mlp_scorer_test {

TEST_SUITE("scorers/mlp_scorer") {
  TEST_CASE("two tokens through relu, by hand") {
    const mlp_scorer<relu> scorer{.hidden = 2, .bias = true, .initial_bias = -0.5};
    generator random(1);
    auto p = scorer.init<double, cpu>(2, 2, random, "");
    CHECK(p.down.bias.value()(0, 0) == -0.5);
    CHECK(p.up.bias.value()(0, 1) == -0.5);
    // V = [[1, 0], [0, 1]], W = [[1, 2], [3, 4]].
    const double v[] = {1.0, 0.0, 0.0, 1.0}, w[] = {1.0, 2.0, 3.0, 4.0};
    for (index i = 0; i < 4; ++i) {
      p.down.weight.value().data[i] = v[i];
      p.up.weight.value().data[i] = w[i];
    }
    matrix<double, cpu> x(2, 2), logits(2, 2), dlogits(2, 2), dx(2, 2);
    x(0, 0) = 1.5;  // a = [1, -0.5], h = [1, 0]
    x(1, 0) = 1.0;  // a = [0.5, 1.5] = h
    x(1, 1) = 2.0;
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::inference, {});
    CHECK(logits(0, 0) == 0.5);
    CHECK(logits(0, 1) == 2.5);
    CHECK(logits(1, 0) == 3.0);
    CHECK(logits(1, 1) == 7.0);
    CHECK(ctx.memory.used() == scorer.saved_bytes<double, cpu>(2, 2, 2));
    dlogits(0, 1) = 1.0;
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    CHECK(dx(0, 0) == 3.0);
    CHECK(dx(0, 1) == 0.0);  // relu is off
    CHECK(p.up.weight.grad()(1, 0) == 1.0);
    CHECK(p.down.weight.grad()(0, 0) == 4.5);
    CHECK(p.down.bias.grad()(0, 0) == 3.0);
    CHECK(p.up.bias.grad()(0, 1) == 1.0);
  }

  TEST_CASE("a normalised token has the same scores at any length") {
    const mlp_scorer<tanh> scorer{.hidden = 3, .hidden_bias = false, .normalise = true};
    generator random(2);
    auto p = scorer.init<double, cpu>(2, 4, random, "");
    CHECK_FALSE(p.down.bias.exists());
    CHECK_FALSE(p.up.bias.exists());
    matrix<double, cpu> x(3, 2), logits(3, 4);
    x(0, 0) = 3.0;
    x(0, 1) = 4.0;
    x(1, 0) = 24.0;  // eight times the first: the same bits
    x(1, 1) = 32.0;
    context<cpu> ctx(1);
    scorer.forward(ctx, p, x, logits.view(), mode::training, {});
    CHECK(ctx.memory.used() == scorer.saved_bytes<double, cpu>(3, 2, 4));
    for (index e = 0; e < 4; ++e) {
      CHECK(logits(0, e) == logits(1, e));
      CHECK(logits(0, e) != 0.0);
      CHECK(logits(2, e) == 0.0);  // a token of zeros
    }
  }

  TEST_CASE("scores equal plain loops over random sizes") {
    support::test_random random(7);
    generator weights(3);
    for (int trial = 0; trial < 60; ++trial) {
      const index tokens = 1 + random.below(60), inputs = 1 + random.below(20);
      const index experts = 1 + random.below(20), hidden = 1 + random.below(20);
      const bool unit = random.below(2) == 0;
      const mlp_scorer<tanh> scorer{
          .hidden = hidden, .bias = true, .initial_bias = 0.25, .normalise = unit};
      auto p = scorer.init<float, cpu>(inputs, experts, weights, "");
      const auto x = support::random_matrix<float>(random, tokens, inputs);
      matrix<float, cpu> logits(tokens, experts);
      context<cpu> ctx(2);
      scorer.forward(ctx, p, x, logits.view(), mode::training, {});
      for (index n = 0; n < tokens; ++n) {
        double square = 0.0;
        for (index d = 0; d < inputs; ++d) square += double(x(n, d)) * double(x(n, d));
        const double scale = unit ? 1.0 / std::sqrt(square) : 1.0;
        std::vector<double> h(static_cast<std::size_t>(hidden)), size = h;
        for (index j = 0; j < hidden; ++j) {
          double a = 0.25, most = 0.25;
          for (index d = 0; d < inputs; ++d) {
            const double term = scale * double(x(n, d)) * double(p.down.weight.value()(j, d));
            a += term;
            most += std::abs(term);
          }
          h[static_cast<std::size_t>(j)] = std::tanh(a);
          size[static_cast<std::size_t>(j)] = most;
        }
        for (index e = 0; e < experts; ++e) {
          double sum = 0.25, bound = 0.25;
          for (index j = 0; j < hidden; ++j) {
            const double w = double(p.up.weight.value()(e, j));
            sum += w * h[static_cast<std::size_t>(j)];
            bound += std::abs(w) * (1.0 + size[static_cast<std::size_t>(j)]);
          }
          // Every term of a has D products and additions, the length D + 4 roundings and a
          // division; tanh, whose slope is at most 1, a few more; then H terms of the second sum.
          const double roundings = 2.0 * double(inputs) + double(hidden) + 16.0;
          CHECK(support::within(double(logits(n, e)), sum,
                                support::rounding_bound<float>(roundings, bound)));
        }
      }
    }
  }

  TEST_CASE("hyperparameters out of range are refused") {
    generator random(1);
    CHECK_THROWS_WITH_AS((mlp_scorer<>{.hidden = 0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::mlp_scorer: 'hidden' is 0, expected >= 1 = width of the hidden "
                         "layer",
                         value_error);
    CHECK_THROWS_WITH_AS((mlp_scorer<>{.epsilon = 0.0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::mlp_scorer: 'epsilon' is 0, expected > 0", value_error);
  }

  TEST_CASE_TEMPLATE("laws of mlp_scorer", T, TALPA_SCALARS) {
    // The second map multiplies the errors of the first by H weights of size about 1, and a length
    // divides by no less than a tenth.
    const testing::scorer_claims claims{.amplification = 64.0};
    support::obeys(testing::scorer_laws<T>(mlp_scorer<tanh>{.hidden = 5, .bias = true}, claims));
    support::obeys(testing::scorer_laws<T>(mlp_scorer<silu>{.hidden = 1, .hidden_bias = false},
                                           claims, {.tokens = 1, .inputs = 1, .experts = 1}));
    support::obeys(testing::scorer_laws<T>(
        mlp_scorer<tanh>{.hidden = 6, .hidden_bias = false, .normalise = true}, claims));
    support::obeys(testing::scorer_laws<T>(mlp_scorer<relu>{.hidden = 8, .initial_bias = 2.5},
                                           claims, {.tokens = 9, .inputs = 8, .experts = 33}));
  }
}

}  // namespace talpa::mlp_scorer_test
