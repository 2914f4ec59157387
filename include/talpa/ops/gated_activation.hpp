// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/ops/activation.hpp>

namespace talpa::ops {

template <class B>
struct gated_activation_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::gated_activation has no implementation for this backend here, include "
                "talpa/cpu/gated_activation.hpp for cpu, talpa/cuda/gated_activation.hpp for gpu "
                "(docs/architecture.md)");
};

/// Gated linear unit: h = f(a) b elementwise, SwiGLU's with f = silu.
///
/// Backward: da = dh b f'(a), db = dh f(a): see gated_activation_backward.
/// Shapes: a, b and h of one shape; h may be the same view as a or b, which backward then lacks.
/// Cost: reads two, writes one. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <activation_function F, class B, floating T>
void gated_activation(context<B>& ctx, const F& f, input<T, B> a, input<T, B> b,
                      matrix_view<T, B> h) {
  check_shape("ops::gated_activation", "a", a, h.rows, h.cols, "shape of h");
  check_shape("ops::gated_activation", "b", b, h.rows, h.cols, "shape of h");
  gated_activation_impl<B>::forward(ctx, f, a, b, h);
}

/// Gradient of gated_activation: overwrites da = dh b f'(a) and db = dh f(a).
///
/// Shapes: a, b, dh, da and db of one shape; da or db may be the same view as dh.
/// Cost: reads three, writes two. Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <activation_function F, class B, floating T>
void gated_activation_backward(context<B>& ctx, const F& f, input<T, B> a, input<T, B> b,
                               input<T, B> dh, matrix_view<T, B> da, output<T, B> db) {
  check_shape("ops::gated_activation_backward", "b", b, a.rows, a.cols, "shape of a");
  check_shape("ops::gated_activation_backward", "dh", dh, a.rows, a.cols, "shape of a");
  check_shape("ops::gated_activation_backward", "da", da, a.rows, a.cols, "shape of a");
  check_shape("ops::gated_activation_backward", "db", db, a.rows, a.cols, "shape of a");
  gated_activation_impl<B>::backward(ctx, f, a, b, dh, da, db);
}

}  // namespace talpa::ops
