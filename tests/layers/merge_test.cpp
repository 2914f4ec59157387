// SPDX-License-Identifier: Apache-2.0
#include "layers/slow_mole.hpp"

#include <talpa/layers/linear.hpp>
#include <talpa/layers/merge.hpp>

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

}  // namespace

TEST_SUITE("layers/merge") {
  TEST_CASE_TEMPLATE("a merged lora_linear is the same map", T, float, double) {
    generator random(4);
    const lora_linear layer{.adapter = {.rank = 2, .alpha = 3.0}};
    equals_merged<T>(layer, layer.init(frozen_base<T>(random), random), random);
  }

  TEST_CASE_TEMPLATE("a merged mixture of one expert is the same map", T, float, double) {
    generator random(4);
    const mole_linear<router<linear_scorer, top_k<gate::renormalised>>, lora> layer{
        .router = {.selector = {.k = 1}}, .expert = {.rank = 2, .alpha = 3.0}, .experts = 1};
    equals_merged<T>(layer, layer.template init<T, cpu>(frozen_base<T>(random), random), random);
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
