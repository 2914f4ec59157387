// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>
#include <talpa/ops/update_bias.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

// What moves the bias of a biased selector (biased_top_k) between steps. It has no gradient: the
// load of the last step decides.

namespace talpa {

/// Moves the bias of each expert one step towards equal load.
///
/// b_e += rate sign(mean of counts - counts_e), with sign(0) = 0: experts with less than the mean
/// become more likely.
/// Shapes: bias [1, E], in host memory; counts [E], the real tokens of each expert in the last
/// step, as statistics_report has them; ops::update_bias is the same where the statistics are.
/// Determinism: exact but for one rounding; the comparison is made in whole numbers.
/// Throws: shape_error; value_error for a rate that is not >= 0.
/// Source: DeepSeek-AI 2024, DeepSeek-V3 (arXiv 2412.19437), rate 1e-3, 0 at the end of training.
template <floating T>
void update_bias(matrix_view<T, cpu> bias, const std::vector<index>& counts, double rate) {
  constexpr const char* name = "update_bias";
  const auto experts = static_cast<index>(counts.size());
  check_shape(name, "bias", bias, 1, experts, "one number an expert of counts");
  check_value(rate >= 0.0, name, "rate", rate, ">= 0");
  index total = 0;
  for (const index count : counts) total += count;
  for (index e = 0; e < experts; ++e) {
    bias(0, e) =
        detail::moved_bias(bias(0, e), counts[static_cast<std::size_t>(e)], total, experts, rate);
  }
}

/// Sets the bias so that each expert would have had its share of the tokens just seen.
///
/// With beta = -bias: alpha_t = the (k + 1)-th largest s_te - beta_e of token t; new beta_e = the
/// (T k / E + 1)-th largest s_te - alpha_t of expert e over the T real tokens. One step of
/// coordinate descent on the prices of a balanced assignment; used for the next batch.
/// Shapes: scores [N, E], as the selector adds the bias to them; padding_mask [N] or empty; bias
/// [1, E]; all in host memory.
/// Edges: without real tokens the bias stays.
/// Cost: N E operations on average, and one copy of an expert's column.
/// Throws: shape_error; value_error unless 1 <= k < E, and for T k not divisible by E.
/// Source: quantile balancing as in Megatron-LM, 2026, there averaged over microbatches.
template <floating T>
void balance_quantiles(
    matrix_view<T, cpu> bias, std::type_identity_t<matrix_view<const T, cpu>> scores, index k,
    std::type_identity_t<vector_view<const std::uint8_t, cpu>> padding_mask = {}) {
  constexpr const char* name = "balance_quantiles";
  const index experts = scores.cols;
  check_shape(name, "bias", bias, 1, experts, "one number an expert of scores");
  if (!padding_mask.empty()) {
    check_size(name, "padding_mask", padding_mask, scores.rows, "one flag a token");
  }
  check_range(name, "k", k, 1, experts - 1, "experts - 1");
  std::vector<index> real;
  for (index n = 0; n < scores.rows; ++n) {
    if (padding_mask.empty() || padding_mask[n] != 0) real.push_back(n);
  }
  const auto tokens = static_cast<index>(real.size());
  check_value(tokens * k % experts == 0, name, "padding_mask", static_cast<double>(tokens),
              "real tokens with tokens k divisible by experts");
  if (tokens == 0) return;

  // The i-th largest, i from 0.
  const auto largest = [](std::vector<T>& values, index i) {
    std::nth_element(values.begin(), values.begin() + i, values.end(),
                     [](T a, T b) { return a > b; });
    return values[static_cast<std::size_t>(i)];
  };
  std::vector<T> alpha, row(static_cast<std::size_t>(experts));
  for (const index n : real) {
    for (index e = 0; e < experts; ++e) {
      row[static_cast<std::size_t>(e)] = scores(n, e) + bias(0, e);
    }
    alpha.push_back(largest(row, k));
  }
  std::vector<T> column(real.size());
  for (index e = 0; e < experts; ++e) {
    for (std::size_t i = 0; i < real.size(); ++i) column[i] = scores(real[i], e) - alpha[i];
    bias(0, e) = -largest(column, tokens * k / experts);
  }
}

}  // namespace talpa
