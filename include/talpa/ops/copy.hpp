// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct copy_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::copy has no implementation for this backend here, include "
                "talpa/cpu/copy.hpp for cpu, talpa/cuda/copy.hpp for gpu "
                "(docs/architecture.md)");
};

/// Copies x to y.
///
/// Shapes: x and y of one shape, strides may differ; they must not overlap unless they are the same
/// view.
/// Cost: reads x once, writes y once. Determinism: exact.
/// Throws: shape_error when the shapes differ.
template <class B, class T>
void copy(context<B>& ctx, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::copy", "y", y, x.rows, x.cols, "shape of x");
  copy_impl<B>::run(ctx, x, y);
}

}  // namespace talpa::ops
