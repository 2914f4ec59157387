// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/scorers/cross_attention_scorer.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <vector>

namespace talpa::cross_attention_scorer_test {

TEST_SUITE("scorers/cross_attention_scorer") {
  TEST_CASE("two sequences, one of them without text, by hand") {
    const cross_attention_scorer scorer{.query_row = 1};
    generator random(1);
    auto p = scorer.init<double, cpu>(1, 2, random, "");
    p.weight.value()(0, 0) = 1.0;
    p.weight.value()(1, 0) = -2.0;
    // C = 1: scale 1. Query of sequence 0 is ln 3; rows 1 and 0 present, one absent.
    matrix<double, cpu> x(4, 1), text(6, 1), dtext(6, 1), logits(4, 2), dlogits(4, 2), dx(4, 1);
    x(0, 0) = 5.0;
    x(1, 0) = std::log(3.0);
    text(0, 0) = 1.0;
    text(1, 0) = 100.0;
    vector<std::uint8_t, cpu> present(6);
    present[0] = present[2] = 1;
    batch_info<double, cpu> batch;
    batch.sequence_length = 2;
    batch.conditioning = {text.view(), present.view(), dtext.view()};
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    // a = [3/4, 0, 1/4], u = 3/4.
    const double bound = support::rounding_bound<double>(24, 2.0);
    for (index n = 0; n < 2; ++n) {
      CHECK(support::within(logits(n, 0), 0.75, bound));
      CHECK(support::within(logits(n, 1), -1.5, bound));
      CHECK(logits(2 + n, 0) == 0.0);
      CHECK(logits(2 + n, 1) == 0.0);
    }
    dlogits(0, 0) = 0.25;
    dlogits(1, 0) = 0.75;
    dlogits(2, 0) = 1.0;
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    CHECK(support::within(p.weight.grad()(0, 0), 0.75, bound));
    CHECK(p.weight.grad()(1, 0) == 0.0);
    // du = 1; r = [1, -, 0], mean 3/4; t = [3/16, 0, -3/16].
    CHECK(dx(0, 0) == 0.0);
    CHECK(support::within(dx(1, 0), 3.0 / 16.0, bound));
    CHECK(dx(3, 0) == 0.0);
    const double l = std::log(3.0);
    CHECK(support::within(dtext(0, 0), 0.75 + 3.0 / 16.0 * l, bound));
    CHECK(dtext(1, 0) == 0.0);
    CHECK(support::within(dtext(2, 0), 0.25 - 3.0 / 16.0 * l, bound));
    CHECK(dtext(3, 0) == 0.0);
  }

  TEST_CASE("without any text every expert has logit 0") {
    const cross_attention_scorer scorer;
    generator random(1);
    auto p = scorer.init<float, cpu>(3, 4, random, "");
    support::test_random inputs(2);
    const auto x = support::random_matrix<float>(inputs, 5, 3);
    const auto dlogits = support::random_matrix<float>(inputs, 5, 4);
    matrix<float, cpu> logits(5, 4), dx(5, 3);
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::inference, {});
    CHECK(testing::largest(logits.view()) == 0.0);
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    CHECK(testing::largest(p.weight.grad()) == 0.0);
    CHECK(testing::largest(dx.view()) == 0.0);
  }

