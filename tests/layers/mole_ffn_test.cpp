// SPDX-License-Identifier: Apache-2.0
#include "layers/ffn.hpp"
#include "support/scalars.hpp"

#include <talpa/layers/mole_ffn.hpp>

#include <doctest/doctest.h>

#include <concepts>
#include <cstdint>
#include <utility>

namespace talpa::mole_ffn_test {

using namespace support;

TEST_SUITE("layers/mole_ffn") {
  TEST_CASE_TEMPLATE("laws of mole_ffn", T, TALPA_SCALARS) {
    const auto check = [](const auto& layer, index many_tokens) {
      const auto init = [&]<class U>(generator& random) {
        auto base = swiglu{.hidden = 4}.init<U, cpu>(features, features, 1, random, "base.");
        return layer.template init<U, cpu>(std::move(base), random);
      };
      obeys(testing::layer_laws<T>(layer, init, {}, {.many_tokens = many_tokens}));
    };
    check(mole_ffn<renormalised_router>{.router = {.selector = {.k = 2}},
                                        .expert = {.rank = 2, .alpha = 3.0, .dropout = 0.25},
                                        .experts = 3},
          1100);
    check(
        mole_ffn<raw_router>{.router = {.selector = {.k = 1}}, .expert = {.rank = 1}, .experts = 1},
        600);
    if (std::same_as<T, double>) return;  // gradients are in double either way
    check(mole_ffn<router<linear_scorer, dense>>{.expert = {.rank = 1}, .experts = 33}, 100);
  }

  TEST_CASE("mole_ffn is a mixture of networks whose matrices have their update added") {
    constexpr index hidden = 4, experts = 3, rank = 2, tokens = 9;
    using all = router<linear_scorer, dense>;
    const mole_ffn<all> layer{.expert = {.rank = rank, .alpha = 3.0}, .experts = experts};
    const moe_ffn<all> merged{.expert = {.hidden = hidden}, .experts = experts};
    generator random(2);
    auto p = layer.init<double, cpu>(
        swiglu{.hidden = hidden}.init<double, cpu>(features, features, 1, random, "base."), random);
    p.visit([&](parameter<double, cpu>& q) { fill_normal(q.value(), 0.7, random); });
    auto whole = merged.init<double, cpu>(features, random);
    // Gates of 1/3, whatever the tokens, so that a layer of absolute values bounds every sum.
    fill_uniform(p.router.scorer.weight.value(), 0.0, random);
    fill_uniform(whole.router.scorer.weight.value(), 0.0, random);
    // W + s B A; G and U are stored [out, in], D [in, out].
    const double s = layer.expert.scale();
    const auto merge = [&](const parameter<double, cpu>& base,
                           const lora::params<double, cpu>& bank, bool transposed,
                           parameter<double, cpu>& out) {
      for (index e = 0; e < experts; ++e) {
        for (index row = 0; row < hidden; ++row) {
          for (index col = 0; col < features; ++col) {
            double sum = 0.0;
            for (index r = e * rank; r < (e + 1) * rank; ++r) {
              sum += transposed ? bank.a.value()(r, row) * bank.b.value()(r, col)
                                : bank.b.value()(r, row) * bank.a.value()(r, col);
            }
            out.value()(e * hidden + row, col) = base.value()(row, col) + s * sum;
          }
        }
      }
    };
    merge(p.base.gate, p.gate, false, whole.expert.gate);
    merge(p.base.up, p.up, false, whole.expert.up);
    merge(p.base.down, p.down, true, whole.expert.down);
    matrix<double, cpu> x(tokens, features), y(tokens, features), expected(tokens, features);
    fill_normal(x.view(), 1.0, random);
    context<cpu> ctx(1);
    layer.forward(ctx, p, x, y.view(), mode::inference);
    merged.forward(ctx, whole, x, expected.view(), mode::inference);
    const matrix<double, cpu> size = absolute_output(layer, p, x);
    // Sums over D and R twice, H and R, and experts; 16 in silu, gates and scale.
    const double roundings = 3.0 * (features + rank) + hidden + experts + 16.0;
    CHECK(testing::first_excess(y.view(), expected.view(), [&](index n, index d) {
            return 2.0 * testing::gamma<double>(roundings) * size(n, d);
          }) == "");
  }

  TEST_CASE("fresh adapters behind gates that sum to one give the dense network, padding gets 0") {
    const mole_ffn<renormalised_router> layer{
        .router = {.selector = {.k = 2}}, .expert = {.rank = 2}, .experts = 3};
    const swiglu network{.hidden = 4};
    generator random(2);
    auto p = layer.init<double, cpu>(
        network.init<double, cpu>(features, features, 1, random, "base."), random);
    const moe dense_network{.router = {.selector = {.k = 1}}, .expert = network, .experts = 1};
    auto one = dense_network.init<double, cpu>(features, random);
    // Gates of 1/2, whatever the tokens.
    fill_uniform(p.router.scorer.weight.value(), 0.0, random);
    const auto copy = [](const parameter<double, cpu>& from, parameter<double, cpu>& to) {
      for (index i = 0; i < from.size(); ++i) to.value().data[i] = from.value().data[i];
    };
    copy(p.base.gate, one.expert.gate);
    copy(p.base.up, one.expert.up);
    copy(p.base.down, one.expert.down);
    matrix<double, cpu> x(4, features), y(4, features), expected(4, features);
    fill_normal(x.view(), 1.0, random);
    vector<std::uint8_t, cpu> real(4);
    real[0] = real[1] = real[3] = 1;
    context<cpu> ctx(1);
    layer.forward(ctx, p, x, y.view(), mode::inference, {.padding_mask = real.view()});
    dense_network.forward(ctx, one, x, expected.view(), mode::inference);
    const matrix<double, cpu> size = absolute_output(dense_network, one, x);
    for (index d = 0; d < features; ++d) expected(2, d) = 0.0;
    // Sums over D, H and two experts; 16 in silu and gates.
    CHECK(testing::first_excess(y.view(), expected.view(), [&](index n, index d) {
            return n == 2 ? 0.0
                          : 2.0 * testing::gamma<double>(features + 4.0 + 2.0 + 16.0) * size(n, d);
          }) == "");
  }

  TEST_CASE("experts that do not train have no gradient storage") {
    const mole_ffn<raw_router> layer{
        .router = {.selector = {.k = 2}}, .expert = {.rank = 2}, .experts = 4};
    generator random(2);
    auto base = swiglu{.hidden = 3}.init<float, cpu>(features, features, 1, random, "base.");
    base.freeze();
    auto p = layer.init<float, cpu>(std::move(base), random);
    p.router.freeze();
    const index chosen[] = {1, 3};
    layer.train_experts(p, chosen);
    index trained = 0;
    p.visit([&](const parameter<float, cpu>& q) { trained += q.trained_size(); });
    CHECK(trained == 2 * 2 * 3 * (features + 3));
  }
}

}  // namespace talpa::mole_ffn_test
