// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <cstdint>

namespace talpa::detail {

/// The place in an expert's column, from 1, of the first score that is one too many for it, of so
/// many tokens.
struct quantile_place {
  index k, experts;
  TALPA_HD index operator()(index tokens) const { return tokens * k / experts + 1; }
};

}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct balance_quantiles_impl {
  static_assert(
      detail::always_false<B>,
      "talpa: ops::balance_quantiles has no implementation for this backend here, include "
      "talpa/cpu/balance_quantiles.hpp for cpu, talpa/cuda/balance_quantiles.hpp for gpu "
      "(docs/architecture.md)");
};

/// Sets the bias of a selector so that each expert would have had its share of the tokens just
/// seen.
///
/// With beta = -bias: alpha_n = the (k + 1)-th largest s_ne - beta_e of token n; new beta_e = the
/// (T k / E + 1)-th largest s_ne - alpha_n of expert e, T k / E rounded down, over the T tokens
/// that take part. One step of coordinate descent on the prices of a balanced assignment; used for
/// the next batch, with several batches of a step their mean. It has no gradient.
/// Shapes: scores [N, E], as the selector adds the bias to them; padding_mask [N] or empty; bias
/// [1, E].
/// Edges: padding, tokens with NaN and those with k or fewer finite scores take no part. Where none
/// does, or the quantile of an expert is not finite, the bias stays.
/// Cost: CPU N E operations on average; device k + 2 passes over the scores and one for each four
/// bits of T.
/// Determinism: one rounding a difference, comparisons; the same bits on every backend.
/// Throws: shape_error; value_error unless 1 <= k < E.
/// Source: quantile balancing as in Megatron-LM, 2026.
template <class B, floating T>
void balance_quantiles(context<B>& ctx, input<T, B> scores, index k,
                       vector_input<std::uint8_t, B> padding_mask, matrix_view<T, B> bias) {
  constexpr const char* name = "ops::balance_quantiles";
  check_shape(name, "bias", bias, 1, scores.cols, "one number an expert of scores");
  if (!padding_mask.empty()) {
    check_size(name, "padding_mask", padding_mask, scores.rows, "one flag a token");
  }
  check_range(name, "k", k, 1, scores.cols - 1, "experts - 1");
  if (scores.rows == 0) return;
  balance_quantiles_impl<B>::run(ctx, scores, k, padding_mask, bias);
}

}  // namespace talpa::ops
