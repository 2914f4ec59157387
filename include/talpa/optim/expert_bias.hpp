// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>
#include <talpa/ops/update_bias.hpp>

#include <cstddef>
#include <vector>

// What moves the bias of a biased selector (biased_top_k) between steps by a report of the load. It
// has no gradient. ops::update_bias and ops::balance_quantiles do so where the numbers are.

namespace talpa {

/// Moves the bias of each expert one step towards equal load.
///
/// b_e += rate sign(mean of counts - counts_e), with sign(0) = 0: experts with less than the mean
/// become more likely.
/// Shapes: bias [1, E], in host memory; counts [E], the real tokens of each expert in the last
/// step, as statistics_report has them; ops::update_bias is the same where the statistics are.
/// Cost: reads E counts and moves E numbers.
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

}  // namespace talpa
