// SPDX-License-Identifier: Apache-2.0
// A program that got talpa from elsewhere: a fresh mixture of adapters leaves its base as it was.
#include <talpa/talpa.hpp>

#include <algorithm>
#include <cstdio>
#include <utility>

int main() {
  using talpa::cpu;
  using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::renormalised>>;
  const talpa::mole_linear<router, talpa::lora> layer{.router = {.selector = {.k = 2}},
                                                      .experts = 4};
  constexpr talpa::index tokens = 8, inputs = 16, outputs = 12;

  talpa::context<cpu> ctx;
  talpa::generator random(1);
  auto base = talpa::linear{}.init<float, cpu>(inputs, outputs, random, "base.");
  talpa::matrix<float, cpu> x(tokens, inputs), expected(tokens, outputs), y(tokens, outputs);
  talpa::fill_normal(x.view(), 1.0, random);
  talpa::linear{}.forward(ctx, base, x, expected, talpa::mode::inference);

  const auto params = layer.init(std::move(base), random);
  talpa::infer(ctx, layer, params, x, y);

  const bool same = std::equal(y.data(), y.data() + y.size(), expected.data());
  std::printf("talpa %d.%d.%d: the fresh layer %s its base\n", talpa::version_major,
              talpa::version_minor, talpa::version_patch, same ? "equals" : "differs from");
  return same ? 0 : 1;
}
