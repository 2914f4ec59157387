// SPDX-License-Identifier: Apache-2.0
#include "support/cpu_products.hpp"

#include <talpa/presets/ada_mole.hpp>
#include <talpa/presets/ceft.hpp>
#include <talpa/presets/dyn_mole.hpp>
#include <talpa/presets/esft.hpp>
#include <talpa/presets/factor_llm.hpp>
#include <talpa/presets/goat.hpp>
#include <talpa/presets/gw_moe.hpp>
#include <talpa/presets/hydra_lora.hpp>
#include <talpa/presets/ld_mole.hpp>
#include <talpa/presets/lora_moe.hpp>
#include <talpa/presets/mix_lora.hpp>
#include <talpa/presets/mola.hpp>
#include <talpa/presets/mor.hpp>
#include <talpa/presets/parrot.hpp>
#include <talpa/presets/perft.hpp>
#include <talpa/presets/re_moe.hpp>
#include <talpa/presets/smora.hpp>
#include <talpa/talpa.hpp>
#include <talpa/testing/parameters.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <utility>
#include <vector>

namespace talpa::presets_test {

namespace {

constexpr index tokens = 24, inputs = 6, outputs = 5;

/// One step of a layer with its losses: everything is finite, and each of the router's parameters
/// gets a gradient unless it never has one.
template <class Layer, class Losses>
void trains(const Layer& layer, const Losses& losses, double deviation = 1.0) {
  generator random(3);
  auto base = linear{}.init<float, cpu>(inputs, outputs, random, "base.");
  base.freeze();
  auto params = layer.init(std::move(base), random);
  fill_normal(params.expert.b.value(), 0.3, random);
  matrix<float, cpu> x(tokens, inputs), y(tokens, outputs), dx(tokens, inputs);
  fill_normal(x.view(), deviation, random);
  std::vector<std::int32_t> kinds = {0, 1};

  context<cpu> ctx(1);
  batch_info<float, cpu> batch{.sequence_length = tokens / 2, .random = &random};
  batch.labels = {kinds.data(), 2};
  const auto kept = layer.forward(ctx, params, x, y.view(), mode::training, batch);
  const auto found = losses.forward(ctx, kept.routed);
  matrix<float, cpu> one(1, 1), dlogits(tokens, layer.experts), dgates(tokens, layer.experts);
  matrix<float, cpu> dcontrol(kept.routed.control.rows, 1);
  one(0, 0) = 1.0F;
  const routed_gradient<float, cpu> gradient{dlogits.view(), dgates.view(), dcontrol.view()};
  losses.backward(ctx, kept.routed, found, one, gradient, grad_mode::overwrite);
  layer.backward(ctx, params, kept, x, y, dx.view(), grad_mode::overwrite, &gradient);

  CHECK(std::isfinite(found.value(0, 0)));
  CHECK(std::isfinite(testing::largest(y.view())));
  CHECK(testing::largest(dx.view()) > 0.0);
  params.router.visit([&](const parameter<float, cpu>& p) {
    CAPTURE(p.name());
    if (p.trainable()) CHECK(testing::largest(p.grad()) > 0.0);
  });
}

}  // namespace

TEST_SUITE("presets") {
  TEST_CASE("mola") {
    CHECK(presets::mola.router.selector.k == 2);
    CHECK(presets::mola.expert.rank == 8);
    trains(presets::mola, presets::mola_losses);
  }
  TEST_CASE("lora_moe") {
    CHECK(presets::lora_moe.expert.rank == 4);
    CHECK(presets::lora_moe.expert.alpha == 32.0);
    trains(presets::lora_moe, presets::lora_moe_losses);
  }
  TEST_CASE("hydra_lora") {
    CHECK(presets::hydra_lora.expert.scale() == 8.0);
    trains(presets::hydra_lora, presets::mola_losses);
  }
  TEST_CASE("mix_lora") {
    CHECK(presets::mix_lora.expert.scale() == 2.0);
    CHECK(presets::mix_lora.router.selector.k == 2);
    // One step: everything that trains gets a gradient.
    generator random(3);
    auto base = swiglu{.hidden = 4}.init<float, cpu>(inputs, inputs, 1, random, "base.");
    base.freeze();
    auto params = presets::mix_lora.init<float, cpu>(std::move(base), random);
    for (auto* bank : {&params.gate, &params.up, &params.down}) {
      fill_normal(bank->b.value(), 0.3, random);
    }
    matrix<float, cpu> x(tokens, inputs), y(tokens, inputs), dx(tokens, inputs);
    fill_normal(x.view(), 1.0, random);
    context<cpu> ctx(1);
    batch_info<float, cpu> batch;
    batch.random = &random;
    const auto kept = presets::mix_lora.forward(ctx, params, x, y.view(), mode::training, batch);
    const auto found = presets::mix_lora_losses.forward(ctx, kept.routed);
    CHECK(found.value(0, 0) > 1e-3F);
    matrix<float, cpu> one(1, 1), dlogits(tokens, 8), dgates(tokens, 8);
    one(0, 0) = 1.0F;
    const routed_gradient<float, cpu> gradient{dlogits.view(), dgates.view()};
    presets::mix_lora_losses.backward(ctx, kept.routed, found, one, gradient, grad_mode::overwrite);
    presets::mix_lora.backward(ctx, params, kept, x, y, dx.view(), grad_mode::overwrite, &gradient);
    params.visit([](const parameter<float, cpu>& p) {
      CAPTURE(p.name());
      if (p.trainable()) CHECK(testing::largest(p.grad()) > 0.0);
    });
  }
  TEST_CASE("factor_llm") {
    CHECK(presets::factor_llm.experts == 4);
    CHECK(presets::factor_llm.router.selector.k == 2);
    CHECK(presets::factor_llm.scale() == 2.0);
    // One step: experts learn from the task, the router with its bias from the losses alone.
    generator random(3);
    auto dense = dense_ffn<>{}.init<float, cpu>(inputs, 8, random);
    auto params = presets::factor_llm.split(dense, contiguous_split(8, 4), random);
    matrix<float, cpu> x(tokens, inputs), y(tokens, inputs), dx(tokens, inputs);
    matrix<float, cpu> target(tokens, inputs), one(1, 1), dlogits(tokens, 4), dgates(tokens, 4);
    fill_normal(x.view(), 1.0, random);
    one(0, 0) = 1.0F;
    context<cpu> ctx(1);
    infer(ctx, dense_ffn<>{}, dense, x, target.view());
    const auto kept = presets::factor_llm.forward(ctx, params, x, y.view(), mode::training);
    routed_view<float, cpu> labelled = kept.routed;
    labelled.routing = presets::factor_llm.label(ctx, params, x, target).chosen;
    const routed_gradient<float, cpu> gradient{dlogits.view(), dgates.view()};
    const auto balance = presets::factor_llm_losses.forward(ctx, kept.routed);
    const auto route = presets::factor_llm_route_losses.forward(ctx, labelled);
    CHECK(balance.value(0, 0) > 0.0F);
    CHECK(route.value(0, 0) > 0.0F);
    presets::factor_llm_losses.backward(ctx, kept.routed, balance, one, gradient,
                                        grad_mode::overwrite);
    presets::factor_llm_route_losses.backward(ctx, labelled, route, one, gradient,
                                              grad_mode::accumulate);
    presets::factor_llm.backward(ctx, params, kept, x, y, dx.view(), grad_mode::overwrite,
                                 &gradient);
    params.visit([](const parameter<float, cpu>& p) {
      CAPTURE(p.name());
      CHECK(testing::largest(p.grad()) > 0.0);
    });
  }
  TEST_CASE("dyn_mole") {
    CHECK(presets::dyn_mole.experts == 6);
    CHECK(presets::dyn_mole.router.selector.entropy.q == 1.1);
    CHECK(presets::dyn_mole.router.selector.threshold == 0.9);
    trains(presets::dyn_mole, presets::dyn_mole_losses);
  }
  TEST_CASE("goat") {
    const auto layer = presets::goat(12);
    // sqrt(3 D / R) = 6.
    CHECK(layer.expert.scale() == 6.0);
    CHECK(presets::goat_segments.rho == 10.0);
    trains(layer, presets::goat_losses);
  }
  TEST_CASE("gw_moe") {
    // 1.8 nats of ln 8, to the two digits that are documented.
    CHECK(std::abs(presets::gw_moe.router.selector.threshold - 1.8 / std::log(8.0)) < 0.005);
    trains(presets::gw_moe, presets::gw_moe_losses);
  }
  TEST_CASE("mor") {
    CHECK(presets::mor.router.scorer.sub_routers == 3);
    trains(presets::mor, presets::mor_losses);
  }
  TEST_CASE("ada_mole") {
    CHECK(presets::ada_mole.router.selector.relative == 1.0);
    trains(presets::ada_mole, presets::ada_mole_losses);
  }
  TEST_CASE("re_moe") {
    CHECK(presets::re_moe_controller.coefficient == 1e-8);
    trains(presets::re_moe, presets::re_moe_loss);
  }
  TEST_CASE("smora") {
    CHECK(presets::smora.expert.rank == 1);
    CHECK(presets::smora.experts == 64);
    CHECK(presets::smora.expert.scale() == 2.0);
    auto layer = presets::smora;
    // The bias has no gradient, and the loss of other presets is none of this one.
    trains(layer, losses{term{0.0, load_balance<balance::per_rank, balance::pooled>{}}});
    // A bias can choose a rank, and changes no weight.
    generator random(3);
    auto params =
        layer.init<float, cpu>(linear{}.init<float, cpu>(inputs, outputs, random, ""), random);
    matrix<float, cpu> x(tokens, inputs), y(tokens, outputs);
    fill_normal(x.view(), 1.0, random);
    context<cpu> ctx(1);
    for (index e = 0; e < 8; ++e) params.router.expert_bias.value()(0, e) = 1.0F;
    const auto kept = layer.forward(ctx, params, x, y.view(), mode::inference);
    double mass = 0.0;
    for (index e = 0; e < 8; ++e) {
      CHECK(kept.routed.routing.gates(5, e) > 0.0F);
      mass += static_cast<double>(kept.routed.routing.gates(5, e));
    }
    CHECK(mass < 1.0);
  }
  TEST_CASE("ld_mole") {
    CHECK(presets::ld_mole.router.selector.control.hidden == 512);
    CHECK(presets::ld_mole.router.selector.control.initial_bias == -2.5);
    // Large inputs: the hidden units begin at -2.5, in front of a relu.
    trains(presets::ld_mole, presets::ld_mole_losses, 8.0);
  }

  TEST_CASE("the blocks of PERFT and Parrot accept their numbers") {
    presets::perft_r.validate();
    presets::perft_e.validate();
    presets::perft_d.validate();
    presets::perft_s.validate();
    presets::perft_parallel_adapter.validate();
    CHECK(presets::perft_parallel_adapter.hidden_dropout() == 0.05);
    presets::ceft.validate();
    presets::esft.validate();
    presets::parrot.validate();
    presets::parrot_paper.validate();
    CHECK(presets::perft_r.adapter.scale() == 2.0);
    CHECK(presets::perft_e.adapters == presets::perft_e.base.experts);
  }

  TEST_CASE("a PERFT preset of small widths trains with its losses") {
    auto layer = presets::perft_r;
    layer.base.expert.hidden = 3;
    layer.adapter.rank = 2;
    generator random(3);
    auto base = layer.base.init<float, cpu>(inputs, random, "base.");
    base.freeze();
    auto params = layer.init<float, cpu>(std::move(base), random);
    fill_normal(params.adapter.b.value(), 0.3, random);
    matrix<float, cpu> x(tokens, inputs), y(tokens, inputs), dx(tokens, inputs);
    fill_normal(x.view(), 1.0, random);
    context<cpu> ctx(1);
    batch_info<float, cpu> batch;
    batch.random = &random;
    const auto kept = layer.forward(ctx, params, x, y.view(), mode::training, batch);
    const auto found = presets::perft_losses.forward(ctx, kept.placement.routed);
    matrix<float, cpu> one(1, 1), dlogits(tokens, 8), dgates(tokens, 8);
    one(0, 0) = 1.0F;
    const routed_gradient<float, cpu> gradient{dlogits.view(), dgates.view()};
    presets::perft_losses.backward(ctx, kept.placement.routed, found, one, gradient,
                                   grad_mode::overwrite);
    layer.backward(ctx, params, kept, x, y, dx.view(), grad_mode::overwrite, &gradient);
    index trained = 0;
    params.visit([&](const parameter<float, cpu>& p) {
      CAPTURE(p.name());
      trained += p.trained_size();
      if (p.trainable()) CHECK(testing::largest(p.grad()) > 0.0);
    });
    // A, B and the router of the adapters, nothing of the base.
    CHECK(trained == 8 * 2 * 2 * inputs + 8 * inputs);
  }
}

}  // namespace talpa::presets_test
