// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "digits.hpp"

#include <talpa/core/index.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace talpa::examples {

/// An instruction: a question about the digit in the image. Answers are small integers, and all
/// instructions answer through the same 10-way head.
struct task_definition {
  const char* name;
  const char* question;
  std::array<std::uint8_t, digit_count> answer;  // by digit
};

/// "Loops" counts the closed regions of the digit as these people write it: 0, 6 and 9 have one, 8
/// has two. A handwritten 4 is open at the top, so it has none. The answer is a function of the
/// digit, not of the ink: a sloppy 0 that does not close still has one loop. The successor of 9 is
/// 0.
inline constexpr std::array<task_definition, 8> tasks{{
    // clang-format off
    // digit                                0  1  2  3  4  5  6  7  8  9
    {"name",       "which digit is it?",  {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}}},
    {"parity",     "is it odd?",          {{0, 1, 0, 1, 0, 1, 0, 1, 0, 1}}},
    {"at least 5", "is it 5 or more?",    {{0, 0, 0, 0, 0, 1, 1, 1, 1, 1}}},
    {"loops",      "how many loops?",     {{1, 0, 0, 0, 0, 0, 1, 0, 2, 1}}},
    {"mod 3",      "what is it mod 3?",   {{0, 1, 2, 0, 1, 2, 0, 1, 2, 0}}},
    {"successor",  "what follows it?",    {{1, 2, 3, 4, 5, 6, 7, 8, 9, 0}}},
    {"complement", "what is 9 minus it?", {{9, 8, 7, 6, 5, 4, 3, 2, 1, 0}}},
    {"prime",      "is it prime?",        {{0, 0, 1, 1, 0, 1, 0, 1, 0, 0}}},
    // clang-format on
}};

inline constexpr index task_count = static_cast<index>(tasks.size());
inline constexpr index name_task = 0;
inline constexpr index class_count = digit_count;
/// Pixels in 0..1, then the one-hot instruction.
inline constexpr index input_width = pixel_count + task_count;

/// One question: an image and an instruction.
struct example {
  index row;
  index task;
};

inline std::uint8_t answer_of(const digits& data, example e) {
  return tasks[static_cast<std::size_t>(e.task)]
      .answer[static_cast<std::size_t>(data.label(e.row))];
}

/// The input of one question: `input` [input_width] is overwritten.
inline void write_input(const digits& data, example e, float* input) {
  for (index p = 0; p < pixel_count; ++p) input[p] = data.ink(e.row, p);
  for (index t = 0; t < task_count; ++t) input[pixel_count + t] = t == e.task ? 1.0f : 0.0f;
}

/// Every row with every instruction, rows outermost.
inline std::vector<example> all_examples(const std::vector<index>& rows) {
  std::vector<example> result;
  result.reserve(rows.size() * tasks.size());
  for (const index row : rows) {
    for (index t = 0; t < task_count; ++t) result.push_back({row, t});
  }
  return result;
}

/// Every row with one instruction.
inline std::vector<example> examples_of(const std::vector<index>& rows, index task) {
  std::vector<example> result;
  result.reserve(rows.size());
  for (const index row : rows) result.push_back({row, task});
  return result;
}

/// Index of the largest of `classes` logits; ties go to the lower index. A row with a NaN has no
/// answer: -1.
inline int predicted_class(const float* logits, index classes = class_count) {
  int best = 0;
  for (int c = 0; c < classes; ++c) {
    if (logits[c] != logits[c]) return -1;
    if (logits[c] > logits[best]) best = c;
  }
  return best;
}

/// Shares of right answers.
struct task_scores {
  std::array<double, tasks.size()> accuracy{};  // by instruction, 0..1

  /// Unweighted mean over the instructions.
  double mean() const {
    double sum = 0;
    for (const double a : accuracy) sum += a;
    return sum / static_cast<double>(accuracy.size());
  }
  /// The instruction with the lowest accuracy; ties go to the lower index.
  index worst() const {
    return std::min_element(accuracy.begin(), accuracy.end()) - accuracy.begin();
  }
};

/// Asks every instruction about every row. `logits_of(examples)` is called once per instruction
/// with a vector of examples and returns a pointer to [examples, class_count] logits, row-major,
/// that stays valid until its next call.
template <class LogitsOf>
task_scores evaluate(const digits& data, const std::vector<index>& rows, LogitsOf&& logits_of) {
  task_scores scores;
  for (index t = 0; t < task_count; ++t) {
    const std::vector<example> asked = examples_of(rows, t);
    const float* logits = logits_of(asked);
    index right = 0;
    for (std::size_t i = 0; i < asked.size(); ++i) {
      const float* row = logits + static_cast<index>(i) * class_count;
      right += predicted_class(row) == static_cast<int>(answer_of(data, asked[i]));
    }
    scores.accuracy[static_cast<std::size_t>(t)] =
        asked.empty() ? 0.0 : static_cast<double>(right) / static_cast<double>(asked.size());
  }
  return scores;
}

/// What always giving each instruction's most frequent answer of `train` scores on `held_out`: the
/// floor that any method has to beat.
inline task_scores majority_scores(const digits& data, const data_split& split) {
  task_scores scores;
  for (index t = 0; t < task_count; ++t) {
    std::array<index, digit_count> votes{};
    for (const index row : split.train) ++votes[answer_of(data, {row, t})];
    const auto majority = std::max_element(votes.begin(), votes.end()) - votes.begin();
    index right = 0;
    for (const index row : split.held_out) right += answer_of(data, {row, t}) == majority;
    scores.accuracy[static_cast<std::size_t>(t)] =
        split.held_out.empty()
            ? 0.0
            : static_cast<double>(right) / static_cast<double>(split.held_out.size());
  }
  return scores;
}

}  // namespace talpa::examples
