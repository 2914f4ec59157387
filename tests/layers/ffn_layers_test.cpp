// SPDX-License-Identifier: Apache-2.0
#include "support/laws.hpp"

#include <talpa/cpu/activation.hpp>
#include <talpa/cpu/add.hpp>
#include <talpa/cpu/bias.hpp>
#include <talpa/cpu/copy.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/fill.hpp>
#include <talpa/cpu/gated_activation.hpp>
#include <talpa/cpu/gather.hpp>
#include <talpa/cpu/grouped_gemm.hpp>
#include <talpa/cpu/pair_gates.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/reduce.hpp>
#include <talpa/cpu/scale.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/sequence_rows.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/layers/mole_ffn.hpp>
#include <talpa/layers/parrot_block.hpp>
#include <talpa/layers/perft_block.hpp>
#include <talpa/placements/always.hpp>
#include <talpa/placements/base_weighted.hpp>
#include <talpa/placements/embedded.hpp>
#include <talpa/placements/routed.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/dense.hpp>
#include <talpa/selectors/top_k.hpp>
#include <talpa/testing/layer_laws.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <utility>

namespace talpa {

namespace {

using raw_router = router<linear_scorer, top_k<gate::raw>>;
using renormalised_router = router<linear_scorer, top_k<gate::renormalised>>;
using moe = moe_ffn<raw_router>;

constexpr index features = 5;

moe small_moe() {
  return {.router = {.selector = {.k = 2}}, .expert = {.hidden = 3}, .experts = 4};
}

/// The laws of a block over small_moe().
template <class T, class Placement, class Adapter>
void block_laws(const Placement& placement, const Adapter& adapter, index adapters) {
  for (const strategy execution : {strategy::dense_masked, strategy::grouped}) {
    const perft_block<moe, Placement, Adapter> layer{.base = small_moe(),
                                                     .placement = placement,
                                                     .adapter = adapter,
                                                     .adapters = adapters,
                                                     .execution = execution};
    CAPTURE(strategy_name(execution));
    const auto init = [&]<class U>(generator& random) {
      auto base = layer.base.template init<U, cpu>(features, random, "base.");
      return layer.template init<U, cpu>(std::move(base), random);
    };
    support::obeys(testing::layer_laws<T>(layer, init, {}, {.many_tokens = 600}));
  }
}

/// A block with parameters that all do something, and its output on some tokens.
template <class Block>
struct evaluated {
  Block block;
  typename Block::template params<double, cpu> p;
  matrix<double, cpu> x{9, features}, y{9, features};

