// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct softmax_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::softmax has no implementation for this backend here, include "
                "talpa/cpu/softmax.hpp for cpu, talpa/cuda/softmax.hpp for gpu "
                "(docs/architecture.md)");
};

/// Normalises every row to probabilities: y[n, d] = exp(x[n, d] - max) / sum over d.
///
/// Shapes: x and y [N, D]; they may be the same view.
/// Edges: -inf gives 0; a row of -inf only, or with NaN or +inf in it, becomes NaN; no overflow.
/// Cost: one exponential an element. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <class B, floating T>
void softmax(context<B>& ctx, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::softmax", "y", y, x.rows, x.cols, "shape of x");
  softmax_impl<B>::forward(ctx, x, y);
}

/// Gradient of softmax from its result: dx = y (dy - sum over d of dy y), as dx_mode says.
///
/// Shapes: y, dy and dx [N, D]; dx may be the same view as dy or y.
/// Cost: reads two twice, writes one. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <class B, floating T>
void softmax_backward(context<B>& ctx, input<T, B> y, input<T, B> dy, matrix_view<T, B> dx,
                      grad_mode dx_mode) {
  if (dx_mode == grad_mode::ignore) return;
  check_shape("ops::softmax_backward", "dy", dy, y.rows, y.cols, "shape of y");
  check_shape("ops::softmax_backward", "dx", dx, y.rows, y.cols, "shape of y");
  softmax_impl<B>::backward(ctx, y, dy, dx, dx_mode);
}

}  // namespace talpa::ops
