// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>

namespace talpa::detail {

inline void check_clip(const char* function, double clip) {
  check_value(clip > 0.0 && clip < 0.5, function, "clip", clip,
              "above 0, below 0.5 = least probability");
}

}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct kl_divergence_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::kl_divergence has no implementation for this backend here, include "
                "talpa/cpu/kl_divergence.hpp for cpu, talpa/cuda/kl_divergence.hpp for gpu "
                "(docs/architecture.md)");
};

/// Computes the mean over rows of the Kullback-Leibler divergence of rows of probabilities p from
/// targets q: value = 1 / N sum over n, c of p' ln(p' / q'), where p' and q' are p and q clipped to
/// [clip, 1 - clip].
///
/// Shapes: p and q [N, C], value [1, 1].
/// Edges: without rows the value is 0; clipped rows need not sum to one, so the value may be below
/// 0 by about C clip; NaN stays NaN.
/// Cost: two logarithms an element.
/// Determinism: a fixed tree over rows: the same bits for any number of threads.
/// Throws: shape_error when the shapes do not fit; value_error for clip outside (0, 0.5).
/// Source: the distillation loss of FactorLLM (arXiv 2408.11855), with the prediction first, which
/// is the reverse of usual distillation, and clip 1e-7; for inputs of three dimensions its code
/// returns the rows of the first sequence alone, this takes the mean over all rows.
template <class B, floating T>
void kl_divergence(context<B>& ctx, input<T, B> p, input<T, B> q, double clip,
                   matrix_view<T, B> value) {
  check_shape("ops::kl_divergence", "q", q, p.rows, p.cols, "shape of p");
  check_shape("ops::kl_divergence", "value", value, 1, 1, "one number");
  detail::check_clip("ops::kl_divergence", clip);
  kl_divergence_impl<B>::forward(ctx, p, q, static_cast<T>(clip), value);
}

/// Gradient of kl_divergence: dp = dvalue / N (ln(p / q') + 1) where clip <= p <= 1 - clip, and 0
/// outside, as dp_mode says. The target has none.
///
/// Shapes: p, q and dp [N, C], dvalue [1, 1]; dp may be the same view as p or q.
/// Throws: as kl_divergence.
template <class B, floating T>
void kl_divergence_backward(context<B>& ctx, input<T, B> p, input<T, B> q, double clip,
                            input<T, B> dvalue, matrix_view<T, B> dp, grad_mode dp_mode) {
  if (dp_mode == grad_mode::ignore) return;
  check_shape("ops::kl_divergence_backward", "q", q, p.rows, p.cols, "shape of p");
  check_shape("ops::kl_divergence_backward", "dvalue", dvalue, 1, 1, "one number");
  check_shape("ops::kl_divergence_backward", "dp", dp, p.rows, p.cols, "shape of p");
  detail::check_clip("ops::kl_divergence_backward", clip);
  kl_divergence_impl<B>::backward(ctx, p, q, static_cast<T>(clip), dvalue, dp, dp_mode);
}

}  // namespace talpa::ops
