// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <type_traits>

namespace talpa::detail {

/// b + rate sign(total / experts - count), sign(0) = 0; the comparison is made in whole numbers.
template <class T>
TALPA_HD T moved_bias(T b, index count, index total, index experts, double rate) {
  const index load = count * experts;
  const double sign = load < total ? 1.0 : load > total ? -1.0 : 0.0;
  return static_cast<T>(static_cast<double>(b) + rate * sign);
}

}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct update_bias_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::update_bias has no implementation for this backend here, include "
                "talpa/cpu/update_bias.hpp for cpu, talpa/cuda/update_bias.hpp for gpu "
                "(docs/architecture.md)");
};

/// Moves the bias of each expert one step towards equal load, where the statistics of the step are:
/// no host waits, so that it may end a captured step.
///
/// b_e += rate sign(mean of counts - counts_e), with sign(0) = 0: experts with less than the mean
/// become more likely. It has no gradient.
/// Shapes: counts [1, E], the real tokens of each expert (routing_statistics::totals.counts), bias
/// [1, E].
/// Cost: reads E counts and moves E numbers.
/// Determinism: exact but for one rounding; the comparison is made in whole numbers.
/// Throws: shape_error; value_error for a rate that is not >= 0.
/// Source: DeepSeek-AI 2024, DeepSeek-V3 (arXiv 2412.19437), rate 1e-3, 0 at the end of training.
template <class B, floating T>
void update_bias(context<B>& ctx, std::type_identity_t<matrix_view<const index, B>> counts,
                 double rate, matrix_view<T, B> bias) {
  check_shape("ops::update_bias", "counts", counts, 1, counts.cols, "one number an expert");
  check_shape("ops::update_bias", "bias", bias, 1, counts.cols, "shape of counts");
  check_value(rate >= 0.0, "ops::update_bias", "rate", rate, ">= 0");
  update_bias_impl<B>::run(ctx, counts, rate, bias);
}

}  // namespace talpa::ops
