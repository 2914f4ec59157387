// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct exp_scale_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::exp_scale has no implementation for this backend here, include "
                "talpa/cpu/exp_scale.hpp for cpu, talpa/cuda/exp_scale.hpp for gpu "
                "(docs/architecture.md)");
};

/// Multiplies by a factor that is learned as its logarithm: y = exp(s) x, so it stays positive.
///
/// Shapes: s [1, 1], x and y of one shape; they may be the same view.
/// Cost: reads one, writes one.
/// Throws: shape_error.
template <class B, floating T>
void exp_scale(context<B>& ctx, input<T, B> s, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::exp_scale", "s", s, 1, 1, "one number");
  check_shape("ops::exp_scale", "y", y, x.rows, x.cols, "shape of x");
  exp_scale_impl<B>::forward(ctx, s, x, y);
}

/// Gradient of exp_scale: dx = exp(s) dy as dx_mode says, ds += exp(s) sum of x dy, unless ds is
/// empty.
///
/// Shapes: s and ds [1, 1], x, dy and dx of one shape; dx may be the same view as dy or x.
/// Determinism: a fixed order of additions: the same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void exp_scale_backward(context<B>& ctx, input<T, B> s, input<T, B> x, input<T, B> dy,
                        matrix_view<T, B> dx, grad_mode dx_mode, output<T, B> ds) {
  check_shape("ops::exp_scale_backward", "s", s, 1, 1, "one number");
  check_shape("ops::exp_scale_backward", "dy", dy, x.rows, x.cols, "shape of x");
  if (!ds.empty()) check_shape("ops::exp_scale_backward", "ds", ds, 1, 1, "one number");
  if (dx_mode != grad_mode::ignore) {
    check_shape("ops::exp_scale_backward", "dx", dx, x.rows, x.cols, "shape of x");
  }
  exp_scale_impl<B>::backward(ctx, s, x, dy, dx, dx_mode, ds);
}

}  // namespace talpa::ops
