// SPDX-License-Identifier: Apache-2.0
#include "layers/ffn.hpp"
#include "layers/slow_mole.hpp"
#include "support/scalars.hpp"

#include <talpa/layers/linear.hpp>
#include <talpa/layers/merge.hpp>
#include <talpa/placements/dense.hpp>
#include <talpa/placements/routed.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <utility>

namespace talpa::merge_test {

namespace {

constexpr index tokens = 9, inputs = 7, outputs = 5;

template <class T>
affine_params<T, cpu> frozen_base(generator& random) {
  auto base = linear{}.init<T, cpu>(inputs, outputs, random, "base.");
  base.freeze();
  return base;
}

/// y of the merged map against y of the layer: both round W x and s B A x, whose absolute terms a
/// layer with absolute weights adds up.
template <class T, class Layer, class Params>
void equals_merged(const Layer& layer, Params p, generator& random) {
  testing::detail::shake<T>(p, random, 0.5);
  matrix<T, cpu> x(tokens, inputs), y(tokens, outputs), found(tokens, outputs);
  fill_normal(x.view(), 1.0, random);
  context<cpu> ctx(1);
  layer.forward(ctx, p, x, y.view(), mode::inference);
  const matrix<T, cpu> before(p.base.weight.value());
  const affine_params<T, cpu> merged = merge(ctx, layer, p);
  CHECK(testing::first_difference<T>(p.base.weight.value(), before.view()) == "");
  CHECK_FALSE(merged.weight.trainable());
  affine_forward(ctx, merged, x, found.view());

  p.visit([](parameter<T, cpu>& q) {
    for (index i = 0; i < q.size(); ++i) q.value().data[i] = std::abs(q.value().data[i]);
  });
  for (index i = 0; i < x.size(); ++i) x.data()[i] = std::abs(x.data()[i]);
  matrix<T, cpu> size(tokens, outputs);
  layer.forward(ctx, p, x, size.view(), mode::inference);
  CHECK(testing::first_excess(found.view(), y.view(), [&](index n, index o) {
          return 2.0 * testing::gamma<T>(2.0 * inputs + 8.0) * static_cast<double>(size(n, o));
        }) == "");
}

/// y of a block against the block with the one adapter that merge makes. Both have the same bits of
/// the base and add the same terms of the adapters to them, whose sizes are bounded by largest
/// elements: M R ranks of D products each.
template <class T, class Placement, class Adapter>
void adapters_are_one(const Placement& placement, const Adapter& adapter, index adapters) {
  constexpr index features = support::features;
  const perft_block<support::moe, Placement, Adapter> layer{.base = support::small_moe(),
                                                            .placement = placement,
                                                            .adapter = adapter,
                                                            .adapters = adapters};
  const auto make_base = [&](generator& random) {
    return layer.base.template init<T, cpu>(features, random, "base.");
  };
  generator random(3), again(3);
  auto p = layer.template init<T, cpu>(make_base(random), random);
  double weights = 1.0;
  p.adapter.visit([&](parameter<T, cpu>& q) {
    fill_normal(q.value(), 0.5, random);
    weights *= testing::largest(q.value());
  });
  matrix<T, cpu> x(tokens, features), y(tokens, features), found(tokens, features);
  fill_normal(x.view(), 1.0, random);
  context<cpu> ctx(1);
  layer.forward(ctx, p, x, y.view(), mode::inference);

  auto merged = merge(layer, p);
  CHECK(merged.adapter.rank == adapters * adapter.rank);
  const perft_block<support::moe, placement::single, Adapter> one{.base = layer.base,
                                                                  .adapter = merged.adapter};
  typename perft_block<support::moe, placement::single, Adapter>::template params<T, cpu> q{
      make_base(again), {}, std::move(merged.params)};
  one.forward(ctx, q, x, found.view(), mode::inference);
  const double ranks = static_cast<double>(merged.adapter.rank);
  // alpha = 3 and rank 2: a scale of at most 3 / sqrt(2).
  const double terms = 2.2 * ranks * features * weights * testing::largest(x.view());
  CHECK(testing::first_excess(found.view(), y.view(), [&](index n, index o) {
          return 2.0 * testing::gamma<T>(features + ranks + 16.0) *
                 (terms + std::abs(static_cast<double>(y(n, o))));
        }) == "");
  CHECK(testing::largest(found.view()) > 0.0);
}

}  // namespace

TEST_SUITE("layers/merge") {
  TEST_CASE_TEMPLATE("a merged lora_linear is the same map", T, TALPA_SCALARS) {
    generator random(4);
    const lora_linear layer{.adapter = {.rank = 2, .alpha = 3.0}};
    equals_merged<T>(layer, layer.init(frozen_base<T>(random), random), random);
  }

  TEST_CASE_TEMPLATE("a merged mixture of one expert is the same map", T, TALPA_SCALARS) {
    generator random(4);
    const mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora> layer{
        .router = {.selector = {.k = 1}}, .expert = {.rank = 2, .alpha = 3.0}, .experts = 1};
    equals_merged<T>(layer, layer.template init<T, cpu>(frozen_base<T>(random), random), random);
  }

  TEST_CASE_TEMPLATE("adapters that are always on are one adapter", T, TALPA_SCALARS) {
    for (const index adapters : {1, 3}) {
      adapters_are_one<T>(placement::dense{}, lora{.rank = 2, .alpha = 3.0}, adapters);
      adapters_are_one<T>(placement::dense{},
                          lora{.rank = 2, .alpha = 3.0, .scaling = lora_scaling::by_root_rank},
                          adapters);
      adapters_are_one<T>(placement::dense{}, parallel_adapter<>{.rank = 2, .scale = 0.5},
                          adapters);
    }
    adapters_are_one<T>(placement::single{}, lora{.rank = 2, .alpha = 3.0}, 1);
    adapters_are_one<T>(placement::routed<support::renormalised_router>{{.selector = {.k = 1}}},
                        lora{.rank = 2, .alpha = 3.0}, 1);
  }

  TEST_CASE("a merged bank has values of its own, and the same rows train") {
    using block = perft_block<support::moe, placement::dense, lora>;
    const block layer{.base = support::small_moe(), .adapter = {.rank = 2}, .adapters = 3};
    generator random(4);
    auto p = layer.init<float, cpu>(layer.base.init<float, cpu>(support::features, random, "base."),
                                    random);
    const index second[] = {1};
    layer.adapter.train_experts(p.adapter, second);
    auto merged = merge(layer, p);
    CHECK(merged.adapter.rank == 6);
    CHECK(merged.params.a.value().data != p.adapter.a.value().data);
    CHECK(testing::first_difference<float>(merged.params.a.value(), p.adapter.a.value()) == "");
    CHECK(merged.params.a.trained().size() == 1);
    CHECK(merged.params.a.trained()[0] == row_run{2, 2, 0});
  }

  TEST_CASE("adapters behind gates that depend on the token are refused") {
    using block = perft_block<support::moe, placement::routed<support::renormalised_router>, lora>;
    const block layer{.base = support::small_moe(),
                      .placement = {{.selector = {.k = 1}}},
                      .adapter = {.rank = 2},
                      .adapters = 2};
    generator random(4);
    const auto p = layer.init<float, cpu>(
        layer.base.init<float, cpu>(support::features, random, "base."), random);
    CHECK_THROWS_WITH_AS(merge(layer, p),
                         "talpa::merge: 'adapters' is 2, expected 1..1 = adapters whose gate does "
                         "not depend on the token",
                         value_error);
  }

  TEST_CASE("a mixture whose gates depend on the token is refused") {
    generator random(4);
    const mole_linear<router<linear_scorer, dense>, lora> layer{.experts = 2};
    const auto p = layer.init<float, cpu>(frozen_base<float>(random), random);
    context<cpu> ctx;
    CHECK_THROWS_WITH_AS(
        merge(ctx, layer, p),
        "talpa::merge: 'experts' is 2, expected 1..1 = experts whose gate does not depend on the "
        "token",
        value_error);
  }
}

}  // namespace talpa::merge_test
