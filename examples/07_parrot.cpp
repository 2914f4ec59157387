// SPDX-License-Identifier: Apache-2.0
// Why: a mixture that language conditions: what is asked decides how an image's tokens are treated.
//
// How: an image of a digit is five visual tokens, its quarters behind their mean as class token.
// Beside it lies a question as word embeddings: which digit, is it odd, is it large. The class
// token attends to the words, and what it reads weighs the experts for all tokens of the image
// (Parrot).
// The head sees the image alone: without words it can only guess what was asked.
//
// To try: presets::parrot_paper, more experts, a fourth question.

#include "quickstart/digits.hpp"

#include <talpa/talpa.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

namespace {
using talpa::cpu, talpa::index;
using matrix = talpa::matrix<float, cpu>;
namespace data = talpa::examples;
constexpr index tokens = 5, width = 16, words = 4, questions = 3, experts = 4, images = 96;
constexpr index answers = 12, checks = 14;  // ten digits, no, yes; held-out batches
// Of the words which, digit, is, it, odd, large; -1 where a question is shorter.
constexpr int texts[questions][words] = {{0, 1, 2, 3}, {2, 3, 4, -1}, {2, 3, 5, -1}};
struct batch {
  matrix x{images * tokens, width}, rows{images * words, width};
  talpa::vector<std::uint8_t, cpu> present{images * words};
  talpa::vector<std::int32_t, cpu> labels{images};
};
batch take(const data::digits& d, const std::vector<index>& rows, index first,
           const matrix& words_of, bool with_text) {
  batch b;
  for (index n = 0; n < images; ++n) {
    const index question = n % questions;
    const index row = rows[static_cast<std::size_t>(first + n / questions) % rows.size()];
    for (index i = 0; i < data::pixel_count; ++i) {
      const float ink = d.image(row)[i] / float{data::max_intensity} - 0.3F;
      const index quarter = i / 32 * 2 + i % 8 / 4, place = i / 8 % 4 * 4 + i % 4;
      b.x(n * tokens + 1 + quarter, place) = ink;
      b.x(n * tokens, place) += ink / 4.0F;
    }
    for (index w = 0; w < words; ++w) {
      const int word = texts[question][w];
      b.present[n * words + w] = with_text && word >= 0;
      for (index c = 0; word >= 0 && c < width; ++c) b.rows(n * words + w, c) = words_of(word, c);
    }
    const int y = d.labels[static_cast<std::size_t>(row)];
    b.labels[n] = question == 0 ? y : 10 + (question == 1 ? y % 2 : y >= 5);
  }
  return b;
}

/// Trains and returns the held-out accuracy; adds up the gates of each question.
double run(const data::digits& d, bool with_text, matrix& gates) {
  talpa::context<cpu> ctx(1);  // small work, not worth a second thread
  const auto split = data::split_digits(d, 0.25, 1);
  talpa::generator random(1);
  auto layer = talpa::presets::parrot;
  layer.expert.hidden = 32, layer.experts = experts;
  auto params = layer.init<float, cpu>(width, random, "parrot.");
  auto head = talpa::linear{}.init<float, cpu>(tokens * width, answers, random, "head.");
  matrix words_of(6, width);
  talpa::fill_normal(words_of.view(), 1.0, random);
  std::vector<talpa::parameter_group<float, cpu>> groups(1);
  groups[0].learning_rate = 1e-2;
  groups[0].add(params).add(head);
  talpa::adamw<float, cpu> optimiser(std::move(groups));
  talpa::tape<float, cpu> t(ctx);
  const auto answer = [&](const batch& b, talpa::mode m) {
    const auto h = t.apply(
        layer, params, t.constant(b.x), m,
        {.sequence_length = tokens, .conditioning = {.rows = b.rows, .present = b.present}});
    const auto side_by_side = t.reshape(h.y, images, tokens * width);
    return std::pair(t.linear(side_by_side, head.weight, head.bias), h.routed);
  };
  for (index step = 0; step < 500; ++step) {
    const batch b = take(d, split.train, step * images / questions, words_of, with_text);
    t.backward(t.cross_entropy(answer(b, talpa::mode::training).first, b.labels));
    optimiser.step(ctx, talpa::warmup_cosine{.warmup_steps = 20, .total_steps = 500});
    optimiser.zero_grad(ctx);
    t.reset();
  }
  index right = 0;
  for (index i = 0; i < checks; ++i) {
    const batch b = take(d, split.held_out, i * images / questions, words_of, with_text);
    const auto [logits, routed] = answer(b, talpa::mode::inference);
    for (index n = 0; n < images; ++n) {
      const float* const row = logits.value().row(n);
      right += std::max_element(row, row + answers) - row == b.labels[n];
      for (index e = 0; e < experts; ++e) {
        gates(n % questions, e) +=
            routed.view().routing.gates(n * tokens, e) * questions / (checks * images);
      }
    }
    t.reset();
  }
  return static_cast<double>(right) / (checks * images);
}
}  // namespace

int main(int count, char** arguments) {
  const auto d = data::load_digits(count > 1 ? arguments[1] : "examples/data/digits.csv");
  matrix gates(questions, experts), unused(questions, experts);
  const double asked = run(d, true, gates), mute = run(d, false, unused);
  const char* const question[] = {"which digit is it", "is it odd", "is it large"};
  double least = 1.0;  // distance in total variation of the two questions that are closest
  for (talpa::index q = 0; q < questions; ++q) {
    std::printf("mean gates of %-18s", question[q]);
    double distance = 0.0;
    for (talpa::index e = 0; e < experts; ++e) {
      std::printf(" %.3f", gates(q, e));
      distance += 0.5 * std::abs(gates(q, e) - gates((q + 1) % questions, e));
    }
    std::puts("");
    least = std::min(least, distance);
  }
  std::printf("accuracy %.3f with the question, %.3f without\n", asked, mute);
  const bool fine = asked > mute + 0.15 && least > 0.1;
  std::puts(fine ? "the mixture follows the language" : "the mixture does NOT follow the language");
  return fine ? 0 : 1;
}
