// SPDX-License-Identifier: Apache-2.0
#include "support/eigen_product.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/bounds.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/parameters.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace talpa {

namespace {

constexpr index tokens = 11, inputs = 6, experts = 5;

using top_two = router<linear_scorer, top_k<gate::renormalised>>;
const top_two two{.scorer = {.bias = true}, .selector = {.k = 2}};

template <class T, class Router>
auto make_params(const Router& r, std::uint64_t seed) {
  generator g(seed);
  auto p = r.template init<T, cpu>(inputs, experts, g, "router.");
  testing::detail::shake<T>(p, g, 0.5);
  return p;
}

}  // namespace

TEST_SUITE("layers/router") {
  TEST_CASE("a router is its scorer and then its selector") {
    support::test_random random(90);
    const matrix<double, cpu> x = support::random_matrix<double>(random, tokens, inputs);
    auto p = make_params<double>(two, 1);
    CHECK(p.scorer.weight.name() == "router.weight");
    context<cpu> ctx(1);
    const auto kept = two.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});
    matrix<double, cpu> logits(tokens, experts);
    two.scorer.forward(ctx, p.scorer, x, logits.view(), mode::training, {});
    routing<double, cpu> expected(tokens, experts);
    ops::select(ctx, two.selector, logits, {}, expected.gates.view(), expected.mask.view());
    CHECK(testing::first_difference<double>(kept.routed.logits, logits.view()) == "");
    CHECK(routing<double, cpu>(kept.routed.routing) == expected);
    CHECK(kept.routed.sequence_length == 0);
    CHECK(ctx.scratch.used() == 0);
  }

  TEST_CASE("what a batch says reaches the routing") {
    support::test_random random(91);
    const matrix<double, cpu> x = support::random_matrix<double>(random, 12, inputs);
    auto p = make_params<double>(two, 2);
    vector<std::uint8_t, cpu> real(12);
    for (index n = 0; n < 12; ++n) real[n] = n == 3 ? 0 : 1;
    context<cpu> ctx(1);
    const auto kept =
        two.forward(ctx, p, experts, x, mode::training,
                    batch_info<double, cpu>{.padding_mask = real.view(), .sequence_length = 4});
    CHECK(kept.routed.sequence_length == 4);
    CHECK(kept.routed.padding_mask.data == real.data());
    CHECK(kept.routed.routing.mask(3, 0) == 0u);
    CHECK(kept.routed.routing.mask(4, 0) != 0u);

    matrix<std::uint32_t, cpu> recorded(12, 1);
    for (index n = 0; n < 12; ++n) recorded(n, 0) = 0b10001u;
    const auto again = two.forward(
        ctx, p, experts, x, mode::training,
        batch_info<double, cpu>{.padding_mask = real.view(), .replay = recorded.view()});
    for (index n = 0; n < 12; ++n) {
      CHECK(again.routed.routing.mask(n, 0) == (n == 3 ? 0u : 0b10001u));
      CHECK(again.routed.routing.gates(n, 1) == 0.0);
      const double sum = again.routed.routing.gates(n, 0) + again.routed.routing.gates(n, 4);
      CHECK(std::abs(sum - (n == 3 ? 0.0 : 1.0)) <= testing::gamma<double>(experts + 2.0));
    }
    // The recording is read, not written.
    CHECK(recorded(3, 0) == 0b10001u);
  }

  TEST_CASE("gradients of any pair equal differences, those of losses included") {
    support::test_random random(92);
    const auto check = [&](const auto& r, bool losses) {
      auto p = make_params<double>(r, 3);
      matrix<double, cpu> x = support::random_matrix<double>(random, tokens, inputs);
      // A loss that is linear in logits and gates, with these slopes.
      const matrix<double, cpu> on_logits = testing::cotangent(tokens, experts, 5);
      const matrix<double, cpu> on_gates = testing::cotangent(tokens, experts, 6);
      const matrix<double, cpu> upstream = testing::cotangent(2 * tokens, experts, 7);
      matrix<double, cpu> out(2 * tokens, experts), dgates(tokens, experts), dx(tokens, inputs);
      matrix<double, cpu> ones(2 * tokens, experts);
      context<cpu> ctx(1);
      std::vector<std::uint32_t> mask;
      // Output: gates and, below, logits; projected on what backward gets for them.
      const auto forward = [&] {
        const workspace<cpu>::scope scope(ctx.memory);
        const auto kept = r.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});
        mask.assign(kept.routed.routing.mask.data, kept.routed.routing.mask.data + tokens);
        for (index n = 0; n < tokens; ++n) {
          for (index e = 0; e < experts; ++e) {
            out(n, e) = kept.routed.routing.gates(n, e);
            out(tokens + n, e) = losses ? kept.routed.logits(n, e) : 0.0;
          }
        }
        return out.view();
      };
      const auto kept = r.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});
      matrix<double, cpu> loss_logits = on_logits, loss_gates = on_gates;
      const routed_gradient<double, cpu> from_losses{loss_logits.view(), loss_gates.view()};
      for (index n = 0; n < tokens; ++n) {
        for (index e = 0; e < experts; ++e) {
          dgates(n, e) = upstream(n, e);
          ones(n, e) = upstream(n, e) + (losses ? on_gates(n, e) : 0.0);
          ones(tokens + n, e) = losses ? on_logits(n, e) : 0.0;
        }
      }
      testing::detail::fill_gradients<double>(p, 0.0);
      r.backward(ctx, p, kept, x, dgates.view(), dx.view(), grad_mode::overwrite,
                 losses ? &from_losses : nullptr);
      CHECK(testing::first_difference(loss_logits, on_logits) == "");
      CHECK(testing::first_difference(loss_gates, on_gates) == "");
      std::vector<testing::gradient_probe> probes{{"x", x.view(), dx.view()}};
      testing::detail::add_probes(p, probes);
      const double d = static_cast<double>(inputs), e = static_cast<double>(experts);
      const double logit = (d + 1.0) * std::max(1.0, testing::largest(x.view())) *
                           std::max(1.0, testing::detail::largest_weight<double>(p));
      support::obeys(
          testing::gradient_check("router", probes, ones,
                                  {.roundings = d + 2.0 * e + 16.0,
                                   .magnitude = 2.0 * static_cast<double>(out.size()) * logit},
                                  forward, [&] { return mask; }));
    };
    for (const bool losses : {false, true}) {
      check(two, losses);
      check(router<linear_scorer, top_k<gate::raw>>{.scorer = {}, .selector = {.k = 1}}, losses);
      check(router<linear_scorer, dense>{}, losses);
    }
  }

  TEST_CASE("an ignored dx needs no memory") {
    support::test_random random(93);
    const matrix<float, cpu> x = support::random_matrix<float>(random, tokens, inputs);
    auto p = make_params<float>(two, 4);
    context<cpu> ctx(1);
    const auto kept = two.forward(ctx, p, experts, x, mode::training, batch_info<float, cpu>{});
    matrix<float, cpu> dgates = support::random_matrix<float>(random, tokens, experts);
    CHECK_NOTHROW(two.backward(ctx, p, kept, x, dgates.view(), {}, grad_mode::ignore, nullptr));
    CHECK(testing::largest(p.scorer.weight.grad()) > 0.0);
  }

  TEST_CASE("a batch that does not fit is refused, by the name of the selector") {
    const matrix<float, cpu> x(tokens, inputs);
    auto p = make_params<float>(two, 5);
    context<cpu> ctx(1);
    const auto forward = [&](const batch_info<float, cpu>& batch) {
      two.forward(ctx, p, experts, x, mode::training, batch);
    };
    const vector<std::uint8_t, cpu> flags(3);
    CHECK_THROWS_WITH_AS(
        forward({.padding_mask = flags.view()}),
        "talpa::top_k: 'padding_mask' has shape [3], expected [11] = one flag a token",
        shape_error);
    for (const index length : {2, -1}) {
      CHECK_THROWS_AS(forward({.sequence_length = length}), value_error);
    }
    CHECK_THROWS_WITH_AS(forward({.sequence_length = 2}),
                         "talpa::top_k: 'sequence_length' is 2, expected a divisor of 11 = tokens, "
                         "or 0",
                         value_error);
    const matrix<std::uint32_t, cpu> mask(10, 1);
    CHECK_THROWS_WITH_AS(
        forward({.replay = mask.view()}),
        "talpa::top_k: 'replay' has shape [10, 1], expected [11, 1] = tokens, mask "
        "words of the experts",
        shape_error);
    CHECK_NOTHROW(forward({.sequence_length = 11}));
    generator g(1);
    const top_two greedy{.scorer = {}, .selector = {.k = 6}};
    CHECK_THROWS_WITH_AS((greedy.init<float, cpu>(inputs, experts, g, "")),
                         "talpa::top_k: 'k' is 6, expected 1..5 = experts", value_error);
  }
}

}  // namespace talpa
