// SPDX-License-Identifier: Apache-2.0
#include <talpa/talpa.hpp>

#include <cmath>
#include <cstdio>
#include <utility>

int main() {
  // y = x W^T + b + sum_e g_e s B_e A_e x: two of eight low-rank experts a token.
  using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::renormalised>>;
  const talpa::mole_linear<router, talpa::lora> layer{
      .router = {.selector = {.k = 2}}, .expert = {.rank = 4, .alpha = 8.0}, .experts = 8};

  talpa::context<talpa::cpu> ctx;
  talpa::generator random(1);
  auto base = talpa::linear{}.init<float, talpa::cpu>(64, 32, random, "base.");
  base.freeze();
  auto params = layer.init(std::move(base), random);
  // B starts at zero, so that a fresh adapter changes nothing. Here it shall change something.
  talpa::fill_normal(params.expert.b.value(), 0.1, random);

  talpa::matrix<float, talpa::cpu> x(4, 64), y(4, 32), dx(4, 64);
  talpa::fill_normal(x.view(), 1.0, random);

  const auto kept = layer.forward(ctx, params, x, y, talpa::mode::training);
  std::fputs(talpa::to_text(kept.routed.routing).c_str(), stdout);

  // The gradient of |y|^2 / 2 with respect to y is y itself.
  layer.backward(ctx, params, kept, x, y, dx, talpa::grad_mode::overwrite);
  params.visit([](const talpa::parameter<float, talpa::cpu>& p) {
    double squares = 0.0;  // a frozen parameter has no gradient to sum
    for (talpa::index i = 0; i < p.trained_size(); ++i) squares += std::pow(p.grad().data[i], 2.0);
    std::printf("%-13s [%td, %td] %s, |gradient| %.3f\n", p.name().c_str(), p.rows(), p.cols(),
                p.trainable() ? "trains" : "frozen", std::sqrt(squares));
  });
}
