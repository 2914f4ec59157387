// SPDX-License-Identifier: Apache-2.0
#include "layers/ffn.hpp"
#include "support/scalars.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <concepts>
#include <cstdint>

namespace talpa::moe_ffn_test {

using namespace support;

TEST_SUITE("layers/moe_ffn") {
  TEST_CASE_TEMPLATE("laws of moe_ffn", T, TALPA_SCALARS) {
    const auto check = [](const auto& layer, index many_tokens) {
      const auto init = [&]<class U>(generator& random) {
        return layer.template init<U, cpu>(features, random);
      };
      obeys(testing::layer_laws<T>(layer, init, {}, {.many_tokens = many_tokens}));
    };
    check(small_moe(), 1100);
    check(moe_ffn<renormalised_router>{.router = {.selector = {.k = 1}},
                                       .expert = {.hidden = 2},
                                       .experts = 3,
                                       .shared = {.hidden = 4},
                                       .shared_experts = 2,
                                       .scale = -1.5,
                                       .residual = 0.25},
          600);
    check(moe_ffn<raw_router, lora>{.router = {.selector = {.k = 2}},
                                    .expert = {.rank = 2, .dropout = 0.25},
                                    .experts = 3,
                                    .shared = {.rank = 1, .dropout = 0.5},
                                    .shared_experts = 2},
          600);
    if (std::same_as<T, double>) return;  // gradients are in double either way
    check(
        moe_ffn<router<linear_scorer, dense>, parallel_adapter<>>{
            .router = {.scorer = {.bias = true}}, .expert = {.rank = 2}, .experts = 33},
        100);
  }

  TEST_CASE("one SwiGLU expert on one feature, by hand") {
    // f(x) = 5 silu(2 x) 3 x, gate 1, scale 2, a shared expert 7 silu(x) x, residual 10 x.
    const moe layer{.router = {.selector = {.k = 1}},
                    .expert = {.hidden = 1},
                    .experts = 1,
                    .shared = {.hidden = 1},
                    .shared_experts = 1,
                    .scale = 2.0,
                    .residual = 10.0};
    generator random(1);
    auto p = layer.init<double, cpu>(1, random);
    const auto set = [](parameter<double, cpu>& q, double v) { q.value()(0, 0) = v; };
    set(p.expert.gate, 2.0);
    set(p.expert.up, 3.0);
    set(p.expert.down, 5.0);
    set(p.shared.gate, 1.0);
    set(p.shared.up, 1.0);
    set(p.shared.down, 7.0);
    matrix<double, cpu> x(1, 1), y(1, 1);
    x(0, 0) = 1.0;
    context<cpu> ctx;
    layer.forward(ctx, p, x, y.view(), mode::inference);
    const auto slow_silu = [](double v) { return v / (1.0 + std::exp(-v)); };
    const double expected = 2.0 * 5.0 * slow_silu(2.0) * 3.0 + 7.0 * slow_silu(1.0) + 10.0;
    CHECK(std::abs(y(0, 0) - expected) <= testing::gamma<double>(16.0) * expected);
  }

  TEST_CASE("padding gets shared experts and residual alone") {
    moe layer = small_moe();
    layer.shared = {.hidden = 2};
    layer.shared_experts = 1;
    layer.residual = 0.5;
    generator random(1);
    auto p = layer.init<double, cpu>(features, random);
    matrix<double, cpu> x(3, features), y(3, features), alone(3, features);
    fill_normal(x.view(), 1.0, random);
    vector<std::uint8_t, cpu> real(3);
    real[0] = real[2] = 1;
    context<cpu> ctx;
    layer.forward(ctx, p, x, y.view(), mode::inference, {.padding_mask = real.view()});
    fill_uniform(p.expert.down.value(), 0.0, random);  // experts that give nothing
    layer.forward(ctx, p, x, alone.view(), mode::inference);
    for (index d = 0; d < features; ++d) {
      CHECK(y(1, d) == alone(1, d));
      CHECK(y(0, d) != alone(0, d));
    }
  }

  TEST_CASE("dropout of experts and of shared experts acts in training alone") {
    for (const bool of_shared : {false, true}) {
      moe_ffn<raw_router, lora> layer{.router = {.selector = {.k = 1}},
                                      .expert = {.rank = 2},
                                      .experts = 2,
                                      .shared = {.rank = 2},
                                      .shared_experts = 1};
      (of_shared ? layer.shared : layer.expert).dropout = 0.5;
      generator random(1);
      auto p = layer.init<double, cpu>(features, random);
      p.visit([&](parameter<double, cpu>& q) { fill_normal(q.value(), 1.0, random); });
      matrix<double, cpu> x(4, features), trained(4, features), used(4, features);
      fill_normal(x.view(), 1.0, random);
      context<cpu> ctx(1);
      CHECK_THROWS_AS(layer.forward(ctx, p, x, trained.view(), mode::training), value_error);
      batch_info<double, cpu> batch;
      batch.random = &random;
      layer.forward(ctx, p, x, trained.view(), mode::training, batch);
      layer.forward(ctx, p, x, used.view(), mode::inference);
      CHECK(testing::first_difference(trained, used) != "");
    }
  }

  TEST_CASE("numbers out of range are refused") {
    generator random(1);
    moe layer = small_moe();
    layer.experts = 0;
    CHECK_THROWS_WITH_AS((layer.init<float, cpu>(4, random)),
                         "talpa::moe_ffn: 'experts' is 0, expected >= 1 = at least one expert",
                         value_error);
    layer = small_moe();
    layer.shared_experts = -1;
    CHECK_THROWS_WITH_AS(
        (layer.init<float, cpu>(4, random)),
        "talpa::moe_ffn: 'shared_experts' is -1, expected >= 0 = experts that are always on",
        value_error);
    layer = small_moe();
    layer.scale = INFINITY;
    CHECK_THROWS_WITH_AS((layer.init<float, cpu>(4, random)),
                         "talpa::moe_ffn: 'scale' is inf, expected a finite number", value_error);
    layer = small_moe();
    auto p = layer.init<float, cpu>(4, random);
    matrix<float, cpu> x(2, 3), y(2, 4);
    context<cpu> ctx;
    CHECK_THROWS_WITH_AS(layer.forward(ctx, p, x, y.view(), mode::inference),
                         "talpa::moe_ffn: 'x' has shape [2, 3], expected [2, 4] = tokens, width of "
                         "the layer",
                         shape_error);
  }
}

}  // namespace talpa::moe_ffn_test
