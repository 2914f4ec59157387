// SPDX-License-Identifier: Apache-2.0
#include "layers/slow_mole.hpp"
#include "support/count_allocations.hpp"
#include "support/laws.hpp"
#include "support/scalars.hpp"

#include <talpa/cpu/block_scale.hpp>
#include <talpa/cpu/mul.hpp>
#include <talpa/cpu/ragged_gate.hpp>
#include <talpa/cpu/ragged_gemm.hpp>
#include <talpa/cpu/weight_norm.hpp>
#include <talpa/experts/dora.hpp>
#include <talpa/experts/mixed_rank_lora.hpp>
#include <talpa/layers/mole_linear.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <utility>

namespace talpa::mole_linear_experts_test {

using namespace support;

namespace {

using mole_dora = mole_linear<router<linear_scorer, top_k<gate::renormalised>>, dora>;

constexpr index inputs = 6, outputs = 5;

template <class T>
affine_params<T, cpu> frozen_base(generator& random, index from = inputs) {
  auto base = linear{}.init<T, cpu>(from, outputs, random, "base.");
  base.freeze();
  return base;
}

}  // namespace

TEST_SUITE("layers/mole_linear_experts") {
  TEST_CASE("laws of mole_linear with experts of different ranks") {
    for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
      const mole_linear<router<linear_scorer, top_k<gate::renormalised>>, mixed_rank_lora> layer{
          .router = {.selector = {.k = 2}},
          .expert = {.ranks = {1, 3, 2, 4}, .alpha = 3.0, .dropout = 0.25},
          .experts = 4,
          .execution = execution};
      const auto init = [&]<class U>(generator& random) {
        return layer.template init<U, cpu>(frozen_base<U>(random, outputs), random);
      };
      obeys(testing::layer_laws<double>(layer, init, {}, {.many_tokens = 600}));
      generator random(4);
      const auto p = layer.template init<float, cpu>(frozen_base<float>(random), random);
      matrix<float, cpu> x(40, inputs), y(40, outputs);
      context<cpu> ctx(1);
      layer.forward(ctx, p, x, y.view(), mode::inference);
      CHECK(ctx.memory.used() <= layer.plan(p, 40).saved_bytes);
    }
  }

  TEST_CASE("laws of mole_linear with dora") {
    for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
      const mole_dora layer{.router = {.selector = {.k = 2}},
                            .expert = {.rank = 2, .alpha = 1.0, .dropout = 0.25},
                            .experts = 4,
                            .execution = execution};
      const auto init = [&]<class U>(generator& random) {
        return layer.template init<U, cpu>(frozen_base<U>(random, outputs), random);
      };
      obeys(testing::layer_laws<double>(layer, init, {}, {.many_tokens = 600}));
    }
  }

  TEST_CASE_TEMPLATE("one expert with gate 1 is DoRA, and a fresh one the base", T, TALPA_SCALARS) {
    const mole_dora layer{.router = {.selector = {.k = 1}},
                          .expert = {.rank = 2, .alpha = 3.0},
                          .experts = 1,
                          .execution = strategy::dense_masked};
    generator random(4);
    auto p = layer.template init<T, cpu>(frozen_base<T>(random), random);
    constexpr index tokens = 9;
    matrix<T, cpu> x(tokens, inputs), y(tokens, outputs), base(tokens, outputs);
    fill_normal(x.view(), 1.0, random);
    context<cpu> ctx(1);
    layer.forward(ctx, p, x, y.view(), mode::inference);
    affine_forward(ctx, p.base, x, base.view());
    CHECK(testing::first_difference(y, base) == "");

    fill_normal(p.expert.b.value(), 0.3, random);
    fill_normal(p.expert.magnitude.value(), 1.0, random);
    const table w = to_table(p.base.weight.value()), a = to_table(p.expert.a.value());
    const table b = to_table(p.expert.b.value());
    layer.forward(ctx, p, x, y.view(), mode::inference);
    for (index o = 0; o < outputs; ++o) {
      double v[inputs], sizes[inputs], square = 0.0, of_sizes = 0.0;
      for (index d = 0; d < inputs; ++d) {
        v[d] = w(o, d) + 1.5 * (b(0, o) * a(0, d) + b(1, o) * a(1, d));
        sizes[d] =
            std::abs(w(o, d)) + 1.5 * (std::abs(b(0, o) * a(0, d)) + std::abs(b(1, o) * a(1, d)));
        square += v[d] * v[d];
        of_sizes += sizes[d] * sizes[d];
      }
      const double c = static_cast<double>(p.expert.magnitude.value()(0, o)) / std::sqrt(square);
      const double bias = static_cast<double>(p.base.bias.value()(0, o));
      for (index n = 0; n < tokens; ++n) {
        double expected = bias, terms = 0.0;
        for (index d = 0; d < inputs; ++d) {
          expected += c * v[d] * static_cast<double>(x(n, d));
          terms += sizes[d] * std::abs(static_cast<double>(x(n, d)));
        }
        // W0 x comes and goes: it is a term of the size of the others, twice.
        const double size =
            std::abs(bias) + terms * (2.0 + std::abs(c) * (2.0 + std::sqrt(of_sizes / square)));
        CHECK(std::abs(static_cast<double>(y(n, o)) - expected) <=
              testing::gamma<T>(3.0 * inputs + 24.0) * size);
      }
    }
  }

  TEST_CASE("a plan covers what is saved, and params may be moved") {
    for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
      const mole_dora layer{.router = {.selector = {.k = 2}},
                            .expert = {.rank = 2},
                            .experts = 4,
                            .execution = execution};
      generator random(4);
      auto first = layer.template init<float, cpu>(frozen_base<float>(random), random);
      const auto p = std::move(first);
      CHECK(p.expert.base.value().data == p.base.weight.value().data);
      matrix<float, cpu> x(40, inputs), y(40, outputs);
      fill_normal(x.view(), 1.0, random);
      context<cpu> ctx(1);
      ctx.memory.reserve(layer.plan(p, 40).saved_bytes);
      const auto taken = ctx.memory.allocations();
      layer.forward(ctx, p, x, y.view(), mode::training);
      CHECK(ctx.memory.allocations() == taken);
      CHECK(ctx.memory.used() <= layer.plan(p, 40).saved_bytes);
    }
  }

  TEST_CASE("a base that trains is refused") {
    const mole_dora layer{.router = {.selector = {.k = 1}}, .experts = 2};
    generator random(4);
    CHECK_THROWS_WITH_AS(
        (layer.template init<float, cpu>(
            linear{}.init<float, cpu>(inputs, outputs, random, "base."), random)),
        "talpa::mole_linear: 'base.weight' is trainable, expected frozen = what experts of kind "
        "dora adapt",
        value_error);
    auto p = layer.template init<float, cpu>(frozen_base<float>(random), random);
    matrix<float, cpu> x(3, inputs), y(3, outputs);
    context<cpu> ctx(1);
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::training);
    p.base.weight.train();
    CHECK_THROWS_AS(layer.backward(ctx, p, kept, x, y, x.view(), grad_mode::overwrite),
                    value_error);
  }
}

}  // namespace talpa::mole_linear_experts_test
