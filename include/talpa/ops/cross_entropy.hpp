// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <cstdint>

namespace talpa {

/// The label of a row that a loss leaves out: padding, or a token that is not to be predicted.
inline constexpr std::int32_t ignore_label = -1;

/// What cross_entropy_backward reads beside logits and labels. It lies in the context's workspace.
template <class T, class B>
struct cross_entropy_saved {
  vector_view<T, B> row_max;      // [N]
  vector_view<T, B> row_sum;      // [N], sum of exp(x - row_max)
  vector_view<index, B> counted;  // [1], rows with a label
};

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct cross_entropy_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::cross_entropy has no implementation for this backend here, include "
                "talpa/cpu/cross_entropy.hpp for cpu, talpa/cuda/cross_entropy.hpp for gpu "
                "(docs/architecture.md)");
};

/// Computes the mean over counted rows of -log softmax(logits)[label].
///
/// value = 1 / M sum over n with label >= 0 of log(sum over c of exp(x[n, c] - max)) + max -
/// x[n, label], where M is the number of such rows.
/// Shapes: logits [N, C], labels [N] of 0..C-1 or ignore_label, value [1, 1].
/// Edges: without counted rows the value and the gradient are 0; a logit of -inf has probability 0;
/// NaN in a counted row makes the value NaN.
/// Cost: one exponential an element; saves two numbers a row in the workspace (valid until the
/// caller rewinds it), not the probabilities, which backward computes again.
/// Determinism: a fixed tree over rows: the same bits for any number of threads.
/// Throws: shape_error when the shapes do not fit; value_error for a label outside its range,
/// before any work. On a device labels are looked at in a checked context only.
template <class B, floating T>
cross_entropy_saved<T, B> cross_entropy(context<B>& ctx, input<T, B> logits,
                                        vector_input<std::int32_t, B> labels,
                                        matrix_view<T, B> value) {
  check_size("ops::cross_entropy", "labels", labels, logits.rows, "rows of logits");
  check_shape("ops::cross_entropy", "value", value, 1, 1, "one number");
  cross_entropy_impl<B>::check_labels(ctx, labels, logits.cols);
  const cross_entropy_saved<T, B> saved{ctx.memory.template take<T>(logits.rows),
                                        ctx.memory.template take<T>(logits.rows),
                                        ctx.memory.template take<index>(1)};
  cross_entropy_impl<B>::forward(ctx, logits, labels, saved, value);
  return saved;
}

/// Gradient of cross_entropy: dlogits = dvalue (softmax(logits) - onehot(label)) / M, and 0 in rows
/// that were left out, as dlogits_mode says.
///
/// Shapes: logits and dlogits [N, C], labels [N], dvalue [1, 1]; dlogits may be the same view as
/// logits.
/// Cost: one exponential an element.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void cross_entropy_backward(context<B>& ctx, const cross_entropy_saved<T, B>& saved,
                            input<T, B> logits, vector_input<std::int32_t, B> labels,
                            input<T, B> dvalue, matrix_view<T, B> dlogits, grad_mode dlogits_mode) {
  if (dlogits_mode == grad_mode::ignore) return;
  check_size("ops::cross_entropy_backward", "labels", labels, logits.rows, "rows of logits");
  check_size("ops::cross_entropy_backward", "saved", saved.row_max, logits.rows, "rows of logits");
  check_shape("ops::cross_entropy_backward", "dvalue", dvalue, 1, 1, "one number");
  check_shape("ops::cross_entropy_backward", "dlogits", dlogits, logits.rows, logits.cols,
              "shape of logits");
  cross_entropy_impl<B>::backward(ctx, saved, logits, labels, dvalue, dlogits, dlogits_mode);
}

}  // namespace talpa::ops
