// SPDX-License-Identifier: Apache-2.0
// Why: where adapters sit round a frozen mixture matters: PERFT's four places, one rank.
//
// How: a small mixture of SwiGLU experts learns to name handwritten digits and is frozen, head
// included. Adapters alone make it answer another question, the digit's successor mod 10: beside
// the base one (S), four that are always on (D) or two of four behind a router of their own (R);
// inside it one in each expert, behind the base's router (E).
//
// To try: another question, another rank, parallel_adapter<>, placement::base_weighted.

#include "digit_training.hpp"

#include <talpa/talpa.hpp>

#include <cstdint>
#include <cstdio>
#include <type_traits>
#include <utility>
#include <vector>

namespace {
using talpa::cpu, talpa::index;
using router = talpa::router<talpa::linear_scorer, talpa::top_k<talpa::gate::renormalised>>;
using base_layer = talpa::moe_ffn<router>;
using matrix = talpa::matrix<float, cpu>;
using tape = talpa::tape<float, cpu>;
namespace data = talpa::examples;
constexpr index width = data::pixel_count, classes = data::digit_count, batch_rows = 128;
constexpr base_layer base{
    .router = {.selector = {.k = 2}}, .expert = {.hidden = 16}, .experts = 8, .residual = 1.0};

struct batch {
  matrix x{batch_rows, width};
  talpa::vector<std::int32_t, cpu> labels{batch_rows};

  void take(const data::digits& d, const std::vector<index>& rows, index first, int shift) {
    for (index n = 0; n < batch_rows; ++n) {
      const index row = data::row_at(rows, first + n);
      for (index i = 0; i < width; ++i) x(n, i) = d.ink(row, i) - 0.3F;
      labels[n] = (d.label(row) + shift) % 10;
    }
  }
};

/// Trains what is not frozen on the question digit + shift; returns the held-out accuracy.
template <class Layer>
double train(const Layer& layer, typename Layer::template params<float, cpu>& params,
             talpa::affine_params<float, cpu>& head, const data::digits& d,
             const data::data_split& split, int shift, index steps) {
  talpa::context<cpu> ctx(1);  // small work, not worth a second thread
  batch b;
  const auto logits_of = [&](tape& t, talpa::mode m) {
    return t.linear(t.apply(layer, params, t.constant(b.x), m).y, head.weight, head.bias);
  };
  data::train(ctx, params, head, 5e-3, steps, [&](tape& t, index step) {
    b.take(d, split.train, step * batch_rows, shift);
    return t.cross_entropy(logits_of(t, talpa::mode::training), b.labels);
  });
  const index batches = std::ssize(split.held_out) / batch_rows;
  return data::accuracy(ctx, b.labels, batches, [&](tape& t, index i) {
    b.take(d, split.held_out, i * batch_rows, shift);
    return logits_of(t, talpa::mode::inference);
  });
}

}  // namespace

int main(int count, char** arguments) {
  const auto d = data::load_digits(count > 1 ? arguments[1] : "examples/data/digits.csv");
  const auto split = data::split_digits(d, 0.25, 1);
  talpa::generator random(1);
  auto trained = base.init<float, cpu>(width, random, "base.");
  auto head = talpa::linear{}.init<float, cpu>(width, classes, random, "head.");
  std::printf("base names %.1f %% of digits\n",
              100.0 * train(base, trained, head, d, split, 0, 300));
  trained.freeze();
  head.freeze();
  bool fine = true;
  const auto compare = [&](const char* name, const auto& place, talpa::index adapters) {
    const talpa::perft_block<base_layer, std::decay_t<decltype(place)>, talpa::lora> block{
        .base = base,
        .placement = place,
        .adapter = {.rank = 4, .alpha = 8.0},
        .adapters = adapters};
    auto params = block.template init<float, cpu>(trained, random);
    const double before = train(block, params, head, d, split, 1, 0);
    const double after = train(block, params, head, d, split, 1, 800);
    talpa::index weights = 0;
    params.visit([&](const auto& p) { weights += p.trained_size(); });
    std::printf("%-24s %5td trained weights  %5.1f %% before, %5.1f %% after\n", name, weights,
                100.0 * before, 100.0 * after);
    fine = fine && before < 0.2 && after > 0.6;
  };
  namespace placement = talpa::placement;
  compare("PERFT-S, one", placement::single{}, 1);
  compare("PERFT-D, sum of 4", placement::dense{}, 4);
  compare("PERFT-R, 2 of 4", placement::routed<router>{{.selector = {.k = 2}}}, 4);
  compare("PERFT-E, one an expert", placement::embedded{}, 8);
  std::puts(fine ? "every placement learned the question" : "a placement did NOT learn");
  return fine ? 0 : 1;
}
