// SPDX-License-Identifier: Apache-2.0
#include "layers/ffn.hpp"
#include "support/scalars.hpp"

#include <talpa/layers/perft_block.hpp>
#include <talpa/placements/dense.hpp>
#include <talpa/placements/embedded.hpp>
#include <talpa/placements/routed.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <utility>

namespace talpa::perft_block_test {

using namespace support;

namespace {

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
    obeys(testing::layer_laws<T>(layer, init, {}, {.many_tokens = 600}));
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

TEST_SUITE("layers/perft_block") {
  TEST_CASE_TEMPLATE("laws of perft_block, routed", T, TALPA_SCALARS) {
    block_laws<T>(placement::routed<renormalised_router>{{.selector = {.k = 2}}},
                  lora{.rank = 2, .alpha = 3.0, .dropout = 0.25}, 3);
  }
  TEST_CASE("laws of perft_block, weighed by the base") {
    block_laws<double>(placement::base_weighted<raw_router>{{.selector = {.k = 2}}},
                       lora{.rank = 2, .alpha = 3.0}, 3);
  }
  TEST_CASE_TEMPLATE("laws of perft_block, embedded", T, TALPA_SCALARS) {
    block_laws<T>(placement::embedded{}, parallel_adapter<>{.rank = 2, .dropout = 0.25}, 4);
  }
  TEST_CASE_TEMPLATE("laws of perft_block, dense and single", T, TALPA_SCALARS) {
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
    for (index n = 0; n < both.y.rows(); ++n) {
      for (index o = 0; o < features; ++o) {
        // Terms of both adapters: s |B| |A| |x|, sums over D; the base has the same bits in all.
        double size = std::abs(base.y(n, o));
        for (index r = 0; r < 2; ++r) {
          for (index d = 0; d < features; ++d) {
            size += std::abs(both.p.adapter.b.value()(r, o) * both.p.adapter.a.value()(r, d) *
                             both.x(n, d));
          }
        }
        const double sum = first.y(n, o) + second.y(n, o) - base.y(n, o);
        CHECK(std::abs(both.y(n, o) - sum) <= 4.0 * testing::gamma<double>(features + 8.0) * size);
      }
    }
  }

  TEST_CASE("units that a parallel adapter drops are the same in both strategies") {
    using block = block_of<placement::dense, parallel_adapter<>>;
    block layer{.base = small_moe(),
                .adapter = {.rank = 3, .dropout = 0.5},
                .adapters = 2,
                .execution = strategy::dense_masked};
    evaluated<block> masked(layer);
    layer.execution = strategy::grouped;
    evaluated<block> grouped(layer);
    const matrix<double, cpu> without = masked.y;
    generator same(5), again(5);
    context<cpu> ctx(1);
    layer.forward(ctx, grouped.p, grouped.x, grouped.y.view(), mode::training, {.random = &same});
    masked.block.forward(ctx, masked.p, masked.x, masked.y.view(), mode::training,
                         {.random = &again});
    CHECK(same == again);
    CHECK(testing::first_difference(masked.y, without) != "");
    // Sums of at most D + M R terms, in another order; |silu(u)| <= |u|, and what is kept doubles.
    double weights = 1.0;
    masked.p.adapter.visit(
        [&](parameter<double, cpu>& q) { weights *= 2.0 * testing::largest(q.value()); });
    const double terms = 6.0 * features * weights * testing::largest(masked.x.view()) +
                         testing::largest(masked.y.view());
    CHECK(testing::first_excess(masked.y.view(), grouped.y.view(), [&](index, index) {
            return 2.0 * testing::gamma<double>(features + 6.0 + 16.0) * terms;
          }) == "");
    CHECK_THROWS_WITH_AS(
        layer.forward(ctx, grouped.p, grouped.x, grouped.y.view(), mode::training),
        "talpa::perft_block: 'batch.random' is null, expected a generator = source of the dropout "
        "mask in training",
        value_error);
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
    masked.execution = strategy::indexed;
    CHECK_THROWS_WITH_AS(masked.validate(),
                         "talpa::perft_block: 'execution' is indexed, expected grouped or "
                         "automatic = what experts of kind glu_ffn can do",
                         value_error);
  }
}

}  // namespace talpa::perft_block_test
