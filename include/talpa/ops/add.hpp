// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <type_traits>

namespace talpa::ops {

template <class B>
struct add_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::add has no implementation for this backend here, include "
                "talpa/cpu/add.hpp for cpu, talpa/cuda/add.hpp for gpu "
                "(docs/architecture.md)");
};

/// Computes c = a + b.
///
/// Backward: da = db = dc.
/// Shapes: a, b and c of one shape; c may be the same view as a or b.
/// Cost: reads two, writes one.
/// Throws: shape_error when the shapes differ.
template <class B, floating T>
void add(context<B>& ctx, input<T, B> a, input<T, B> b, matrix_view<T, B> c) {
  check_shape("ops::add", "a", a, c.rows, c.cols, "shape of c");
  check_shape("ops::add", "b", b, c.rows, c.cols, "shape of c");
  add_impl<B>::add(ctx, a, b, c);
}

/// Computes y += alpha x.
///
/// Shapes: x and y of one shape; they may be the same view.
/// Determinism: alpha == 1 adds x exactly as it is.
/// Cost: reads two, writes one.
/// Throws: shape_error when the shapes differ.
template <class B, floating T>
void axpy(context<B>& ctx, std::type_identity_t<T> alpha, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::axpy", "x", x, y.rows, y.cols, "shape of y");
  add_impl<B>::axpy(ctx, alpha, x, y);
}

}  // namespace talpa::ops
