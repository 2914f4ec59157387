// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct mse_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::mse has no implementation for this backend here, include "
                "talpa/cpu/mse.hpp for cpu, talpa/cuda/mse.hpp for gpu "
                "(docs/architecture.md)");
};

/// Computes the mean squared error: value = 1 / (N D) sum over n, d of (y - target)^2.
///
/// Shapes: y and target [N, D], value [1, 1].
/// Edges: of nothing the value is 0.
/// Cost: reads two.
/// Determinism: a fixed tree over rows: the same bits for any number of threads.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void mse(context<B>& ctx, input<T, B> y, input<T, B> target, matrix_view<T, B> value) {
  check_shape("ops::mse", "target", target, y.rows, y.cols, "shape of y");
  check_shape("ops::mse", "value", value, 1, 1, "one number");
  mse_impl<B>::forward(ctx, y, target, value);
}

/// Gradient of mse: dy = dvalue 2 (y - target) / (N D), as dy_mode says. That of the target has the
/// other sign: call with y and target exchanged.
///
/// Shapes: y, target and dy [N, D], dvalue [1, 1]; dy may be the same view as y or target.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void mse_backward(context<B>& ctx, input<T, B> y, input<T, B> target, input<T, B> dvalue,
                  matrix_view<T, B> dy, grad_mode dy_mode) {
  if (dy_mode == grad_mode::ignore) return;
  check_shape("ops::mse_backward", "target", target, y.rows, y.cols, "shape of y");
  check_shape("ops::mse_backward", "dvalue", dvalue, 1, 1, "one number");
  check_shape("ops::mse_backward", "dy", dy, y.rows, y.cols, "shape of y");
  mse_impl<B>::backward(ctx, y, target, dvalue, dy, dy_mode);
}

}  // namespace talpa::ops