  TEST_CASE("scores equal plain loops over random sizes") {
    support::test_random random(5);
    generator weights(3);
    for (int trial = 0; trial < 80; ++trial) {
      const index s = 1 + random.below(8), tokens = 1 + random.below(9), l = 1 + random.below(9);
      const index c = 1 + random.below(12), e = 1 + random.below(40);
      const cross_attention_scorer scorer{.query_row = random.below(tokens)};
      auto p = scorer.init<double, cpu>(c, e, weights, "");
      const auto x = support::random_matrix<double>(random, s * tokens, c);
      const auto text = support::random_matrix<double>(random, s * l, c);
      matrix<double, cpu> logits(s * tokens, e);
      batch_info<double, cpu> batch;
      batch.sequence_length = tokens;
      batch.conditioning.rows = text.view();
      context<cpu> ctx(2);
      scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
      for (index i = 0; i < s; ++i) {
        std::vector<double> u(static_cast<std::size_t>(c));
        double sum = 0.0, size = 1.0;
        for (index j = 0; j < l; ++j) {
          double score = 0.0;
          for (index d = 0; d < c; ++d) {
            const double term = x(i * tokens + scorer.query_row, d) * text(i * l + j, d);
            score += term / std::sqrt(double(c));
            size += std::abs(term);
          }
          sum += std::exp(score);
          for (index d = 0; d < c; ++d) {
            u[static_cast<std::size_t>(d)] += std::exp(score) * text(i * l + j, d);
          }
        }
        for (index k = 0; k < e; ++k) {
          double expected = 0.0, most = 0.0;
          for (index d = 0; d < c; ++d) {
            expected += u[static_cast<std::size_t>(d)] / sum * p.weight.value()(k, d);
            most += 4.0 * std::abs(p.weight.value()(k, d));
          }
          // Scores of size at most `size` in an exponent, sums of l and of c terms; rows below 4.
          const double bound = support::rounding_bound<double>(
              (double(c) + 4.0) * size + 2.0 * double(l) + double(c) + 16.0, most);
          for (index t = 0; t < tokens; ++t) {
            CHECK(support::within(logits(i * tokens + t, k), expected, bound));
          }
        }
      }
    }
  }

  TEST_CASE("what does not fit is refused") {
    generator random(1);
    CHECK_THROWS_WITH_AS(
        (cross_attention_scorer{.query_row = -1}.init<float, cpu>(2, 2, random, "")),
        "talpa::cross_attention_scorer: 'query_row' is -1, expected >= 0 = token of a sequence",
        value_error);
    const cross_attention_scorer scorer{.query_row = 2};
    auto p = scorer.init<float, cpu>(2, 2, random, "");
    context<cpu> ctx(1);
    matrix<float, cpu> x(4, 2), logits(4, 2), text(3, 2), wide(2, 3);
    batch_info<float, cpu> batch;
    batch.sequence_length = 2;
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::cross_attention_scorer: 'query_row' is 2, expected 0..1 = last "
                         "token of a sequence",
                         value_error);
    batch.conditioning.rows = text.view();
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::cross_attention_scorer: 'conditioning.rows' is 3, expected a "
                         "multiple of 2 = sequences",
                         value_error);
    batch.conditioning.rows = wide.view();
    batch.sequence_length = 4;
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::cross_attention_scorer: 'conditioning.rows' has shape [2, 3], "
                         "expected [2, 2] = rows, width of the tokens",
                         shape_error);
  }

  TEST_CASE_TEMPLATE("laws of cross_attention_scorer", T, TALPA_SCALARS) {
    // Scores of size up to about 16 C in an exponent, and sums over up to 1100 tokens.
    const testing::scorer_claims claims{.own_row = false, .amplification = 512.0};
    support::obeys(testing::scorer_laws<T>(cross_attention_scorer{.query_row = 1}, claims,
                                           {.tokens = 20,
                                            .inputs = 3,
                                            .experts = 5,
                                            .sequence_length = 4,
                                            .conditioning_rows = 4,
                                            .conditioning_width = 3}));
    support::obeys(testing::scorer_laws<T>(
        cross_attention_scorer{}, claims,
        {.tokens = 2, .inputs = 1, .experts = 1, .conditioning_rows = 2, .conditioning_width = 1}));
    support::obeys(testing::scorer_laws<T>(cross_attention_scorer{}, claims,
                                           {.tokens = 10,
                                            .inputs = 8,
                                            .experts = 33,
                                            .sequence_length = 5,
                                            .conditioning_rows = 1,
                                            .conditioning_width = 8}));
  }
}

}  // namespace talpa::cross_attention_scorer_test
