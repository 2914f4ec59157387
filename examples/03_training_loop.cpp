// SPDX-License-Identifier: Apache-2.0
// Why: the usual loop: a tape, AdamW with warm-up and cosine, clipping, and a balance loss.
//
// How: tokens come in four kinds, each with its own direction that decides between two classes. A
// frozen map with routed adapters and a trained head learn to classify them, first without and then
// with a balance loss. That loss is a term of the total like any other; its weight stands here.
//
// To try: other weights of the balance loss, balance::pooled, router_z as a third term, k = 2,
// params.router.freeze(), layer.expert.train_experts(...).

#include <talpa/talpa.hpp>

#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

namespace {

using talpa::cpu;
using matrix = talpa::matrix<float, cpu>;
using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::raw>>;
using balance = talpa::load_balance<talpa::balance::per_selection, talpa::balance::per_layer>;

constexpr talpa::index tokens = 512, inputs = 16, hidden = 16, classes = 2, kinds = 4;  // N, D, O
constexpr talpa::index steps = 300;

struct data {
  matrix x{tokens, inputs};                         // [N, D]
  talpa::vector<std::int32_t, cpu> labels{tokens};  // [N]
};

data make_data(talpa::generator& random) {
  matrix centres(kinds, inputs), directions(kinds, inputs);
  talpa::fill_normal(centres.view(), 1.0, random);
  talpa::fill_normal(directions.view(), 1.0, random);
  data d;
  talpa::fill_normal(d.x.view(), 1.0, random);
  for (talpa::index n = 0; n < tokens; ++n) {
    float side = 0.0F;
    for (talpa::index i = 0; i < inputs; ++i) side += d.x(n, i) * directions(n % kinds, i);
    d.labels[n] = side > 0.0F ? 1 : 0;
    for (talpa::index i = 0; i < inputs; ++i) d.x(n, i) += centres(n % kinds, i);
  }
  return d;
}

struct result {
  float task = 0.0F;               // loss of the last step
  talpa::statistics_report usage;  // of the experts in the last step
};

result train(const data& d, float balance_weight) {
  talpa::context<cpu> ctx(1);
  talpa::generator random(5);
  auto base = talpa::linear{}.init<float, cpu>(inputs, hidden, random, "base.");
  base.freeze();
  const talpa::mole_linear<router, talpa::lora> layer{
      .router = {.selector = {.k = 1}}, .expert = {.rank = 4, .dropout = 0.05}, .experts = 8};
  auto adapted = layer.init(std::move(base), random);
  auto head = talpa::linear{}.init<float, cpu>(hidden, classes, random, "head.");

  std::vector<talpa::parameter_group<float, cpu>> groups(2);
  groups[0].name = "adapters";
  groups[0].learning_rate = 1e-2;
  groups[0].add(adapted);  // what is frozen among them gets no state and no update
  groups[1].name = "head";
  groups[1].learning_rate = 1e-2;
  groups[1].weight_decay = 1e-2;
  groups[1].add(head);
  talpa::adamw<float, cpu> optimiser(std::move(groups));
  const talpa::warmup_cosine schedule{.warmup_steps = 20, .total_steps = steps};

  talpa::batch_info<float, cpu> batch;
  batch.random = &random;  // dropout takes its mask from here
  result r;
  talpa::tape<float, cpu> t(ctx);
  for (talpa::index step = 0; step < steps; ++step) {
    // [region step]
    const auto h = t.apply(layer, adapted, t.constant(d.x), talpa::mode::training, batch);
    const auto logits = t.linear(t.activation(talpa::silu{}, h.y), head.weight, head.bias);
    const auto task = t.cross_entropy(logits, d.labels);
    const auto even = t.apply_loss(balance{}, {h.routed});
    t.backward(t.weighted_sum({{task, 1.0F}, {even, balance_weight}}));
    talpa::clip_gradients(ctx, optimiser.parameters(), 1.0F);
    optimiser.step(ctx, schedule);
    optimiser.zero_grad(ctx);
    // [end step]
    if (step % 100 == 0 || step == steps - 1) {
      std::printf("  step %3td  task %.4f  balance %.3f\n", step, task.value()(0, 0),
                  even.value()(0, 0));
    }
    if (step == steps - 1) {
      r.task = task.value()(0, 0);
      r.usage = talpa::statistics_report(talpa::measure(ctx, h.routed.view()));
    }
    t.reset();
  }
  return r;
}

}  // namespace

int main() {
  talpa::generator random(11);
  const data d = make_data(random);
  std::puts("without a balance loss");
  const result without = train(d, 0.0F);
  std::puts("with a balance loss of weight 0.05 (1 is perfect balance)");
  const result with = train(d, 0.05F);
  std::printf("max violation %.2f without, %.2f with\n%s", without.usage.max_violation(),
              with.usage.max_violation(), with.usage.text().c_str());
  const bool learned = with.task < 0.2F;
  const bool even = with.usage.max_violation() < 0.5 * without.usage.max_violation();
  std::printf("the task was learned: %s; the balance loss evened the load: %s\n",
              learned ? "yes" : "NO", even ? "yes" : "NO");
  return learned && even ? 0 : 1;
}
