// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"
#include "support/laws.hpp"
#include "support/random.hpp"

#include <talpa/autograd/tape.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/group_loss.hpp>
#include <talpa/cpu/noise.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/losses/importance_cv2.hpp>
#include <talpa/losses/load_cv2.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/scorers/noisy.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/gradient_check.hpp>
#include <talpa/testing/parameters.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace talpa::router_noise_test {

using namespace support;

namespace {

constexpr index tokens = 12, inputs = 4, experts = 5;

template <class Scorer>
using top_two = router<Scorer, top_k<gate::renormalised>>;
using plain = top_two<noisy<linear_scorer>>;
using moved = top_two<jittered<noisy<linear_scorer>>>;

static_assert(noisy_scorer<noisy<linear_scorer>> && noisy_scorer<jittered<noisy<linear_scorer>>> &&
              !noisy_scorer<linear_scorer> && !noisy_scorer<jittered<linear_scorer>>);

template <class Router>
auto make_params(const Router& r) {
  generator g(3);
  auto p = r.template init<double, cpu>(inputs, experts, g, "router.");
  testing::detail::shake<double>(p, g, 0.5);
  return p;
}

/// A layer that gives its gates, for the tape.
template <class Router>
struct gates_of {
  Router router{};
  using params = typename Router::template params<double, cpu>;
  using saved = typename Router::template saved<double, cpu>;

  index output_width(const params&) const { return experts; }
  saved forward(context<cpu>& ctx, params& p, matrix_view<const double, cpu> x,
                matrix_view<double, cpu> y, mode m, const batch_info<double, cpu>& batch) const {
    const saved kept = router.forward(ctx, p, experts, x, m, batch);
    ops::copy(ctx, kept.routed.routing.gates, y);
    return kept;
  }
  void backward(context<cpu>& ctx, params& p, const saved& kept, matrix_view<const double, cpu> x,
                matrix_view<const double, cpu> dy, matrix_view<double, cpu> dx, grad_mode dx_mode,
                const routed_gradient<double, cpu>* from_losses) const {
    matrix<double, cpu> dgates(dy.rows, dy.cols);
    ops::copy(ctx, dy, dgates.view());
    router.backward(ctx, p, kept, x, dgates.view(), dx, dx_mode, from_losses);
  }
};

/// Gradients of load_cv2 of a router by x and by all its parameters against central differences,
/// with the same noise in each forward.
template <class Router>
void check_gradients(const Router& r) {
  auto p = make_params(r);
  test_random random(7);
  matrix<double, cpu> x = random_matrix<double>(random, tokens, inputs), dx(tokens, inputs);
  matrix<double, cpu> value(1, 1), one(1, 1), nothing(tokens, experts);
  matrix<double, cpu> dlogits(tokens, experts), dgates(tokens, experts), dclean(tokens, experts),
      ddeviation(tokens, experts);
  one(0, 0) = 1.0;
  context<cpu> ctx(1);
  std::vector<std::uint32_t> mask;
  const auto run = [&] {
    generator noise(5);
    batch_info<double, cpu> batch;
    batch.random = &noise;
    return r.forward(ctx, p, experts, x, mode::training, batch);
  };
  const auto kept = run();
  CHECK(kept.routed.noise.deviation.rows == tokens);
  const auto loss = load_cv2{}.forward(ctx, kept.routed);
  const routed_gradient<double, cpu> gradient{
      dlogits.view(), dgates.view(), {}, {dclean.view(), ddeviation.view()}};
  load_cv2{}.backward(ctx, kept.routed, loss, one, gradient, grad_mode::overwrite);
  testing::detail::fill_gradients<double>(p, 0.0);
  r.backward(ctx, p, kept, x, nothing.view(), dx.view(), grad_mode::overwrite, &gradient);
  std::vector<testing::gradient_probe> probes{{"x", x.view(), dx.view()}};
  testing::detail::add_probes(p, probes);
  for (const auto& probe : probes) {
    CAPTURE(probe.name);
    CHECK(testing::largest(probe.gradient) > 1e-4);
  }
  // Normal numbers below 6 multiply what softplus makes of a linear map.
  const double d = static_cast<double>(inputs), e = static_cast<double>(experts);
  const double logit = 8.0 * (d + 1.0) * std::max(1.0, testing::largest(x.view())) *
                       std::max(1.0, testing::detail::largest_weight<double>(p));
  obeys(testing::gradient_check(
      "load", probes, one,
      {.roundings = d + 2.0 * e + static_cast<double>(tokens) + 40.0, .magnitude = e * logit},
      [&] {
        const workspace<cpu>::scope scope(ctx.memory);
        const auto again = run();
        mask.assign(again.routed.routing.mask.data, again.routed.routing.mask.data + tokens);
        value(0, 0) = load_cv2{}.forward(ctx, again.routed).value(0, 0);
        return value.view();
      },
      [&] { return mask; }));
}

}  // namespace

