// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"
#include "support/scalars.hpp"
#include "support/tolerance.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/mix_logits.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/mixture_of_routers.hpp>
#include <talpa/testing/scorer_laws.hpp>

#include <doctest/doctest.h>

#include <cmath>

namespace talpa::mixture_of_routers_test {

namespace {
using by_probability = mixture_of_routers<mix::probability, linear_scorer>;
using by_logit = mixture_of_routers<mix::logit, linear_scorer>;

template <class P>
void set(P& p, std::initializer_list<double> values) {
  index i = 0;
  for (const double v : values) {
    p.value().data[i] = static_cast<std::remove_reference_t<decltype(p.value().data[0])>>(v);
    ++i;
  }
}
}  // namespace

TEST_SUITE("scorers/mixture_of_routers") {
  TEST_CASE("one token, two sub-routers, two experts, by hand") {
    // x = 1; a_0 = [ln 3, 0], a_1 = [0, ln 3], b = [ln 4, 0]: g = [4/5, 1/5].
    generator random(1);
    matrix<double, cpu> x(1, 1), logits(1, 2), dlogits(1, 2), dx(1, 1);
    x(0, 0) = 1.0;
    const double l3 = std::log(3.0), l4 = std::log(4.0);
    const auto prepare = [&](auto& p) {
      set(p.main.weight, {l4, 0.0});
      set(p.sub[0].weight, {l3, 0.0});
      set(p.sub[1].weight, {0.0, l3});
    };
    dlogits(0, 0) = 1.0;
    context<cpu> ctx(1);
    // A handful of roundings of numbers of size at most 2.
    const double bound = support::rounding_bound<double>(32, 2.0);
    {
      const by_probability scorer{.sub_routers = 2};
      auto p = scorer.init<double, cpu>(1, 2, random, "");
      prepare(p);
      const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, {});
      // s_0 = 4/5 3/4 + 1/5 1/4 = 13/20.
      CHECK(support::within(logits(0, 0), std::log(13.0 / 20.0), bound));
      CHECK(support::within(logits(0, 1), std::log(7.0 / 20.0), bound));
      CHECK(support::within(kept.weights.gates(0, 0), 0.8, bound));
      scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
      // q = [12/13, 1/13]; da_0 = q_0 [1/4, -1/4], da_1 = q_1 [3/4, -3/4]; db_0 = 12/13 - 4/5.
      CHECK(support::within(p.sub[0].weight.grad()(0, 0), 3.0 / 13.0, bound));
      CHECK(support::within(p.sub[0].weight.grad()(1, 0), -3.0 / 13.0, bound));
      CHECK(support::within(p.sub[1].weight.grad()(0, 0), 3.0 / 52.0, bound));
      CHECK(support::within(p.main.weight.grad()(0, 0), 8.0 / 65.0, bound));
      CHECK(support::within(p.main.weight.grad()(1, 0), -8.0 / 65.0, bound));
      CHECK(support::within(dx(0, 0), 8.0 / 65.0 * l4 + 3.0 / 13.0 * l3 - 3.0 / 52.0 * l3, bound));
    }
    {
      const by_logit scorer{.sub_routers = 2};
      auto p = scorer.init<double, cpu>(1, 2, random, "");
      prepare(p);
      const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, {});
      CHECK(support::within(logits(0, 0), 0.8 * l3, bound));
      CHECK(support::within(logits(0, 1), 0.2 * l3, bound));
      scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
      CHECK(support::within(p.sub[0].weight.grad()(0, 0), 0.8, bound));
      CHECK(p.sub[0].weight.grad()(1, 0) == 0.0);
      // db_0 = g_0 (a_00 - sum_r g_r a_r0) = 0.8 (ln 3 - 0.8 ln 3).
      CHECK(support::within(p.main.weight.grad()(0, 0), 0.16 * l3, bound));
    }
  }

  TEST_CASE_TEMPLATE("one sub-router is the inner scorer, bit for bit", Scorer, by_probability,
                     by_logit) {
    support::test_random random(2);
    generator weights(4);
    const Scorer scorer{.sub_routers = 1};
    auto p = scorer.template init<float, cpu>(6, 9, weights, "");
    const auto x = support::random_matrix<float>(random, 70, 6);
    const auto dlogits = support::random_matrix<float>(random, 70, 9);
    matrix<float, cpu> logits(70, 9), alone(70, 9), dx(70, 6), dx_alone(70, 6);
    context<cpu> ctx(1);
    const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, {});
    auto single = p.sub[0];
    linear_scorer{}.forward(ctx, single, x, alone.view(), mode::training, {});
    CHECK(support::same_bits(logits.view(), alone.view()));
    scorer.backward(ctx, p, kept, x, dlogits, dx.view(), grad_mode::overwrite);
    linear_scorer{}.backward(ctx, single, {}, x, dlogits, dx_alone.view(), grad_mode::overwrite);
    CHECK(support::same_bits(p.sub[0].weight.grad(), single.weight.grad()));
    CHECK(testing::largest(p.main.weight.grad()) == 0.0);
    for (index i = 0; i < dx.size(); ++i) CHECK(dx.data()[i] == dx_alone.data()[i]);
  }

  TEST_CASE_TEMPLATE("equal sub-routers are the inner one", Scorer, by_probability, by_logit) {
    support::test_random random(3);
    generator weights(4);
    const Scorer scorer{.sub_routers = 4, .top_m = 3};
    auto p = scorer.template init<double, cpu>(5, 7, weights, "");
    for (std::size_t r = 1; r < 4; ++r) {
      for (index i = 0; i < 35; ++i) {
        p.sub[r].weight.value().data[i] = p.sub[0].weight.value().data[i];
      }
    }
    const auto x = support::random_matrix<double>(random, 50, 5);
    matrix<double, cpu> logits(50, 7), alone(50, 7);
    context<cpu> ctx(1);
    scorer.forward(ctx, p, x, logits.view(), mode::training, {});
    linear_scorer{}.forward(ctx, p.sub[0], x, alone.view(), mode::training, {});
    for (index n = 0; n < 50; ++n) {
      double sum = 0.0;
      for (index e = 0; e < 7; ++e) sum += std::exp(alone(n, e));
      const bool normalised = std::is_same_v<Scorer, by_probability>;
      for (index e = 0; e < 7; ++e) {
        const double expected = alone(n, e) - (normalised ? std::log(sum) : 0.0);
        // Three gates that sum to 1, logarithms of numbers up to about 10.
        CHECK(support::within(logits(n, e), expected, support::rounding_bound<double>(40, 20.0)));
      }
    }
  }

  TEST_CASE_TEMPLATE("mixtures equal plain loops over random sizes", Scorer, by_probability,
                     by_logit) {
    support::test_random random(11);
    generator weights(5);
    for (int trial = 0; trial < 120; ++trial) {
      const index n = 1 + random.below(60), d = 1 + random.below(9);
      const index e = trial % 10 == 0 ? 65 + random.below(9) : 1 + random.below(20);
      const index r = 2 + random.below(7), m = random.below(r + 1);
      const Scorer scorer{.sub_routers = r, .top_m = m};
      auto p = scorer.template init<double, cpu>(d, e, weights, "");
      const auto x = support::random_matrix<double>(random, n, d, 4.0);
      matrix<double, cpu> logits(n, e);
      context<cpu> ctx(2);
      ctx.memory.reserve(scorer.template saved_bytes<double, cpu>(n, d, e));
      const auto kept = scorer.forward(ctx, p, x, logits.view(), mode::training, {});
      CHECK(ctx.memory.used() <= scorer.template saved_bytes<double, cpu>(n, d, e));
      for (index t = 0; t < n; ++t) {
        // How many others come before r in the order of (logit, lower index first).
        std::vector<double> g(static_cast<std::size_t>(r));
        double norm = 0.0;
        for (index i = 0; i < r; ++i) {
          index before = 0;
          for (index j = 0; j < r; ++j) {
            const double bi = kept.main_logits(t, i), bj = kept.main_logits(t, j);
            before += bj > bi || (bj == bi && j < i) ? 1 : 0;
          }
          const bool on = m == 0 || before < m;
          g[static_cast<std::size_t>(i)] = on ? std::exp(kept.main_logits(t, i)) : 0.0;
          CHECK(((kept.kept(t, 0) >> i) & 1u) == (on ? 1u : 0u));
          norm += g[static_cast<std::size_t>(i)];
        }
        for (index i = 0; i < r; ++i) {
          CHECK(support::within(kept.weights.gates(t, i), g[static_cast<std::size_t>(i)] / norm,
                                support::rounding_bound<double>(60 + double(r), 1.0)));
        }
        double size = 1.0;
        for (index i = 0; i < r * e; ++i) {
          size = std::max(size, std::abs(kept.sub_logits(t, i)));
        }
        for (index i = 0; i < e; ++i) {
          double mixed = 0.0;
          for (index q = 0; q < r; ++q) {
            double sum = 0.0;
            for (index j = 0; j < e; ++j) sum += std::exp(kept.sub_logits(t, q * e + j));
            const double a = kept.sub_logits(t, q * e + i);
            const bool probability = std::is_same_v<Scorer, by_probability>;
            mixed += g[static_cast<std::size_t>(q)] / norm * (probability ? std::exp(a) / sum : a);
          }
          const double expected = std::is_same_v<Scorer, by_probability> ? std::log(mixed) : mixed;
          // Exponents of size up to 2 size carry that many roundings; sums of e and r terms.
          CHECK(support::within(
              logits(t, i), expected,
              support::rounding_bound<double>(double(e + r) + 40.0, 8.0 * size + 20.0)));
        }
      }
    }
  }

  TEST_CASE("rows that cannot be mixed") {
    const double inf = std::numeric_limits<double>::infinity();
    context<cpu> ctx(1);
    matrix<double, cpu> main(2, 2), gates(2, 2), logs(2, 2), norm(2, 2), subs(2, 4), logits(2, 2);
    matrix<std::uint32_t, cpu> mask(2, 1);
    const mix_weights<double, cpu> w{gates.view(), logs.view()};
    main(0, 0) = 1.0;  // row 0 keeps router 0 alone; row 1 has a tie, which router 0 wins
    subs(0, 0) = 2.0;
    subs(0, 1) = -inf;
    subs(0, 2) = std::numeric_limits<double>::quiet_NaN();
    ops::mix_gates(ctx, 1, main, w, mask.view());
    CHECK(gates(1, 0) == 1.0);
    CHECK(gates(1, 1) == 0.0);
    CHECK(logs(1, 1) == -inf);
    CHECK(mask(1, 0) == 1u);
    ops::mix_logits(ctx, mix::probability{}, subs, w, norm.view(), logits.view());
    CHECK(logits(0, 0) == 0.0);  // an off router has no influence, NaN or not
    CHECK(logits(0, 1) == -inf);
    ops::mix_logits(ctx, mix::logit{}, subs, w, norm.view(), logits.view());
    CHECK(logits(0, 0) == 2.0);
    CHECK(logits(0, 1) == -inf);
    matrix<double, cpu> dlogits(2, 2), dsubs(2, 4), dlogs(2, 2), dmain(2, 2);
    dlogits(0, 0) = 1.0;
    ops::mix_logits(ctx, mix::probability{}, subs, w, norm.view(), logits.view());
    ops::mix_logits_backward(ctx, mix::probability{}, subs, w, norm, logits, dlogits, dsubs.view(),
                             dlogs.view());
    for (index i = 0; i < 4; ++i) CHECK(dsubs(0, i) == 0.0);
    CHECK(dlogs(0, 0) == 1.0);
    ops::mix_gates_backward(ctx, gates, dlogs, dmain.view());
    CHECK(dmain(0, 0) == 0.0);
    main(0, 1) = std::numeric_limits<double>::quiet_NaN();
    main(1, 0) = main(1, 1) = -inf;
    ops::mix_gates(ctx, 1, main, w, mask.view());
    for (index n = 0; n < 2; ++n) {
      CHECK(std::isnan(gates(n, 0)));
      CHECK(mask(n, 0) == 1u);
    }
    ops::mix_logits(ctx, mix::logit{}, subs, w, norm.view(), logits.view());
    CHECK(std::isnan(logits(1, 0)));
  }

  TEST_CASE("hyperparameters out of range are refused") {
    generator random(1);
    CHECK_THROWS_WITH_AS((by_logit{.sub_routers = 0}.init<float, cpu>(2, 2, random, "")),
                         "talpa::mixture_of_routers: 'sub_routers' is 0, expected 1..16 = "
                         "sub-routers of a mixture",
                         value_error);
    CHECK_THROWS_WITH_AS(
        (by_logit{.sub_routers = 2, .top_m = 3}.init<float, cpu>(2, 2, random, "")),
        "talpa::mixture_of_routers: 'top_m' is 3, expected 0..2 = sub-routers, or "
        "0 for all",
        value_error);
  }

  TEST_CASE_TEMPLATE("laws of mixture_of_routers", T, TALPA_SCALARS) {
    // Exponentials of sub-logits of size up to about 20, a logarithm, and R inner maps.
    const testing::scorer_claims claims{.amplification = 64.0};
    support::obeys(testing::scorer_laws<T>(by_probability{}, claims));
    support::obeys(testing::scorer_laws<T>(by_logit{}, claims));
    support::obeys(testing::scorer_laws<T>(by_probability{.sub_routers = 4, .top_m = 2}, claims));
    support::obeys(testing::scorer_laws<T>(by_logit{.sub_routers = 2, .top_m = 1}, claims,
                                           {.tokens = 9, .inputs = 8, .experts = 33}));
    support::obeys(testing::scorer_laws<T>(by_logit{.sub_routers = 1}, claims,
                                           {.tokens = 1, .inputs = 1, .experts = 1}));
  }
}

}  // namespace talpa::mixture_of_routers_test
