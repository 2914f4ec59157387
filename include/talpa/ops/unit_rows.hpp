// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct unit_rows_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::unit_rows has no implementation for this backend here, include "
                "talpa/cpu/unit_rows.hpp for cpu, talpa/cuda/unit_rows.hpp for gpu "
                "(docs/architecture.md)");
};

/// Divides every row by its length: y_n = x_n / max(|x_n|, epsilon), |.| the Euclidean norm.
///
/// Shapes: x and y [N, D], inverse [N, 1], which receives 1 / max(|x_n|, epsilon); x and y may be
/// the same view.
/// Parameters: epsilon > 0.
/// Edges: a row no longer than epsilon is divided by epsilon, so zeros stay zeros. Squares beyond
/// the largest number of T make a row of zeros; NaN gives NaN.
/// Cost: reads x twice from cache, writes y. Determinism: same bits for any number of threads.
/// Throws: shape_error; value_error unless epsilon > 0.
template <class B, floating T>
void unit_rows(context<B>& ctx, input<T, B> x, double epsilon, matrix_view<T, B> y,
               output<T, B> inverse) {
  check_shape("ops::unit_rows", "y", y, x.rows, x.cols, "shape of x");
  check_shape("ops::unit_rows", "inverse", inverse, x.rows, 1, "rows of x, one number each");
  check_value(static_cast<T>(epsilon) > T{0}, "ops::unit_rows", "epsilon", epsilon, "> 0");
  unit_rows_impl<B>::forward(ctx, x, static_cast<T>(epsilon), y, inverse);
}

/// Gradient of unit_rows from its results: dx_n = inverse_n (dy_n - y_n (y_n . dy_n)), as dx_mode
/// says; without the second term for a row that is no longer than epsilon.
///
/// Shapes: y, dy and dx [N, D], inverse [N, 1]; dx may be the same view as dy or y.
/// Throws: as unit_rows.
template <class B, floating T>
void unit_rows_backward(context<B>& ctx, input<T, B> y, input<T, B> inverse, double epsilon,
                        input<T, B> dy, matrix_view<T, B> dx, grad_mode dx_mode) {
  if (dx_mode == grad_mode::ignore) return;
  check_shape("ops::unit_rows_backward", "dy", dy, y.rows, y.cols, "shape of y");
  check_shape("ops::unit_rows_backward", "dx", dx, y.rows, y.cols, "shape of y");
  check_shape("ops::unit_rows_backward", "inverse", inverse, y.rows, 1,
              "rows of y, one number each");
  check_value(static_cast<T>(epsilon) > T{0}, "ops::unit_rows_backward", "epsilon", epsilon, "> 0");
  unit_rows_impl<B>::backward(ctx, y, inverse, static_cast<T>(epsilon), dy, dx, dx_mode);
}

}  // namespace talpa::ops