TEST_SUITE("layers/router") {
  TEST_CASE("a loss on the noise of a router reaches all its parameters") {
    check_gradients(plain{.selector = {.k = 2}});
    check_gradients(moved{.scorer = {.width = 0.25, .inner = {}}, .selector = {.k = 2}});
  }

  TEST_CASE("at inference a router with noise shows its logits and no deviation") {
    const plain r{.selector = {.k = 2}};
    auto p = make_params(r);
    test_random random(7);
    const matrix<double, cpu> x = random_matrix<double>(random, tokens, inputs);
    context<cpu> ctx(1);
    const auto kept = r.forward(ctx, p, experts, x, mode::inference, batch_info<double, cpu>{});
    CHECK(kept.routed.noise.clean.data == kept.routed.logits.data);
    CHECK(kept.routed.noise.deviation.empty());
    CHECK(load_cv2{}.forward(ctx, kept.routed).value(0, 0) > 0.0);

    const top_two<linear_scorer> without{.selector = {.k = 2}};
    auto q = make_params(without);
    const auto quiet =
        without.forward(ctx, q, experts, x, mode::training, batch_info<double, cpu>{});
    CHECK(quiet.routed.noise.clean.empty());
    CHECK_THROWS_WITH_AS(load_cv2{}.forward(ctx, quiet.routed),
                         "talpa::load_cv2: 'layers[0].noise.clean' has shape [0, 0], expected [12, "
                         "5] = shape of logits, from a scorer that adds noise",
                         shape_error);
  }

  TEST_CASE("a tape carries gradients on noise, beside losses that do not look at it") {
    const gates_of<plain> layer{{.scorer = {}, .selector = {.k = 2}}};
    auto p = make_params(layer.router);
    test_random random(7);
    const matrix<double, cpu> x = random_matrix<double>(random, tokens, inputs);
    // Gradient of the noise's weight by the sum of the losses that `apply` puts on the tape.
    const auto weight_gradient = [&](auto apply) {
      generator noise(5);
      batch_info<double, cpu> batch;
      batch.random = &noise;
      testing::detail::fill_gradients<double>(p, 0.0);
      context<cpu> ctx(1);
      {
        // What lies in memory before must not show.
        const workspace<cpu>::scope scope(ctx.memory);
        ops::fill(ctx, std::numeric_limits<double>::quiet_NaN(), ctx.memory.take<double>(64, 64));
      }
      tape<double, cpu> t(ctx);
      const auto out = t.apply(layer, p, t.constant(x), mode::training, batch);
      t.backward(apply(t, out.routed));
      return matrix<double, cpu>(p.scorer.noise.weight.grad());
    };
    const auto load = weight_gradient(
        [](auto& t, const auto& routed) { return t.apply_loss(load_cv2{}, {routed}); });
    const auto importance = weight_gradient(
        [](auto& t, const auto& routed) { return t.apply_loss(importance_cv2{}, {routed}); });
    CHECK(testing::largest(load.view()) > 1e-4);
    const auto agrees = [&](const matrix<double, cpu>& found, double loads, double importances) {
      for (index i = 0; i < found.size(); ++i) {
        const double expected = loads * load.data()[i] + importances * importance.data()[i];
        CHECK(std::abs(found.data()[i] - expected) <=
              testing::gamma<double>(64.0) * (loads * testing::largest(load.view()) +
                                              importances * testing::largest(importance.view())));
      }
    };
    agrees(weight_gradient([](auto& t, const auto& routed) {
             return t.weighted_sum({{t.apply_loss(load_cv2{}, {routed}), 1.0},
                                    {t.apply_loss(importance_cv2{}, {routed}), 1.0}});
           }),
           1.0, 1.0);
    agrees(weight_gradient([](auto& t, const auto& routed) {
             return t.weighted_sum({{t.apply_loss(importance_cv2{}, {routed}), 1.0},
                                    {t.apply_loss(load_cv2{}, {routed}), 1.0}});
           }),
           1.0, 1.0);
    // A layer given twice.
    agrees(weight_gradient([](auto& t, const auto& routed) {
             return t.apply_loss(load_cv2{}, {routed, routed});
           }),
           2.0, 0.0);
  }
}

}  // namespace talpa::router_noise_test
