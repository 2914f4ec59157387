// SPDX-License-Identifier: Apache-2.0
// Compiled once as TALPA_UNIT=first_unit and once as second_unit.
#include "unit.hpp"

#include <talpa/talpa.hpp>

#include <utility>

namespace odr {
namespace {

using talpa::cpu;
using talpa::index;

// Wide enough for Eigen to take the packing buffers of its products from the heap, whose alignment
// depends on the instruction set.
constexpr index tokens = 512, width = 512, experts = 8, rank = 4;

// Integers from -2 to 2. Every sum below stays under 2^24, so float arithmetic on them is exact and
// no order of summation, fused or not, can change a bit.
void fill(talpa::matrix_view<float, cpu> m, index step) {
  for (index i = 0; i < m.rows; ++i) {
    for (index j = 0; j < m.cols; ++j) {
      m(i, j) = static_cast<float>((i * step + j * j * 3 + i * j) % 5 - 2);
    }
  }
}

std::vector<float> values(talpa::matrix_view<const float, cpu> m) {
  std::vector<float> all;
  for (index i = 0; i < m.rows; ++i) {
    for (index j = 0; j < m.cols; ++j) all.push_back(m(i, j));
  }
  return all;
}

}  // namespace

result TALPA_UNIT() {
  using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::renormalised>>;
  using mole = talpa::mole_linear<router, talpa::lora>;

  talpa::context<cpu> ctx;
  talpa::generator random(1);
  mole layer{.router = {.selector = {.k = 1}},
             .expert = {.rank = rank, .alpha = static_cast<double>(rank)},
             .experts = experts};
  auto params = layer.init(
      talpa::linear{.bias = false}.init<float, cpu>(width, width, random, "base."), random);
  fill(params.base.weight.value(), 1);
  fill(params.expert.a.value(), 2);
  fill(params.expert.b.value(), 3);
  // A few inputs only, so that no gate of the softmax rounds to zero or one.
  talpa::matrix_view<float, cpu> scorer = params.router.scorer.weight.value();
  for (index e = 0; e < experts; ++e) {
    for (index j = 0; j < width; ++j) scorer(e, j) = j < 3 ? static_cast<float>(e % (j + 2)) : 0.0f;
  }

  talpa::matrix<float, cpu> x(tokens, width), y(tokens, width);
  fill(x.view(), 4);
  result r;
  talpa::infer(ctx, layer, params, x, y);
  r.y = values(y.view());
  params.base.freeze();
  params.base.pack(ctx);
  talpa::matrix<float, cpu> dy(tokens, width), dx(tokens, width);
  fill(dy.view(), 1);
  const auto trained = layer.forward(ctx, params, x, y, talpa::mode::training);
  layer.backward(ctx, params, trained, x, dy, dx, talpa::grad_mode::overwrite);
  for (const auto m : {dx.view(), params.expert.a.grad(), params.expert.b.grad()}) {
    const std::vector<float> some = values(m);
    r.gradients.insert(r.gradients.end(), some.begin(), some.end());
  }
  layer.router.selector.k = 2;
  const auto kept = layer.forward(ctx, params, x, y, talpa::mode::inference);
  r.gates = values(kept.routed.routing.gates);
  return r;
}

}  // namespace odr
