// SPDX-License-Identifier: Apache-2.0
// Why: a dense feed-forward network works with all of its neurons for every token. FactorLLM cuts
// it into experts and works with some of them, without training from the beginning.
//
// How: a dense SwiGLU network learns to name handwritten digits. Its neurons, grouped by the tokens
// they work for, become four experts of which a router turns two on. The router learns from labels:
// the experts nearest to their share of the dense network's output. The experts learn the task.
//
// To try: one expert of four, contiguous_split, straight_through in the place of the labels.

#include "quickstart/digits.hpp"

#include <talpa/talpa.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <utility>
#include <vector>

namespace {
using talpa::cpu, talpa::index;
using matrix = talpa::matrix<float, cpu>;
namespace data = talpa::examples;
constexpr index width = data::pixel_count, classes = data::digit_count, neurons = 512;
constexpr index batch_rows = 128, steps = 150;
constexpr talpa::dense_ffn<> dense;
constexpr talpa::factored_ffn<> factored{.router = {.scorer = {.bias = true}, .selector = {.k = 2}},
                                         .experts = 4};

struct batch {
  matrix x;
  talpa::vector<std::int32_t, cpu> digits;
};
batch take(const data::digits& d, const std::vector<index>& rows, std::size_t first, index size) {
  batch b{matrix(size, width), talpa::vector<std::int32_t, cpu>(size)};
  for (index n = 0; n < size; ++n) {
    const index row = rows[(first + static_cast<std::size_t>(n)) % rows.size()];
    const std::uint8_t* const image = d.image(row);
    for (index i = 0; i < width; ++i) b.x(n, i) = image[i] / float{data::max_intensity} - 0.3F;
    b.digits[n] = d.labels[static_cast<std::size_t>(row)];
  }
  return b;
}

/// Trains what is not frozen; objective(tape, x, what the layer made of it, task loss) is the loss.
template <class Layer, class Params, class Objective>
void train(const Layer& layer, Params& params, talpa::affine_params<float, cpu>& head,
           const data::digits& d, const std::vector<index>& rows, Objective objective) {
  talpa::context<cpu> ctx(1);  // small work, not worth a second thread
  talpa::tape<float, cpu> t(ctx);
  std::vector<talpa::parameter_group<float, cpu>> groups(1);
  groups[0].learning_rate = 2e-3;
  groups[0].add(params);
  groups[0].add(head);
  talpa::adamw<float, cpu> optimiser(std::move(groups));
  for (index step = 0; step < steps; ++step) {
    const batch b = take(d, rows, static_cast<std::size_t>(step * batch_rows), batch_rows);
    const auto out = t.apply(layer, params, t.constant(b.x), talpa::mode::training);
    const auto task = t.cross_entropy(t.linear(out.y, head.weight, head.bias), b.digits);
    t.backward(objective(t, b.x, out, task));
    optimiser.step(ctx, talpa::warmup_cosine{.warmup_steps = 20, .total_steps = steps});
    optimiser.zero_grad(ctx);
    t.reset();
  }
}

/// Share of digits named right, and the time of 20 forwards.
template <class Layer, class Params>
std::pair<double, double> measure(const Layer& layer, const Params& params,
                                  const talpa::affine_params<float, cpu>& head, const batch& b) {
  talpa::context<cpu> ctx(1);
  matrix y(b.x.rows(), width), logits(b.x.rows(), classes);
  const std::clock_t start = std::clock();
  for (int n = 0; n < 20; ++n) talpa::infer(ctx, layer, params, b.x, y.view());
  const auto time = static_cast<double>(std::clock() - start);
  talpa::infer(ctx, talpa::linear{}, head, y, logits.view());
  double right = 0.0;
  for (index n = 0; n < y.rows(); ++n) {
    const float* const row = logits.view().row(n);
    if (std::max_element(row, row + classes) - row == b.digits[n]) right += 1.0;
  }
  return {100.0 * right / static_cast<double>(y.rows()), time};
}
}  // namespace

int main(int count, char** arguments) {
  const auto d = data::load_digits(count > 1 ? arguments[1] : "examples/data/digits.csv");
  const auto rows = data::split_digits(d, 0.25, 1);
  const batch held_out = take(d, rows.held_out, 0, static_cast<talpa::index>(rows.held_out.size()));
  talpa::context<cpu> ctx(1);
  talpa::generator random(1);
  auto teacher = dense.init<float, cpu>(width, neurons, random, "dense.");
  auto head = talpa::linear{}.init<float, cpu>(width, classes, random, "head.");
  train(dense, teacher, head, d, rows.train, [](auto&, auto&, auto&, auto task) { return task; });
  head.freeze();
  const auto [whole, dense_time] = measure(dense, teacher, head, held_out);

  matrix h(batch_rows, neurons);
  dense.neurons(ctx, teacher, take(d, rows.train, 0, batch_rows).x, h.view());
  const talpa::coactivation_split by_use{.active = neurons / 4};
  auto student = factored.split(teacher, by_use(ctx, h.view(), 4), random, "student.");
  const double cut = measure(factored, student, head, held_out).first;
  train(factored, student, head, d, rows.train, [&](auto& t, auto& x, auto& out, auto task) {
    matrix target(batch_rows, width);
    talpa::infer(ctx, dense, teacher, x, target.view());
    const auto mask = factored.label(t.executor(), student, x, target).chosen.mask;
    const talpa::labelled<talpa::prior_approximate> route{.labels = mask};
    return t.weighted_sum({{task, 1.0F}, {t.apply_loss(route, {out.routed}), 0.5F}});
  });
  const auto [tuned, time] = measure(factored, student, head, held_out);
  std::printf("dense %.1f %%, 2 of 4 experts %.1f %%, tuned %.1f %% in %.2f of the dense time\n",
              whole, cut, tuned, time / dense_time);
  const bool fine = whole > 90.0 && cut < tuned && tuned > 0.95 * whole;
  std::puts(fine ? "half of the network does the work" : "the experts did NOT learn the work");
  return fine ? 0 : 1;
}
