// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"

#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/route.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/routing/statistics.hpp>
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

namespace talpa::router_test {

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

/// Selector with every optional member: on are the experts whose logit and bias together are within
/// 1 of the best; gates p_e sigmoid(control), doubled in training.
struct optional_members {
  static constexpr const char* name = "optional_members";
  static constexpr bool unit_mass = false;
  static constexpr bool has_bias = true;
  using control_scorer = linear_scorer;

  linear_scorer control{.bias = true};
  double factor = 2.0;

  void validate(index) const {}
  TALPA_HD index max_selected(index e) const { return e; }
  TALPA_HD optional_members at(mode m) const {
    return {control, m == mode::training ? factor : 1.0};
  }

  template <class G, class T>
  TALPA_HD void select(const G& g, const select_row<T>& row) const {
    const auto u = row_logits(g, row.logits);
    const auto shifted = [&](auto e) { return u[e] + g.load(row.bias, e, T{0}); };
    const auto bar = g.template max<T>(shifted) - g.uniform(T{1});
    g.store_mask(row.mask, [&](auto e) { return shifted(e) >= bar; });
    replay(g, row);
  }
  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    const auto p = exponentials<T>(g, row_logits(g, row.logits));
    const auto scale =
        math::mul(math::sigmoid(g.load(row.control)), g.uniform(static_cast<T>(factor)));
    g.for_each([&](auto e) {
      const auto gate = math::mul(scale, p.weight[e] / p.sum);
      g.store(row.gates, e, talpa::select(g.load_bit(row.recorded(), e), gate, g.uniform(T{0})));
    });
  }
  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    const auto p = exponentials<T>(g, row_logits(g, row.logits));
    const auto c = g.load(row.control);
    const auto times = g.uniform(static_cast<T>(factor));
    const auto weight = [&](auto e) { return p.weight[e] / p.sum; };
    const auto dgate = [&](auto e) {
      return talpa::select(g.load_bit(row.mask, e), g.load(row.dgates, e, T{0}), g.uniform(T{0}));
    };
    const auto mean = g.template sum<T>([&](auto e) { return math::mul(weight(e), dgate(e)); });
    const auto scale = math::mul(math::sigmoid(c), times);
    g.for_each([&](auto e) {
      g.store(row.dlogits, e, math::mul(scale, math::mul(weight(e), dgate(e) - mean)));
    });
    g.store(row.dcontrol, math::mul(math::mul(math::sigmoid_derivative(c), times), mean));
  }
};
static_assert(selector_policy<optional_members> && controlled_selector<optional_members> &&
              biased_selector<optional_members> && modal_selector<optional_members> &&
              !coupled_selector<optional_members>);

/// Selector that gives token n of its sequence expert n mod E, whatever the logits.
struct in_turns {
  static constexpr const char* name = "in_turns";
  static constexpr bool unit_mass = false;
  static constexpr bool couples_rows = true;

