// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct bias_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::add_bias has no implementation for this backend here, include "
                "talpa/cpu/bias.hpp for cpu, talpa/cuda/bias.hpp for gpu "
                "(docs/architecture.md)");
};

/// Adds one row to every row: y = x + 1 bias.
///
/// Backward: dx = dy, dbias += column_sum(dy).
/// Shapes: x and y [N, O], bias [1, O]; x and y may be the same view.
/// Cost: reads one, writes one. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes do not fit.
template <class B, floating T>
void add_bias(context<B>& ctx, input<T, B> x, input<T, B> bias, matrix_view<T, B> y) {
  check_shape("ops::add_bias", "y", y, x.rows, x.cols, "shape of x");
  check_shape("ops::add_bias", "bias", bias, 1, x.cols, "one row, columns of x");
  bias_impl<B>::run(ctx, x, bias, y);
}

}  // namespace talpa::ops
