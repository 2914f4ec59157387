// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <type_traits>

namespace talpa::ops {

template <class B>
struct scale_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::scale has no implementation for this backend here, include "
                "talpa/cpu/scale.hpp for cpu, talpa/cuda/scale.hpp for gpu "
                "(docs/architecture.md)");
};

/// Computes y = alpha x.
///
/// Backward: dx = alpha dy, a call of the same op; to add to dx instead, axpy.
/// Shapes: x and y of one shape; they may be the same view.
/// Edges: 0 times infinity or NaN is NaN; to clear a matrix, fill it.
/// Cost: reads one, writes one. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <class B, floating T>
void scale(context<B>& ctx, std::type_identity_t<T> alpha, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::scale", "y", y, x.rows, x.cols, "shape of x");
  scale_impl<B>::run(ctx, alpha, x, y);
}

}  // namespace talpa::ops
