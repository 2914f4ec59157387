// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/task_mixture.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

namespace talpa::task_mixture_test {

namespace {
using mixture = task_mixture<linear_scorer, linear_scorer>;
}
static_assert(scorer_policy<mixture>);

TEST_SUITE("scorers/task_mixture") {
  TEST_CASE("one sequence of two tokens, by hand") {
    // p = [1/2, 1/2] for token 0, [3/4, 1/4] for token 1; t = [1/5, 4/5]; s = 1/4.
    const mixture scorer{.alpha = -std::log(3.0), .width = 1};
    generator random(1);
    auto p = scorer.init<double, cpu>(1, 2, random, "");
    p.token.weight.value()(0, 0) = std::log(3.0);
    p.token.weight.value()(1, 0) = 0.0;
    p.task.weight.value()(0, 0) = 0.0;
    p.task.weight.value()(1, 0) = std::log(4.0);
    matrix<double, cpu> x(2, 1), row(1, 1), drow(1, 1), logits(2, 2), dlogits(2, 2), dx(2, 1);
    x(1, 0) = 1.0;
    row(0, 0) = 1.0;
    batch_info<double, cpu> batch;
    batch.conditioning = {row.view(), {}, drow.view()};
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    const double bound = support::rounding_bound<double>(40, 4.0);
    CHECK(support::within(logits(0, 0), std::log(3.0 / 8.0 + 1.0 / 20.0), bound));
    CHECK(support::within(logits(0, 1), std::log(3.0 / 8.0 + 1.0 / 5.0), bound));
    CHECK(support::within(logits(1, 0), std::log(9.0 / 16.0 + 1.0 / 20.0), bound));
    dlogits(1, 0) = 1.0;
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    // The token has 9/16 of 49/80, that is 45/49; da = 45/49 [1/4, -1/4].
    CHECK(support::within(p.token.weight.grad()(0, 0), 45.0 / 196.0, bound));
    CHECK(support::within(p.token.weight.grad()(1, 0), -45.0 / 196.0, bound));
    CHECK(dx(0, 0) == 0.0);
    CHECK(support::within(dx(1, 0), 45.0 / 196.0 * std::log(3.0), bound));
    // The task has 4/49; da = 4/49 [4/5, -4/5].
    CHECK(support::within(p.task.weight.grad()(0, 0), 16.0 / 245.0, bound));
    CHECK(support::within(drow(0, 0), -16.0 / 245.0 * std::log(4.0), bound));
  }

  TEST_CASE("alpha grows linearly with depth") {
    CHECK(mixture::alpha_at(0, 5, 2.0) == -2.0);
    CHECK(mixture::alpha_at(2, 5, 2.0) == 0.0);
    CHECK(mixture::alpha_at(3, 5, 2.0) == 1.0);
    CHECK(mixture::alpha_at(4, 5, 2.0) == 2.0);
    CHECK(mixture::alpha_at(0, 1, 2.0) == 0.0);
    CHECK_THROWS_WITH_AS(mixture::alpha_at(5, 5, 2.0),
                         "talpa::task_mixture: 'layer' is 5, expected 0..4 = last layer",
                         value_error);
    CHECK_THROWS_AS(mixture::alpha_at(0, 0, 2.0), value_error);
  }

  TEST_CASE("mixtures equal plain loops over random sizes, far alphas leave one scorer") {
    support::test_random random(5);
    generator weights(3);
    for (int trial = 0; trial < 80; ++trial) {
      const index s = 1 + random.below(8), tokens = 1 + random.below(9);
      const index d = 1 + random.below(9), c = 1 + random.below(9), e = 1 + random.below(70);
      const double alpha = trial % 8 == 0 ? -800.0 : trial % 8 == 1 ? 800.0 : random.uniform(-3, 3);
      const mixture scorer{.alpha = alpha, .width = c};
      auto p = scorer.init<double, cpu>(d, e, weights, "");
      const auto x = support::random_matrix<double>(random, s * tokens, d);
      const auto rows = support::random_matrix<double>(random, s, c);
      matrix<double, cpu> logits(s * tokens, e);
      batch_info<double, cpu> batch;
      batch.sequence_length = tokens;
      batch.conditioning.rows = rows.view();
      context<cpu> ctx(2);
      ctx.memory.reserve(scorer.saved_bytes<double, cpu>(s * tokens, d, e));
      scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
      CHECK(ctx.memory.allocations() == 1);
      const double share = 1.0 / (1.0 + std::exp(-alpha));
      for (index n = 0; n < s * tokens; ++n) {
        std::vector<double> a(static_cast<std::size_t>(e)), b = a;
        double sum_a = 0.0, sum_b = 0.0;
        for (index i = 0; i < e; ++i) {
          double u = 0.0, v = 0.0;
          for (index j = 0; j < d; ++j) u += x(n, j) * p.token.weight.value()(i, j);
          for (index j = 0; j < c; ++j) v += rows(n / tokens, j) * p.task.weight.value()(i, j);
          a[static_cast<std::size_t>(i)] = std::exp(u);
          b[static_cast<std::size_t>(i)] = std::exp(v);
          sum_a += std::exp(u);
          sum_b += std::exp(v);
        }
        for (index i = 0; i < e; ++i) {
          const double mixed = (1.0 - share) * a[static_cast<std::size_t>(i)] / sum_a +
                               share * b[static_cast<std::size_t>(i)] / sum_b;
          // Exponents of size at most 4 (d + c), sums of e terms; a logarithm of the same size.
          const double size = 4.0 * double(d + c) + std::log(double(e)) + 4.0;
          CHECK(support::within(logits(n, i), std::log(mixed),
                                support::rounding_bound<double>(double(d + c + e) + 40.0, size)));
        }
      }
    }
  }

  TEST_CASE("what does not fit is refused") {
    generator random(1);
    CHECK_THROWS_WITH_AS((mixture{.width = 0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::task_mixture: 'width' is 0, expected >= 1 = columns of the "
                         "conditioning rows",
                         value_error);
    CHECK_THROWS_WITH_AS(
        (mixture{.alpha = std::numeric_limits<double>::infinity(), .width = 1}.init<float, cpu>(
            2, 2, random, "")),
        "talpa::task_mixture: 'alpha' is inf, expected a finite number", value_error);
    const mixture scorer{.width = 3};
    auto p = scorer.init<float, cpu>(2, 2, random, "");
    context<cpu> ctx(1);
    matrix<float, cpu> x(4, 2), logits(4, 2), rows(2, 3);
    batch_info<float, cpu> batch;
    batch.sequence_length = 2;
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::task_mixture: 'conditioning.rows' has shape [0, 0], expected [2, "
                         "3] = sequences, width of the task",
                         shape_error);
    vector<std::uint8_t, cpu> present(2);
    batch.conditioning = {rows.view(), present.view(), {}};
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::task_mixture: 'conditioning.present' is given, expected empty = "
                         "every sequence has its task",
                         value_error);
  }

  TEST_CASE_TEMPLATE("laws of task_mixture", T, TALPA_SCALARS) {
    // Exponentials of logits of size up to about 30, and sums over up to 1100 tokens.
    const testing::scorer_claims claims{.amplification = 128.0};
    support::obeys(testing::scorer_laws<T>(mixture{.alpha = 0.5, .width = 4}, claims,
                                           {.tokens = 20,
                                            .inputs = 3,
                                            .experts = 5,
                                            .sequence_length = 4,
                                            .conditioning_rows = 1,
                                            .conditioning_width = 4}));
    support::obeys(testing::scorer_laws<T>(
        mixture{.alpha = -1.0, .width = 2}, claims,
        {.tokens = 2, .inputs = 1, .experts = 2, .conditioning_rows = 1, .conditioning_width = 2}));
    support::obeys(testing::scorer_laws<T>(mixture{.width = 2}, claims,
                                           {.tokens = 10,
                                            .inputs = 8,
                                            .experts = 33,
                                            .sequence_length = 5,
                                            .conditioning_rows = 1,
                                            .conditioning_width = 2}));
  }
}

}  // namespace talpa::task_mixture_test