  void validate(index) const {}
  TALPA_HD index max_selected(index) const { return 1; }
  template <class T, class B>
  void assign(context<B>&, const assign_batch<T, B>& batch,
              matrix_view<std::uint32_t, B> mask) const {
    index place = 0;
    for (index n = 0; n < mask.rows; ++n) {
      if (n % batch.sequence() == 0) place = 0;
      mask(n, 0) = 0;
      if (!batch.padding_mask.empty() && batch.padding_mask[n] == 0) continue;
      mask(n, 0) = 1u << (place++ % batch.logits.cols);
    }
  }
  template <class G, class T>
  TALPA_HD void replay(const G& g, const select_row<T>& row) const {
    weigh<gate::raw>(g, row, exponentials<T>(g, row_logits(g, row.logits)));
  }
  template <class G, class T>
  TALPA_HD void select_backward(const G& g, const select_gradient_row<T>& row) const {
    weigh_backward<gate::raw>(g, row);
  }
};
static_assert(selector_policy<in_turns> && coupled_selector<in_turns>);

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

  TEST_CASE("a forward that measures leaves what measure does, a recorded mask too") {
    support::test_random random(95);
    const matrix<double, cpu> x = support::random_matrix<double>(random, 12, inputs);
    auto p = make_params<double>(two, 2);
    vector<std::uint8_t, cpu> real(12);
    for (index n = 0; n < 12; ++n) real[n] = n == 3 ? 0 : 1;
    matrix<std::uint32_t, cpu> recorded(12, 1);
    for (index n = 0; n < 12; ++n) recorded(n, 0) = 0b10001u;
    context<cpu> ctx(1);
    for (const bool replays : {false, true}) {
      batch_info<double, cpu> batch{.padding_mask = real.view()};
      if (replays) batch.replay = recorded.view();
      const auto plain = two.forward(ctx, p, experts, x, mode::training, batch);
      const statistics_report expected(measure(ctx, plain.routed));
      const auto found = make_statistics<double>(ctx.memory, experts);
      const auto kept = two.forward(ctx, p, experts, x, mode::training, batch,
                                    found.wanted(grad_mode::overwrite));
      CHECK(routing<double, cpu>(kept.routed.routing) ==
            routing<double, cpu>(plain.routed.routing));
      CHECK(kept.routed.totals.out.counts.data == found.totals.counts.data);
      const statistics_report report(found);
      CHECK(report.tokens == 11);
      CHECK(report.counts == expected.counts);
      CHECK(report.importance == expected.importance);
      CHECK(report.probability == expected.probability);
      CHECK(report.entropy == expected.entropy);
      CHECK(report.squared_logsumexp == expected.squared_logsumexp);
    }
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
      matrix<double, cpu> loss_control(kept.routed.control.rows, 1);
      const routed_gradient<double, cpu> from_losses{loss_logits.view(), loss_gates.view(),
                                                     loss_control.view()};
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
      check(router<linear_scorer, optional_members>{}, losses);
      check(router<linear_scorer, in_turns>{}, losses);
    }
  }

  TEST_CASE("a selector gets its control, its bias and the mode") {
    support::test_random random(94);
    const matrix<double, cpu> x = support::random_matrix<double>(random, tokens, inputs);
    const router<linear_scorer, optional_members> r{};
    auto p = make_params<double>(r, 6);
    CHECK(p.scorer.weight.name() == "router.weight");
    CHECK(p.control.weight.name() == "router.control.weight");
    CHECK(p.control.weight.rows() == 1);
    CHECK(p.expert_bias.name() == "router.expert_bias");
    CHECK_FALSE(p.expert_bias.trainable());
    p.freeze();
    CHECK_FALSE(p.control.trainable());
    p.train();
    CHECK((p.scorer.trainable() && p.control.trainable() && !p.expert_bias.trainable()));

    context<cpu> ctx(1);
    ctx.memory.reserve(r.saved_bytes<double, cpu>(tokens, inputs, experts));
    const long blocks = static_cast<long>(ctx.memory.allocations());
    const auto kept = r.forward(ctx, p, experts, x, mode::training, batch_info<double, cpu>{});
    CHECK(static_cast<long>(ctx.memory.allocations()) == blocks);
    const auto still = r.forward(ctx, p, experts, x, mode::inference, batch_info<double, cpu>{});
    matrix<double, cpu> control(tokens, 1);
    affine_forward<cpu, double>(ctx, p.control, x, control.view());
    CHECK(testing::first_difference<double>(kept.routed.control, control.view()) == "");
    for (index n = 0; n < tokens; ++n) {
      double best = -1e300;
      for (index e = 0; e < experts; ++e) {
        best = std::max(best, kept.routed.logits(n, e) + p.expert_bias.value()(0, e));
      }
      for (index e = 0; e < experts; ++e) {
        const double shifted = kept.routed.logits(n, e) + p.expert_bias.value()(0, e);
        CHECK(kept.routed.routing.on(n, e) == (shifted >= best - 1.0));
        // Doubling is exact.
        CHECK(kept.routed.routing.gates(n, e) == 2.0 * still.routed.routing.gates(n, e));
      }
    }
  }

  TEST_CASE("a selector that couples rows gets the sequences and the padding") {
    support::test_random random(95);
    const matrix<double, cpu> x = support::random_matrix<double>(random, 12, inputs);
    const router<linear_scorer, in_turns> r{};
    auto p = make_params<double>(r, 7);
    vector<std::uint8_t, cpu> real(12);
    for (index n = 0; n < 12; ++n) real[n] = n == 7 ? 0 : 1;
    context<cpu> ctx(1);
    const auto kept =
        r.forward(ctx, p, experts, x, mode::training,
                  batch_info<double, cpu>{.padding_mask = real.view(), .sequence_length = 6});
    const index expert[] = {0, 1, 2, 3, 4, 0, 0, -1, 1, 2, 3, 4};
    for (index n = 0; n < 12; ++n) {
      for (index e = 0; e < experts; ++e) CHECK(kept.routed.routing.on(n, e) == (e == expert[n]));
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

}  // namespace talpa::router_test
