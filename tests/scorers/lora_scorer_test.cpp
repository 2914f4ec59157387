// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/lora_scorer.hpp>
#include <talpa/scorers/noisy.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <limits>
#include <string>

namespace talpa::lora_scorer_test {

using adapted = lora_scorer<linear_scorer>;
static_assert(scorer_policy<adapted> && scorer_policy<noisy<adapted>> && !noisy_scorer<adapted> &&
              !noisy_scorer<lora_scorer<noisy<linear_scorer>>>);

TEST_SUITE("scorers/lora_scorer") {
  TEST_CASE("one token, two experts and a rank of one, by hand") {
    // W = (1, -1), A = (2), B = (3, 5), s = 4 / 1, x = 1/2: u = 1, logits = (1/2 + 12, -1/2 + 20).
    const adapted scorer{.rank = 1, .alpha = 4.0};
    generator random(1);
    auto p = scorer.init<double, cpu>(1, 2, random, "r.");
    p.inner.weight.value()(0, 0) = 1.0;
    p.inner.weight.value()(1, 0) = -1.0;
    p.a.value()(0, 0) = 2.0;
    p.b.value()(0, 0) = 3.0;
    p.b.value()(0, 1) = 5.0;
    matrix<double, cpu> x(1, 1), logits(1, 2), dlogits(1, 2), dx(1, 1);
    x(0, 0) = 0.5;
    dlogits(0, 0) = 1.0;
    dlogits(0, 1) = 2.0;
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, {});
    CHECK(ctx.memory.used() == scorer.saved_bytes<double, cpu>(1, 1, 2));
    CHECK(logits(0, 0) == 12.5);
    CHECK(logits(0, 1) == 19.5);
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    // z = 4; du = 4 (1 * 3 + 2 * 5) = 52; dx = 1 - 2 + 52 * 2.
    CHECK(p.b.grad()(0, 0) == 4.0);
    CHECK(p.b.grad()(0, 1) == 8.0);
    CHECK(p.a.grad()(0, 0) == 26.0);
    CHECK(dx(0, 0) == 103.0);
    CHECK(p.inner.weight.grad()(0, 0) == 0.5);
    CHECK(p.inner.weight.grad()(1, 0) == 1.0);
    // Divided by the root of the rank.
    const adapted root{.rank = 4, .alpha = 4.0, .scaling = lora_scaling::by_root_rank};
    auto q = root.init<double, cpu>(1, 2, random, "");
    q.a.value()(0, 0) = q.b.value()(0, 0) = 1.0;
    for (index r = 1; r < 4; ++r) q.a.value()(r, 0) = 0.0;
    root.forward(ctx, q, x, logits.view(), mode::inference, {});
    CHECK(logits(0, 0) == q.inner.weight.value()(0, 0) * 0.5 + 2.0 * 0.5);
  }

  TEST_CASE("a fresh adapter is its inner scorer") {
    generator random(1);
    support::test_random numbers(2);
    const auto x = support::random_matrix<float>(numbers, 20, 4);
    matrix<float, cpu> logits(20, 6), alone(20, 6);
    context<cpu> ctx(1);
    const adapted scorer{.rank = 3, .inner = {.bias = true}};
    auto p = scorer.init<float, cpu>(4, 6, random, "r.");
    std::string names;
    p.visit([&](const parameter<float, cpu>& q) { names += q.name() + " "; });
    CHECK(names == "r.weight r.bias r.lora.A r.lora.B ");
    CHECK(testing::largest(p.a.value()) > 0.0);
    scorer.forward(ctx, p, x, logits.view(), mode::training, {});
    linear_scorer{}.forward(ctx, p.inner, x, alone.view(), mode::training, {});
    CHECK(support::same_bits(logits.view(), alone.view()));
    // On a weight that is there, which stays frozen or training.
    affine_params<float, cpu> base;
    base.weight = parameter<float, cpu>("w", support::random_matrix<float>(numbers, 6, 4));
    CHECK(scorer.adapt<float, cpu>(base, 4, 6, random, "").inner.weight.trainable());
    base.freeze();
    auto q = scorer.adapt<float, cpu>(base, 4, 6, random, "");
    CHECK(support::same_bits(q.inner.weight.value(), base.weight.value()));
    CHECK_FALSE(q.inner.weight.trainable());
    CHECK((q.a.trainable() && q.b.trainable()));
  }

