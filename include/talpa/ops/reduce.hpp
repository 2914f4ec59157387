// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <type_traits>

namespace talpa::ops {

template <class B>
struct reduce_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::column_sum and ops::sum_of_squares have no implementation for this "
                "backend here, include "
                "talpa/cpu/reduce.hpp for cpu, talpa/cuda/reduce.hpp for gpu "
                "(docs/architecture.md)");
};

/// Sums columns: y[d] = beta y[d] + sum over n of x[n, d]. The gradient of a bias is column_sum of
/// dy with beta 1.
///
/// Shapes: x [N, D], y [1, D].
/// Edges: beta == 0 ignores what y held, NaN included; N == 0 leaves beta y.
/// Cost: reads x once; N D / 256 elements of scratch.
/// Determinism: partial sums over 256 rows each, then the partials in order: the same bits for any
/// number of threads.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void column_sum(context<B>& ctx, input<T, B> x, std::type_identity_t<T> beta, matrix_view<T, B> y) {
  check_shape("ops::column_sum", "y", y, 1, x.cols, "one row, columns of x");
  reduce_impl<B>::column_sum(ctx, x, beta, y);
}

/// Computes the sum of squares y = beta y + sum over n, d of x[n, d]^2, as gradient clipping needs.
///
/// Shapes: x [N, D], y [1, 1].
/// Edges: beta == 0 ignores what y held. Squares beyond the largest number of T make infinity.
/// Cost: reads x once.
/// Determinism: a fixed tree over rows: the same bits for any number of threads.
/// Throws: shape_error when y is not [1, 1].
template <class B, floating T>
void sum_of_squares(context<B>& ctx, input<T, B> x, std::type_identity_t<T> beta,
                    matrix_view<T, B> y) {
  check_shape("ops::sum_of_squares", "y", y, 1, 1, "one number");
  reduce_impl<B>::sum_of_squares(ctx, x, beta, y);
}

}  // namespace talpa::ops