  explicit evaluated(const Block& b) : block(b) {
    generator random(3);
    p = block.template init<double, cpu>(
        block.base.template init<double, cpu>(features, random, "base."), random);
    generator noise(4);
    p.adapter.visit([&](parameter<double, cpu>& q) { fill_normal(q.value(), 0.5, noise); });
    fill_normal(x.view(), 1.0, noise);
    run();
  }
  void run() {
    context<cpu> ctx(1);
    block.forward(ctx, p, x, y.view(), mode::inference);
  }
};
template <class Placement, class Adapter = lora>
using block_of = perft_block<moe, Placement, Adapter>;

}  // namespace

TEST_SUITE("layers/moe_ffn") {
  TEST_CASE_TEMPLATE("laws of moe_ffn", T, float, double) {
    const auto check = [](const auto& layer, index many_tokens) {
      const auto init = [&]<class U>(generator& random) {
        return layer.template init<U, cpu>(features, random);
      };
      support::obeys(testing::layer_laws<T>(layer, init, {}, {.many_tokens = many_tokens}));
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

TEST_SUITE("layers/mole_ffn") {
  TEST_CASE_TEMPLATE("laws of mole_ffn", T, float, double) {
    const auto check = [](const auto& layer, index many_tokens) {
      const auto init = [&]<class U>(generator& random) {
        auto base = swiglu{.hidden = 4}.init<U, cpu>(features, features, 1, random, "base.");
        return layer.template init<U, cpu>(std::move(base), random);
      };
      support::obeys(testing::layer_laws<T>(layer, init, {}, {.many_tokens = many_tokens}));
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
    const mole_ffn<renormalised_router> layer{.router = {.selector = {.k = 2}},
                                              .expert = {.rank = rank, .alpha = 3.0},
                                              .experts = experts};
    const moe_ffn<renormalised_router> merged{
        .router = {.selector = {.k = 2}}, .expert = {.hidden = hidden}, .experts = experts};
    generator random(2);
    auto p = layer.init<double, cpu>(
        swiglu{.hidden = hidden}.init<double, cpu>(features, features, 1, random, "base."), random);
    p.visit([&](parameter<double, cpu>& q) { fill_normal(q.value(), 0.7, random); });
    auto whole = merged.init<double, cpu>(features, random);
    for (index i = 0; i < p.router.scorer.weight.size(); ++i) {
      whole.router.scorer.weight.value().data[i] = p.router.scorer.weight.value().data[i];
    }
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
    // Three products of at most 5 + 2 terms each, of numbers below 8, and the gates between.
    for (index i = 0; i < y.size(); ++i) {
      const double size = 64.0 * std::max(1.0, std::abs(expected.data()[i]));
      CHECK(std::abs(y.data()[i] - expected.data()[i]) <= testing::gamma<double>(64.0) * size);
    }
  }

  TEST_CASE("fresh adapters behind gates that sum to one give the dense network, padding gets 0") {
    const mole_ffn<renormalised_router> layer{
        .router = {.selector = {.k = 2}}, .expert = {.rank = 2}, .experts = 3};
    const swiglu network{.hidden = 4};
    generator random(2);
    const auto p = layer.init<double, cpu>(
        network.init<double, cpu>(features, features, 1, random, "base."), random);
    const moe dense_network{.router = {.selector = {.k = 1}}, .expert = network, .experts = 1};
    auto one = dense_network.init<double, cpu>(features, random);
    one.router.scorer.weight.value()(0, 0) = 0.0;
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
    for (index n = 0; n < 4; ++n) {
      for (index d = 0; d < features; ++d) {
        const double e = n == 2 ? 0.0 : expected(n, d);
        CHECK(std::abs(y(n, d) - e) <= testing::gamma<double>(32.0) * 8.0 * std::abs(e));
      }
    }
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

TEST_SUITE("layers/perft_block") {
  TEST_CASE_TEMPLATE("laws of perft_block, routed", T, float, double) {
    block_laws<T>(placement::routed<renormalised_router>{{.selector = {.k = 2}}},
                  lora{.rank = 2, .alpha = 3.0, .dropout = 0.25}, 3);
  }
  TEST_CASE("laws of perft_block, weighed by the base") {
    block_laws<double>(placement::base_weighted<raw_router>{{.selector = {.k = 2}}},
                       lora{.rank = 2, .alpha = 3.0}, 3);
  }
  TEST_CASE_TEMPLATE("laws of perft_block, embedded", T, float, double) {
    block_laws<T>(placement::embedded{}, parallel_adapter<>{.rank = 2}, 4);
  }
  TEST_CASE_TEMPLATE("laws of perft_block, dense and single", T, float, double) {
    block_laws<T>(placement::dense{}, lora{.rank = 1}, 3);
    block_laws<T>(placement::single{}, parallel_adapter<tanh>{.rank = 3}, 1);
  }

  TEST_CASE("routing to the one adapter with gate 1 equals single, and single equals dense") {
    const block_of<placement::single> single{.base = small_moe(), .adapter = {.rank = 2}};
    const block_of<placement::dense> dense{.base = small_moe(), .adapter = {.rank = 2}};
    const block_of<placement::routed<renormalised_router>> routed{
        .base = small_moe(), .placement = {{.selector = {.k = 1}}}, .adapter = {.rank = 2}};
    evaluated a(single);
    evaluated b(dense);
    evaluated c(routed);
    for (index i = 0; i < a.p.adapter.a.size(); ++i) {
      c.p.adapter.a.value().data[i] = a.p.adapter.a.value().data[i];
      c.p.adapter.b.value().data[i] = a.p.adapter.b.value().data[i];
    }
    c.x = a.x;
    c.run();
    CHECK(testing::first_difference(b.y, a.y) == "");
    CHECK(testing::first_difference(c.y, a.y) == "");
  }

  TEST_CASE("dense is the sum of single adapters and not their mean") {
    const block_of<placement::dense> two{
        .base = small_moe(), .adapter = {.rank = 1, .alpha = 1.0}, .adapters = 2};
    const block_of<placement::single> one{.base = small_moe(),
                                          .adapter = {.rank = 1, .alpha = 1.0}};
    evaluated both(two);
    evaluated first(one), second(one);
    first.x = second.x = both.x;
    for (index d = 0; d < features; ++d) {
      first.p.adapter.a.value()(0, d) = both.p.adapter.a.value()(0, d);
      first.p.adapter.b.value()(0, d) = both.p.adapter.b.value()(0, d);
      second.p.adapter.a.value()(0, d) = both.p.adapter.a.value()(1, d);
      second.p.adapter.b.value()(0, d) = both.p.adapter.b.value()(1, d);
    }
    first.run();
    second.run();
    // The base alone: an adapter whose B is zero.
    evaluated base(one);
    base.x = both.x;
    for (index d = 0; d < features; ++d) base.p.adapter.b.value()(0, d) = 0.0;
    base.run();
    for (index i = 0; i < both.y.size(); ++i) {
      const double sum = first.y.data()[i] + second.y.data()[i] - base.y.data()[i];
      const double size = std::abs(first.y.data()[i]) + std::abs(second.y.data()[i]) +
                          std::abs(base.y.data()[i]) + 64.0;
      CHECK(std::abs(both.y.data()[i] - sum) <= testing::gamma<double>(64.0) * size);
    }
  }

  TEST_CASE("what does not fit together is refused") {
    CHECK_THROWS_WITH_AS(
        (block_of<placement::embedded>{.base = small_moe(), .adapters = 3}.validate()),
        "talpa::placement::embedded: 'adapters' is 3, expected 4..4 = experts of the base",
        value_error);
    CHECK_THROWS_WITH_AS(
        (block_of<placement::single>{.base = small_moe(), .adapters = 2}.validate()),
        "talpa::placement::single: 'adapters' is 2, expected 1..1 = the one adapter of this "
        "placement",
        value_error);
    CHECK_THROWS_WITH_AS(
        (block_of<placement::dense>{.base = small_moe(), .adapters = 0}.validate()),
        "talpa::perft_block: 'adapters' is 0, expected >= 1 = at least one adapter", value_error);
    using routed = placement::routed<renormalised_router>;
    CHECK_THROWS_WITH_AS(
        (block_of<routed>{.base = small_moe(), .placement = {{.selector = {.k = 3}}}, .adapters = 2}
             .validate()),
        "talpa::top_k: 'k' is 3, expected 1..2 = experts", value_error);
    using weighted = placement::base_weighted<raw_router>;
    CHECK_THROWS_WITH_AS(
        (block_of<weighted>{
            .base = small_moe(), .placement = {{.selector = {.k = 3}}}, .adapters = 3}
             .validate()),
        "talpa::placement::base_weighted: 'k' is 3, expected 1..2 = experts of "
        "the base a token",
        value_error);
    block_of<placement::dense, swiglu> masked{
        .base = small_moe(), .adapter = {.hidden = 2}, .execution = strategy::dense_masked};
    CHECK_THROWS_WITH_AS(masked.validate(),
                         "talpa::perft_block: 'execution' is dense_masked, expected grouped or "
                         "automatic = what experts of kind glu_ffn can do",
                         value_error);
  }
}

TEST_SUITE("layers/parrot_block") {
  TEST_CASE_TEMPLATE("laws of parrot_block", T, float, double) {
    const parrot_block layer{.router = {.scorer = {.query_row = 1}},
                             .expert = {.hidden = 3},
                             .experts = 3,
                             .scale = 0.5,
                             .residual = 0.25};
    support::obeys(testing::layer_laws<T>(
        layer, [&]<class U>(generator& random) { return layer.init<U, cpu>(features, random); }, {},
        {.tokens = 8,
         .inputs = features,
         .sequence_length = 4,
         .conditioning_rows = 3,
         .conditioning_width = features}));
  }

  TEST_CASE("all tokens of an image have the same gates, and its padding the residual alone") {
    const parrot_block layer{.expert = {.hidden = 2}, .experts = 3, .scale = 1.0, .residual = 0.5};
    generator random(1);
    const auto p = layer.init<double, cpu>(features, random);
    matrix<double, cpu> x(6, features), y(6, features), text(4, features);
    fill_normal(x.view(), 1.0, random);
    fill_normal(text.view(), 1.0, random);
    vector<std::uint8_t, cpu> real(6), present(4);
    for (const index n : {0, 1, 2, 3, 4}) real[n] = 1;  // the second image is shorter
    for (const index l : {0, 2, 3}) present[l] = 1;     // the first text is shorter
    batch_info<double, cpu> batch{.padding_mask = real.view(), .sequence_length = 3};
    batch.conditioning = {text.view(), present.view(), {}};
    context<cpu> ctx;
    const auto kept = layer.forward(ctx, p, x, y.view(), mode::inference, batch);
    const auto gates = kept.routed.routing.gates;
    for (index e = 0; e < 3; ++e) {
      CHECK(gates(0, e) == gates(2, e));
      CHECK(gates(3, e) == gates(4, e));
      CHECK(gates(0, e) != gates(3, e));
    }
    for (index d = 0; d < features; ++d) CHECK(y(5, d) == 0.5 * x(5, d));
  }
}

}  // namespace talpa
