// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <string>

namespace talpa::detail {

/// x must hold the same number of rows for every block of f, and have its columns.
template <class T, class B>
void check_blocks(const char* function, const matrix_view<const T, B>& f,
                  const matrix_view<const T, B>& x) {
  if (f.rows == 0 || x.rows % f.rows != 0 || x.cols != f.cols) {
    throw_shape(function, "x", shape_text(x.rows, x.cols),
                concat("[P * ", std::to_string(f.rows), ", ", std::to_string(f.cols), "]"),
                "rows of all blocks, columns of f");
  }
}

}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct block_scale_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::block_scale has no implementation for this backend here, include "
                "talpa/cpu/block_scale.hpp for cpu, talpa/cuda/block_scale.hpp for gpu "
                "(docs/architecture.md)");
};

/// Scales the columns of each block of a bank by numbers of its own: y[e P + p, o] = f[e, o]
/// x[e P + p, o].
///
/// Backward: see block_scale_backward.
/// Shapes: f [E, O], x and y [E P, O]; y may be x.
/// Cost: E P O multiplications. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void block_scale(context<B>& ctx, input<T, B> f, input<T, B> x, matrix_view<T, B> y) {
  detail::check_blocks("ops::block_scale", f, x);
  check_shape("ops::block_scale", "y", y, x.rows, x.cols, "shape of x");
  block_scale_impl<B>::forward(ctx, f, x, y);
}

/// Backward of block_scale: dx[e P + p, o] = f[e, o] dy[e P + p, o] and
/// df[e, o] += sum_p dy[e P + p, o] x[e P + p, o], p in order.
///
/// Shapes: f and df [E, O]; x, dy and dx [E P, O]; dx may be dy. dx is overwritten, df added to.
/// Throws: shape_error.
template <class B, floating T>
void block_scale_backward(context<B>& ctx, input<T, B> f, input<T, B> x, input<T, B> dy,
                          matrix_view<T, B> dx, output<T, B> df) {
  detail::check_blocks("ops::block_scale_backward", f, x);
  check_shape("ops::block_scale_backward", "dy", dy, x.rows, x.cols, "shape of x");
  check_shape("ops::block_scale_backward", "dx", dx, x.rows, x.cols, "shape of x");
  check_shape("ops::block_scale_backward", "df", df, f.rows, f.cols, "shape of f");
  block_scale_impl<B>::backward(ctx, f, x, dy, dx, df);
}

}  // namespace talpa::ops
