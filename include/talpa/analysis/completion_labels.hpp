// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/matrix.hpp>
#include <talpa/ops/cross_entropy.hpp>

#include <cstddef>
#include <cstdint>
#include <span>

namespace talpa {

/// Labels for training on completions only: what each token of a sequence is to predict.
///
/// With e the position behind the last occurrence of `end_of_prompt` in a sequence of L tokens, the
/// tokens that are to be learnt are those at e..L-1 and the last one, which counts as `end_of_text`
/// whatever it is; without an occurrence the last one alone. labels[s, t] is the token at t + 1
/// where that is to be learnt, otherwise ignore_label; the last position predicts nothing.
/// cross_entropy(logits [S L, C], labels) is then the mean over learnt tokens of the next-token
/// loss.
/// Shapes: tokens [S, L] -> labels [S L], as rows of logits lie.
/// Edges: with L = 1 or S = 0 nothing is learnt. The last column is the end of the text, so
/// sequences are padded on the left.
/// Cost: S L P comparisons for an end of prompt of P tokens. Determinism: exact.
/// Throws: value_error for a token below 0 (as an end or in a sequence) or an end of prompt without
/// tokens.
/// Source: the training of Router Lens and CEFT (arXiv 2508.19594).
struct completion_labels {
  static constexpr const char* name = "completion_labels";

  std::span<const std::int32_t> end_of_prompt;  ///< tokens that end the prompt, at least one
  std::int32_t end_of_text = 0;                 ///< token that ends a text, >= 0

  vector<std::int32_t, cpu> operator()(matrix_view<const std::int32_t, cpu> tokens) const {
    check_at_least(name, "end_of_prompt", static_cast<index>(end_of_prompt.size()), 1,
                   "tokens that end the prompt");
    check_at_least(name, "end_of_text", end_of_text, 0, "a token");
    for (const std::int32_t token : end_of_prompt) check_token("end_of_prompt", token);
    const index length = tokens.cols;
    vector<std::int32_t, cpu> labels(tokens.rows * length);
    for (index s = 0; s < tokens.rows; ++s) {
      const std::int32_t* const row = tokens.row(s);
      for (index t = 0; t < length; ++t) check_token("tokens", row[t]);
      const index first = completion(row, length);
      std::int32_t* const label = labels.data() + s * length;
      for (index t = 0; t < length; ++t) {
        const index next = t + 1;
        if (next == length) {
          label[t] = ignore_label;
        } else if (next == length - 1) {
          label[t] = end_of_text;
        } else {
          label[t] = next >= first ? row[next] : ignore_label;
        }
      }
    }
    return labels;
  }

 private:
  static void check_token(const char* argument, std::int32_t token) {
    check_at_least(name, argument, token, 0, "a token");
  }
  /// The position behind the last occurrence of end_of_prompt; `length` without one.
  index completion(const std::int32_t* row, index length) const {
    const auto size = static_cast<index>(end_of_prompt.size());
    for (index first = length - size; first >= 0; --first) {
      bool same = true;
      for (index i = 0; i < size; ++i) {
        same = same && row[first + i] == end_of_prompt[static_cast<std::size_t>(i)];
      }
      if (same) return first + size;
    }
    return length;
  }
};

}  // namespace talpa