  TEST_CASE("dropout concerns the update alone, in training alone") {
    generator random(1), drops(9, 3);
    support::test_random numbers(2);
    const auto x = support::random_matrix<double>(numbers, 20, 8);
    matrix<double, cpu> logits(20, 5), alone(20, 5), moved(20, 8), dx(20, 8), dx_moved(20, 8);
    const adapted scorer{.rank = 3, .dropout = 0.25};
    auto p = scorer.init<double, cpu>(8, 5, random, "");
    testing::detail::shake<double>(p, random, 0.5);
    context<cpu> ctx(1);
    batch_info<double, cpu> batch;
    batch.random = &drops;
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    CHECK(drops.next_stream() == 4);
    // logits of the update alone: those of the dropped tokens without the weight.
    ops::dropout(ctx, random_stream{9, 3}, 0.75f, x, moved.view());
    auto q = p;
    for (index i = 0; i < q.inner.weight.value().rows; ++i) {
      for (index d = 0; d < 8; ++d) q.inner.weight.value()(i, d) = 0.0;
    }
    const adapted plain{.rank = 3};
    matrix<double, cpu> update(20, 5);
    plain.forward(ctx, q, moved, update.view(), mode::training, {});
    linear_scorer{}.forward(ctx, p.inner, x, alone.view(), mode::training, {});
    const double bound = support::rounding_bound<double>(40.0, 100.0);
    for (index i = 0; i < logits.size(); ++i) {
      CHECK(support::within(logits.data()[i], alone.data()[i] + update.data()[i], bound));
    }
    CHECK_FALSE(support::same_bits(update.view(), logits.view()));
    const auto quiet = scorer.forward(ctx, p, x, logits.view(), mode::inference, batch);
    CHECK_FALSE(quiet.drops);
    CHECK(drops.next_stream() == 4);
    plain.forward(ctx, p, x, alone.view(), mode::training, {});
    CHECK(support::same_bits(logits.view(), alone.view()));
    // What was dropped gets no gradient of the update.
    const auto dlogits = support::random_matrix<double>(numbers, 20, 5);
    scorer.backward(ctx, q, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    for (index i = 0; i < x.size(); ++i) {
      CHECK((dx.data()[i] == 0.0) == (moved.data()[i] == 0.0));
    }
  }

  TEST_CASE("ranges, and training with dropout but without a generator, are refused") {
    generator random(1);
    const auto init = [&](const adapted& a) { a.init<float, cpu>(2, 2, random, ""); };
    CHECK_THROWS_WITH_AS(init({.rank = 0}),
                         "talpa::lora_scorer: 'rank' is 0, expected >= 1 = width of the adapter",
                         value_error);
    CHECK_THROWS_WITH_AS(init({.alpha = std::numeric_limits<double>::infinity()}),
                         "talpa::lora_scorer: 'alpha' is inf, expected a finite number",
                         value_error);
    CHECK_THROWS_WITH_AS(init({.dropout = 1.0}),
                         "talpa::lora_scorer: 'dropout' is 1, expected 0 <= dropout < 1",
                         value_error);
    const adapted scorer{.dropout = 0.5};
    auto p = scorer.init<float, cpu>(2, 2, random, "");
    matrix<float, cpu> x(2, 2), logits(2, 2);
    context<cpu> ctx(1);
    const batch_info<float, cpu> none;
    CHECK_THROWS_WITH_AS(scorer.forward(ctx, p, x, logits.view(), mode::training, none),
                         "talpa::lora_scorer: 'batch.random' is null, expected a generator = "
                         "source of the dropout mask in training",
                         value_error);
    CHECK_NOTHROW(scorer.forward(ctx, p, x, logits.view(), mode::inference, none));
  }

  TEST_CASE_TEMPLATE("laws of lora_scorer", T, TALPA_SCALARS) {
    // A sum of two maps, one through 4 ranks, times s = 4 and, with dropout, 4 / 3.
    const testing::scorer_claims claims{.amplification = 64.0};
    const adapted scorer{.rank = 4};
    support::obeys(testing::scorer_laws<T>(scorer, claims));
    support::obeys(
        testing::scorer_laws<T>(scorer, claims, {.tokens = 1, .inputs = 1, .experts = 1}));
    support::obeys(
        testing::scorer_laws<T>(scorer, claims, {.tokens = 9, .inputs = 8, .experts = 33}));
    support::obeys(testing::scorer_laws<T>(adapted{.rank = 4, .dropout = 0.25}, claims));
    // Normal numbers below 9 multiply what softplus makes of a linear map.
    const testing::scorer_claims noisy_claims{.amplification = 1024.0};
    support::obeys(testing::scorer_laws<T>(noisy<adapted>{.inner = {.rank = 2}}, noisy_claims));
  }
}

}  // namespace talpa::lora_scorer_test
