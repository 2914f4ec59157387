// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/scorers/cluster_scorer.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

namespace talpa::cluster_scorer_test {

TEST_SUITE("scorers/cluster_scorer") {
  TEST_CASE("two sequences of two tokens, by hand") {
    const cluster_scorer scorer{.clusters = 3, .width = 1, .temperature = 0.5};
    generator random(1);
    auto p = scorer.init<double, cpu>(4, 2, random, "r.");
    CHECK(p.embedding.name() == "r.embedding");
    // M = [1, 2, 3], W = [1, -1], b = [0, 4].
    for (index i = 0; i < 3; ++i) p.embedding.value().data[i] = static_cast<double>(i + 1);
    p.gate.weight.value()(0, 0) = 1.0;
    p.gate.weight.value()(1, 0) = -1.0;
    p.gate.bias.value()(0, 1) = 4.0;
    matrix<double, cpu> x(4, 4), logits(4, 2), dlogits(4, 2), dx(4, 4);
    vector<std::int32_t, cpu> labels(2);
    labels[0] = 2;
    labels[1] = 0;
    batch_info<double, cpu> batch;
    batch.sequence_length = 2;
    batch.labels = labels.view();
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    for (index i = 0; i < 2; ++i) {
      CHECK(logits(i, 0) == 6.0);
      CHECK(logits(i, 1) == 2.0);
      CHECK(logits(2 + i, 0) == 2.0);
      CHECK(logits(2 + i, 1) == 6.0);
    }
    dlogits(0, 0) = 1.0;
    dlogits(1, 0) = 2.0;
    dlogits(3, 1) = 4.0;
    dx(0, 0) = 7.0;
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    CHECK(testing::largest(dx.view()) == 0.0);
    CHECK(p.gate.weight.grad()(0, 0) == 18.0);
    CHECK(p.gate.weight.grad()(1, 0) == 8.0);
    CHECK(p.gate.bias.grad()(0, 0) == 6.0);
    CHECK(p.gate.bias.grad()(0, 1) == 8.0);
    CHECK(p.embedding.grad()(0, 0) == -8.0);
    CHECK(p.embedding.grad()(1, 0) == 0.0);
    CHECK(p.embedding.grad()(2, 0) == 6.0);
  }

  TEST_CASE("noise is one row a sequence and comes in training only") {
    const cluster_scorer scorer{.clusters = 1, .width = 2, .temperature = 1.0, .noise = 0.5};
    generator random(1), noise(4, 2);
    auto p = scorer.init<double, cpu>(1, 3, random, "");
    matrix<double, cpu> x(6, 1), logits(6, 3), clean(6, 3);
    vector<std::int32_t, cpu> labels(2);
    batch_info<double, cpu> batch;
    batch.sequence_length = 3;
    batch.labels = labels.view();
    context<cpu> ctx(1);
    scorer.forward(ctx, p, x, clean.view(), mode::inference, batch);
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::cluster_scorer: 'batch.random' is null, expected a generator = "
                         "source of the noise in training",
                         value_error);
    batch.random = &noise;
    scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    for (index n = 0; n < 6; ++n) {
      for (index e = 0; e < 3; ++e) {
        const double z =
            normal<double>(random_stream{4, 2}, static_cast<std::uint64_t>(n / 3 * 3 + e));
        CHECK(support::within(logits(n, e), clean(n, e) + 0.5 * z,
                              support::rounding_bound<double>(4, std::abs(clean(n, e)) + 4.0)));
      }
    }
  }

  TEST_CASE("labels and hyperparameters out of range are refused") {
    generator random(1);
    const auto init = [&](const cluster_scorer& s) { s.init<float, cpu>(2, 2, random, ""); };
    CHECK_THROWS_WITH_AS(init({.clusters = 0}),
                         "talpa::cluster_scorer: 'clusters' is 0, expected >= 1 = rows of the "
                         "embedding",
                         value_error);
    CHECK_THROWS_WITH_AS(init({.width = 0}),
                         "talpa::cluster_scorer: 'width' is 0, expected >= 1 = columns of the "
                         "embedding",
                         value_error);
    CHECK_THROWS_WITH_AS(init({.temperature = 0.0}),
                         "talpa::cluster_scorer: 'temperature' is 0, expected > 0", value_error);
    CHECK_THROWS_WITH_AS(init({.noise = -1.0}),
                         "talpa::cluster_scorer: 'noise' is -1, expected >= 0", value_error);
    const cluster_scorer scorer{.clusters = 3, .width = 2};
    auto p = scorer.init<float, cpu>(2, 2, random, "");
    context<cpu> ctx(1);
    matrix<float, cpu> x(4, 2), logits(4, 2);
    vector<std::int32_t, cpu> labels(2);
    batch_info<float, cpu> batch;
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::cluster_scorer: 'batch.labels' has shape [0], expected [1] = one "
                         "cluster a sequence",
                         shape_error);
    batch.sequence_length = 2;
    batch.labels = labels.view();
    labels[1] = 3;
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch),
                         "talpa::cluster_scorer: 'labels' is 3 at 1, expected 0..2 = rows of the "
                         "table",
                         value_error);
    labels[1] = -1;
    CHECK_THROWS_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, batch), value_error);
  }

  TEST_CASE_TEMPLATE("laws of cluster_scorer", T, TALPA_SCALARS) {
    // Sums over up to 1100 tokens, embeddings of size up to about 5 and a factor 2.
    const testing::scorer_claims claims{.reads_tokens = false, .amplification = 64.0};
    const cluster_scorer scorer{.clusters = 4, .width = 3, .temperature = 0.5, .noise = 0.1};
    support::obeys(testing::scorer_laws<T>(
        scorer, claims,
        {.tokens = 20, .inputs = 3, .experts = 5, .sequence_length = 4, .classes = 3}));
    support::obeys(testing::scorer_laws<T>(scorer, claims,
                                           {.tokens = 2, .inputs = 1, .experts = 1, .classes = 1}));
    support::obeys(testing::scorer_laws<T>(
        scorer, claims,
        {.tokens = 10, .inputs = 8, .experts = 33, .sequence_length = 5, .classes = 4}));
  }
}

}  // namespace talpa::cluster_scorer_test
