// SPDX-License-Identifier: Apache-2.0
// Why: a mixture that language conditions: what is asked decides how an image's tokens are treated.
//
// How: an image of a digit is five visual tokens, its quarters behind their mean as class token.
// Beside it lies a question as word embeddings: which digit, is it odd, is it large. The class
// token attends to the words, and what it reads weighs the experts for all tokens of the image
// (Parrot). The head sees the image alone: without words it can only guess what was asked, and
// with the words of another question it answers that one.
//
// To try: presets::parrot_paper, more experts, a fourth question.

#include "digit_training.hpp"

#include <talpa/talpa.hpp>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {
using talpa::cpu, talpa::index;
using matrix = talpa::matrix<float, cpu>;
using tape = talpa::tape<float, cpu>;
namespace data = talpa::examples;
constexpr index tokens = 5, width = 16, words = 4, questions = 3, experts = 4, images = 96;
constexpr index answers = 12, checks = 14;  // ten digits, no, yes; held-out batches
// Of the words which, digit, is, it, odd, large; -1 where a question is shorter.
constexpr int texts[questions][words] = {{0, 1, 2, 3}, {2, 3, 4, -1}, {2, 3, 5, -1}};
/// The words beside an image: its question, another one, or none.
enum class text { own, swapped, none };

struct experiment {
  const data::digits& d;
  data::data_split split = data::split_digits(d, 0.25, 1);
  talpa::context<cpu> ctx{1};  // small work, not worth a second thread
  talpa::generator random{1};
  talpa::parrot_block layer{.router = talpa::presets::parrot.router,
                            .expert = {.hidden = 32},
                            .experts = experts,
                            .residual = talpa::presets::parrot.residual};
  talpa::parrot_block::params<float, cpu> params = layer.init<float, cpu>(width, random, "parrot.");
  talpa::affine_params<float, cpu> head =
      talpa::linear{}.init<float, cpu>(tokens * width, answers, random, "head.");
  matrix words_of{6, width}, x{images * tokens, width}, rows{images * words, width};
  talpa::vector<std::uint8_t, cpu> present{images * words};
  talpa::vector<std::int32_t, cpu> labels{images};
  matrix gates{questions, experts};  // sums over images since they were last cleared

  void take(const std::vector<index>& from, index first, text beside) {
    for (index n = 0; n < images; ++n) {
      const index row = data::row_at(from, first + n / questions), question = n % questions;
      for (index c = 0; c < width; ++c) x(n * tokens, c) = 0.0F;
      for (index i = 0; i < data::pixel_count; ++i) {
        const index quarter = i / 32 * 2 + i % 8 / 4, place = i / 8 % 4 * 4 + i % 4;
        x(n * tokens + 1 + quarter, place) = d.ink(row, i) - 0.3F;
        x(n * tokens, place) += (d.ink(row, i) - 0.3F) / 4.0F;
      }
      for (index w = 0; w < words; ++w) {
        const int word = texts[(question + (beside == text::swapped)) % questions][w];
        present[n * words + w] = beside != text::none && word >= 0;
        for (index c = 0; word >= 0 && c < width; ++c) rows(n * words + w, c) = words_of(word, c);
      }
      const int y = d.label(row);
      labels[n] = question == 0 ? y : 10 + (question == 1 ? y % 2 : y >= 5);
    }
  }
  auto forward(tape& t, talpa::mode m) {
    const auto h =
        t.apply(layer, params, t.constant(x), m,
                {.sequence_length = tokens, .conditioning = {.rows = rows, .present = present}});
    for (index i = 0; i < images * experts; ++i) {
      const index n = i / experts, e = i % experts;
      gates(n % questions, e) += h.routed.view().routing.gates(n * tokens, e);
    }
    return t.linear(t.reshape(h.y, images, tokens * width), head.weight, head.bias);
  }
  void train(text beside) {
    talpa::fill_normal(words_of.view(), 1.0, random);
    data::train(ctx, params, head, 1e-2, 500, [&](tape& t, index step) {
      take(split.train, step * images / questions, beside);
      return t.cross_entropy(forward(t, talpa::mode::training), labels);
    });
  }
  double accuracy(text beside) {
    gates = matrix(questions, experts);
    return data::accuracy(ctx, labels, checks, [&](tape& t, index i) {
      take(split.held_out, i * images / questions, beside);
      return forward(t, talpa::mode::inference);
    });
  }
};
}  // namespace

int main(int count, char** arguments) {
  const auto d = data::load_digits(count > 1 ? arguments[1] : "examples/data/digits.csv");
  experiment with{.d = d}, without{.d = d};
  with.train(text::own);
  without.train(text::none);
  const double mute = without.accuracy(text::none), swapped = with.accuracy(text::swapped);
  const double asked = with.accuracy(text::own);
  const char* const question[] = {"which digit is it", "is it odd", "is it large"};
  double least = 1.0;  // distance in total variation of the two questions that are closest
  for (talpa::index q = 0; q < questions; ++q) {
    std::printf("mean gates of %-18s", question[q]);
    double distance = 0.0;
    for (talpa::index e = 0; e < experts; ++e) {
      std::printf(" %.3f", with.gates(q, e) * questions / (checks * images));
      distance += 0.5 * std::abs(with.gates(q, e) - with.gates((q + 1) % questions, e));
    }
    std::puts("");
    least = std::min(least, distance * questions / (checks * images));
  }
  std::printf("accuracy %.3f with the question, %.3f without, %.3f with another one\n", asked, mute,
              swapped);
  const bool fine = asked > mute + 0.15 && swapped < mute && least > 0.1;
  std::printf("the mixture %s the language\n", fine ? "follows" : "does NOT follow");
  return fine ? 0 : 1;
}
