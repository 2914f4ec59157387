// SPDX-License-Identifier: Apache-2.0
// Why: a routed layer inside somebody else's training loop: no tape, no optimiser, forward and
// backward called by hand.
//
// How: the tokens come in four kinds, and the target changes a frozen linear map in another way for
// each kind. Four experts of rank 2 behind a top-2 router learn the four changes. One adapter of
// rank 8 has as many weights, but it is one linear map for all kinds and cannot.
//
// To try: k = 1 (its gate is the constant 1: the task gives the router no gradient), gate::raw,
// rank = 1, experts = 8; base.freeze() left out.

#include <talpa/talpa.hpp>

#include <cstdio>
#include <utility>

namespace {

using talpa::cpu;
using talpa::grad_mode;
using matrix = talpa::matrix<float, cpu>;
using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::renormalised>>;
using layer_type = talpa::mole_linear<router, talpa::lora>;
using params_type = layer_type::params<float, cpu>;

constexpr talpa::index tokens = 256, inputs = 16, outputs = 8, kinds = 4;

matrix normal_matrix(talpa::index rows, talpa::index cols, double deviation,
                     talpa::generator& random) {
  matrix m(rows, cols);
  talpa::fill_normal(m.view(), deviation, random);
  return m;
}

struct result {
  float first = 0.0F, last = 0.0F;  // losses
  talpa::statistics_report usage;   // of the experts at the end
};

result train(talpa::context<cpu>& ctx, const layer_type& layer, params_type& params,
             const matrix& x, const matrix& target) {
  constexpr int steps = 1200;
  constexpr float learning_rate = 0.5F;
  matrix y(tokens, outputs), dy(tokens, outputs);  // [N, O]
  matrix value(1, 1), dvalue(1, 1);
  dvalue(0, 0) = 1.0F;
  result r;
  for (int step = 0;; ++step) {
    // What forward keeps lies in ctx.memory until this scope ends.
    const talpa::workspace<cpu>::scope scope(ctx.memory);
    const auto kept = layer.forward(ctx, params, x, y, talpa::mode::training);
    talpa::ops::mse(ctx, y, target, value.view());
    if (step == 0) r.first = value(0, 0);
    if (step % 400 == 0) std::printf("  step %4d  loss %.4f\n", step, value(0, 0));
    if (step == steps) {
      r.last = value(0, 0);
      r.usage = talpa::statistics_report(talpa::measure(ctx, kept.routed));
      return r;
    }
    talpa::ops::mse_backward(ctx, y, target, dvalue, dy.view(), grad_mode::overwrite);
    // Nobody wants the gradient of the tokens. Those of the parameters are added to.
    layer.backward(ctx, params, kept, x, dy, {}, grad_mode::ignore);
    params.visit([](talpa::parameter<float, cpu>& p) {
      for (talpa::index i = 0; i < p.trained_size(); ++i) {
        p.value().data[i] -= learning_rate * p.grad().data[i];
        p.grad().data[i] = 0.0F;
      }
    });
  }
}

}  // namespace

int main() {
  talpa::context<cpu> ctx(1);  // threads: more do not pay for matrices as small as these
  talpa::generator random(7);
  auto base = talpa::linear{}.init<float, cpu>(inputs, outputs, random, "base.");
  base.freeze();

  // Token n is of kind c = n mod 4: the centre of its kind and some noise. Its target is
  // x W^T + b + (x down_c) up_c, a change of rank 1 for each kind.
  matrix x = normal_matrix(tokens, inputs, 0.3, random);             // [N, D]
  const matrix centres = normal_matrix(kinds, inputs, 1.0, random);  // [C, D]
  const matrix down = normal_matrix(inputs, kinds, 0.3, random);     // [D, C]
  const matrix up = normal_matrix(kinds, outputs, 1.0, random);      // [C, O]
  matrix target(tokens, outputs);                                    // [N, O]
  for (talpa::index n = 0; n < tokens; ++n) {
    for (talpa::index d = 0; d < inputs; ++d) x(n, d) += centres(n % kinds, d);
  }
  talpa::affine_forward(ctx, base, x, target.view());
  for (talpa::index n = 0; n < tokens; ++n) {
    float change = 0.0F;
    for (talpa::index d = 0; d < inputs; ++d) change += x(n, d) * down(d, n % kinds);
    for (talpa::index o = 0; o < outputs; ++o) target(n, o) += change * up(n % kinds, o);
  }

  const layer_type mixture{
      .router = {.selector = {.k = 2}}, .expert = {.rank = 2, .alpha = 4.0}, .experts = 4};
  const layer_type single{
      .router = {.selector = {.k = 1}}, .expert = {.rank = 8, .alpha = 16.0}, .experts = 1};
  auto mixture_params = mixture.init(base, random);
  auto single_params = single.init(std::move(base), random);

  std::puts("four experts of rank 2, two a token");
  const result many = train(ctx, mixture, mixture_params, x, target);
  std::fputs(many.usage.text().c_str(), stdout);
  std::puts("one adapter of rank 8");
  const result one = train(ctx, single, single_params, x, target);

  const bool learned = many.last < 0.05F * many.first && many.last < 0.25F * one.last;
  std::printf("the mixture learned the four changes: %s\n", learned ? "yes" : "NO");
  return learned && many.usage.dead_experts() == 0 ? 0 : 1;
}
