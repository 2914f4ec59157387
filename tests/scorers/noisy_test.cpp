// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/noisy.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::noisy_test {

static_assert(scorer_policy<noisy<linear_scorer>> && scorer_policy<jittered<linear_scorer>> &&
              scorer_policy<jittered<noisy<linear_scorer>>>);

TEST_SUITE("scorers/noisy") {
  TEST_CASE("noise begins with deviation ln 2 + floor and is the stream's") {
    const noisy<linear_scorer> scorer{.floor = 0.5};
    generator weights(1), noise(9, 3);
    auto p = scorer.init<double, cpu>(4, 6, weights, "r.");
    CHECK(p.noise.weight.name() == "r.noise.weight");
    CHECK(testing::largest(p.noise.weight.value()) == 0.0);
    support::test_random random(2);
    const auto x = support::random_matrix<double>(random, 20, 4);
    matrix<double, cpu> logits(20, 6), alone(20, 6);
    context<cpu> ctx(1);
    batch_info<double, cpu> batch;
    batch.random = &noise;
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    CHECK(noise.next_stream() == 4);
    CHECK(ctx.memory.used() == scorer.saved_bytes<double, cpu>(20, 4, 6));
    linear_scorer{}.forward(ctx, p.inner, x, alone.view(), mode::training, {});
    CHECK(support::same_bits(kept.clean, alone.view()));
    const double deviation = std::log(2.0) + 0.5;
    for (index i = 0; i < logits.size(); ++i) {
      const double z = normal<double>(random_stream{9, 3}, static_cast<std::uint64_t>(i));
      CHECK(support::within(kept.deviation.data[i], deviation,
                            support::rounding_bound<double>(10, deviation)));
      CHECK(support::within(
          logits.data()[i], alone.data()[i] + z * deviation,
          support::rounding_bound<double>(12, std::abs(alone.data()[i]) + 2.0 * std::abs(z))));
    }
    // Another call takes another stream.
    matrix<double, cpu> again(20, 6);
    scorer.forward(ctx, p, x, again.view(), mode::training, batch);
    CHECK_FALSE(support::same_bits(again.view(), logits.view()));
  }

  TEST_CASE("losses on clean logits and deviations reach all parameters") {
    const noisy<linear_scorer> scorer;
    generator weights(1), noise(9);
    auto p = scorer.init<double, cpu>(2, 2, weights, "");
    matrix<double, cpu> x(1, 2), logits(1, 2), zero(1, 2), dclean(1, 2), dsize(1, 2), dx(1, 2);
    x(0, 0) = 2.0;
    dclean(0, 0) = 1.0;
    dsize(0, 1) = 4.0;
    context<cpu> ctx(1);
    batch_info<double, cpu> batch;
    batch.random = &noise;
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    scorer.backward(ctx, p, kept, x, zero, dx.view(), grad_mode::overwrite,
                    {.dclean = dclean, .ddeviation = dsize});
    CHECK(p.inner.weight.grad()(0, 0) == 2.0);
    CHECK(p.inner.weight.grad()(1, 0) == 0.0);
    CHECK(p.noise.weight.grad()(0, 0) == 0.0);
    CHECK(p.noise.weight.grad()(1, 0) == 4.0);  // 4 sigmoid(0) x
    CHECK(dx(0, 0) == p.inner.weight.value()(0, 0));
  }

  TEST_CASE("at inference nothing is drawn and the inner scorer is left") {
    generator weights(1), noise(9);
    support::test_random random(2);
    const auto x = support::random_matrix<float>(random, 20, 4);
    const auto dlogits = support::random_matrix<float>(random, 20, 6);
    matrix<float, cpu> alone(20, 6), dx_alone(20, 4);
    context<cpu> ctx(1);
    const noisy<linear_scorer> a;
    const jittered<linear_scorer> b{.width = 0.5};
    auto p = a.init<float, cpu>(4, 6, weights, "");
    auto q = p.inner;
    linear_scorer{}.forward(ctx, p.inner, x, alone.view(), mode::inference, {});
    linear_scorer{}.backward(ctx, q, {}, x, dlogits, dx_alone.view(), grad_mode::overwrite);
    batch_info<float, cpu> batch;
    batch.random = &noise;
    matrix<float, cpu> logits(20, 6), dx(20, 4);
    const auto kept = a.forward(ctx, p, x, logits.view(), mode::inference, batch);
    a.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    CHECK(support::same_bits(logits.view(), alone.view()));
    CHECK(support::same_bits(dx.view(), dx_alone.view()));
    CHECK(testing::largest(p.noise.weight.grad()) == 0.0);
    const auto moved = b.forward(ctx, q, x, logits.view(), mode::inference, batch);
    CHECK(support::same_bits(logits.view(), alone.view()));
    CHECK_FALSE(moved.active);
    CHECK(noise == generator(9));
  }

  TEST_CASE("jitter moves the input by at most its width and leaves x alone") {
    generator weights(1), noise(9);
    support::test_random random(2);
    const auto x = support::random_matrix<double>(random, 200, 4);
    const matrix<double, cpu> before = x;
    const jittered<linear_scorer> scorer{.width = 0.25};
    auto p = scorer.init<double, cpu>(4, 6, weights, "");
    matrix<double, cpu> logits(200, 6), expected(200, 6);
    context<cpu> ctx(1);
    batch_info<double, cpu> batch;
    batch.random = &noise;
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, batch);
    CHECK(support::same_bits(x.view(), before.view()));
    double least = 2.0, most = 0.0;
    for (index i = 0; i < x.size(); ++i) {
      const double ratio = kept.moved.data[i] / x.data()[i];
      least = std::min(least, ratio);
      most = std::max(most, ratio);
    }
    const double slack = support::rounding_bound<double>(4, 2.0);
    CHECK(least >= 0.75 - slack);
    CHECK(most <= 1.25 + slack);
    // 800 numbers leave the outer tenth of either side empty once in 10^18 seeds.
    CHECK(least < 0.775);
    CHECK(most > 1.225);
    linear_scorer{}.forward(ctx, p, kept.moved, expected.view(), mode::training, {});
    CHECK(support::same_bits(logits.view(), expected.view()));
  }

  TEST_CASE("training without a generator and values out of range are refused") {
    generator random(1);
    context<cpu> ctx(1);
    matrix<float, cpu> x(2, 2), logits(2, 2);
    const noisy<linear_scorer> a;
    const jittered<linear_scorer> b;
    auto p = a.init<float, cpu>(2, 2, random, "");
    const batch_info<float, cpu> none;
    CHECK_THROWS_WITH_AS(a.forward(ctx, p, x, logits.view(), mode::training, none),
                         "talpa::noisy: 'batch.random' is null, expected a generator = source of "
                         "the noise in training",
                         value_error);
    CHECK_THROWS_WITH_AS(b.forward(ctx, p.inner, x, logits.view(), mode::training, none),
                         "talpa::jittered: 'batch.random' is null, expected a generator = source "
                         "of the jitter in training",
                         value_error);
    // Without width nothing is drawn.
    CHECK_NOTHROW(jittered<linear_scorer>{.width = 0.0}.forward(ctx, p.inner, x, logits.view(),
                                                                mode::training, none));
    CHECK_THROWS_WITH_AS((noisy<linear_scorer>{.floor = -1.0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::noisy: 'floor' is -1, expected >= 0", value_error);
    CHECK_THROWS_WITH_AS((jittered<linear_scorer>{.width = 1.0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::jittered: 'width' is 1, expected a number in [0, 1)", value_error);
  }

  TEST_CASE_TEMPLATE("laws of noisy and jittered", T, TALPA_SCALARS) {
    // Normal numbers below 9 multiply what softplus makes of a linear map.
    const testing::scorer_claims claims{.amplification = 64.0};
    support::obeys(testing::scorer_laws<T>(noisy<linear_scorer>{}, claims));
    support::obeys(testing::scorer_laws<T>(noisy<linear_scorer>{}, claims,
                                           {.tokens = 1, .inputs = 1, .experts = 1}));
    support::obeys(testing::scorer_laws<T>(noisy<linear_scorer>{}, claims,
                                           {.tokens = 9, .inputs = 8, .experts = 33}));
    support::obeys(testing::scorer_laws<T>(jittered<linear_scorer>{.width = 0.5}, claims));
    support::obeys(testing::scorer_laws<T>(
        jittered<noisy<linear_scorer>>{.width = 0.25, .inner = {}}, claims));
  }
}

}  // namespace talpa::noisy_test
