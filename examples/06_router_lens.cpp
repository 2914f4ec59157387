// SPDX-License-Identifier: Apache-2.0
// Why: a few experts of a mixture do the work of one task: find them, prove it, tune only them.
//
// How: one mixture follows four instructions about handwritten digits; of the last it knows few
// images. Its router begins with a leaning of each to two experts, as a trained one has. Router
// Lens counts the experts behind the last. Without them its answers break (the causal test).
// Adapters on them alone, the rest frozen, make it good (CEFT), and the others keep what they had.
//
// To try: no leaning, cumulative_experts instead of top_experts, stimulated experts.

#include "digit_training.hpp"

#include <talpa/talpa.hpp>

#include <cstdint>
#include <cstdio>
#include <vector>

namespace {
using talpa::cpu, talpa::index;
using tape = talpa::tape<float, cpu>;
namespace data = talpa::examples;
using selector = talpa::intervene<talpa::top_k<talpa::gate::raw>>;
using base_layer = talpa::moe_ffn<talpa::router<talpa::linear_scorer, selector>>;
constexpr index experts = 8, instructions = 4, last = instructions - 1;
constexpr index width = data::pixel_count + instructions, batch_rows = 128;

struct experiment {
  data::digits d;
  data::data_split split = data::split_digits(d, 0.25, 1);
  talpa::context<cpu> ctx{1};  // small work, not worth a second thread
  talpa::generator random{1};
  talpa::affine_params<float, cpu> head =
      talpa::linear{}.init<float, cpu>(width, data::digit_count, random, "head.");
  talpa::matrix<float, cpu> x{batch_rows, width};  // pixels, then which instruction
  talpa::vector<std::int32_t, cpu> labels{batch_rows};

  /// Instructions [from, to) by turns, about rows from the first on. Answers are, mod 10: the
  /// digit, its successor, 9 - digit, 3 digit. Of the last the mixture knows only 30 images.
  void take(const std::vector<index>& rows, index first, index from, index to) {
    const int factor[] = {1, 1, 9, 3}, shift[] = {0, 1, 9, 0};
    for (index n = 0; n < batch_rows; ++n) {
      const index i = from + n % (to - from);
      const index end = to - from > 1 && i == last ? 30 : std::ssize(rows);
      const index row = data::row_at(rows, (first + n / (to - from)) % end);
      for (index c = 0; c < data::pixel_count; ++c) x(n, c) = d.ink(row, c) - 0.3F;
      for (index k = 0; k < instructions; ++k) x(n, data::pixel_count + k) = k == i ? 4.0F : 0.0F;
      labels[n] = (factor[i] * d.label(row) + shift[i]) % 10;
    }
  }

  /// Trains what is not frozen; returns the bytes of gradients and moments.
  index train(const auto& layer, auto& params, index from, index to, index steps) {
    return data::train(ctx, params, head, 5e-3, steps, [&](tape& t, index step) {
      take(split.train, step * batch_rows / (to - from), from, to);
      const auto h =
          t.apply(layer, params, t.constant(x), talpa::mode::training, {.random = &random});
      return t.cross_entropy(t.linear(h.y, head.weight, head.bias), labels);
    });
  }

  /// Accuracy on an instruction; a lens counts the experts of its tokens.
  double accuracy(const auto& layer, auto& params, const std::vector<index>& rows,
                  index instruction, talpa::router_lens* lens = nullptr) {
    return data::accuracy(ctx, labels, std::ssize(rows) / batch_rows, [&](tape& t, index i) {
      take(rows, i * batch_rows, instruction, instruction + 1);
      const auto h = t.apply(layer, params, t.constant(x), talpa::mode::inference);
      if (lens != nullptr) lens->add(0, h.routed.view());
      return t.linear(h.y, head.weight, head.bias);
    });
  }
};
}  // namespace

int main(int count, char** arguments) {
  experiment e{.d = data::load_digits(count > 1 ? arguments[1] : "examples/data/digits.csv")};
  const base_layer base{
      .router = {.selector = {.inner = {.k = 2}}}, .expert = {.hidden = 16}, .residual = 1.0};
  auto params = base.init<float, cpu>(width, e.random, "base.");
  for (talpa::index k = 0; k < experts; ++k) {
    params.router.scorer.weight.value()(k, data::pixel_count + k / 2) += 0.5F;
  }
  const auto of_base = e.train(base, params, 0, instructions, 800);
  params.freeze();
  e.head.freeze();
  talpa::router_lens lens(1, experts, 2);
  e.accuracy(base, params, e.split.train, last, &lens);
  const auto chosen = talpa::top_experts(lens.counts(), 2)[0];
  auto masked = base;
  for (const talpa::index k : chosen) masked.router.selector.blocked.add(k);

  auto ceft = talpa::presets::ceft;
  ceft.router.selector.k = 2;
  ceft.expert.network.hidden = 16;
  ceft.experts = experts;
  ceft.residual = 1.0;
  decltype(ceft)::params<float, cpu> tuned;
  tuned.router.scorer = params.router.scorer;
  tuned.expert = ceft.expert.adapt(params.expert, experts, e.random, "adapter.");
  const auto of_all = e.train(ceft, tuned, last, last + 1, 0);
  ceft.expert.train_experts(tuned.expert, chosen);
  const auto of_chosen = e.train(ceft, tuned, last, last + 1, 300);

  std::printf("experts of the last instruction: %td and %td\n", chosen[0], chosen[1]);
  std::puts("accuracy         base  without them  they tuned");
  bool fine = 4 * of_chosen == of_all;
  for (talpa::index i = 0; i < instructions; ++i) {
    const double before = e.accuracy(base, params, e.split.held_out, i);
    const double without = e.accuracy(masked, params, e.split.held_out, i);
    const double after = e.accuracy(ceft, tuned, e.split.held_out, i);
    std::printf("instruction %td %7.3f %13.3f %11.3f\n", i, before, without, after);
    fine = fine &&
           (i == last ? without < before - 0.2 && after > before + 0.1 : after > before - 0.05);
  }
  std::printf("bytes of gradients and moments: base %td, adapters on all experts %td, on two %td\n",
              of_base, of_all, of_chosen);
  std::printf("two experts %s the instruction\n", fine ? "carry" : "do NOT carry");
  return fine ? 0 : 1;
}
