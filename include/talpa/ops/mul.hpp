// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct mul_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::mul has no implementation for this backend here, include "
                "talpa/cpu/mul.hpp for cpu, talpa/cuda/mul.hpp for gpu "
                "(docs/architecture.md)");
};

/// Computes the elementwise product c = a b, or c += a b with grad_mode::accumulate.
///
/// Backward: da = dc b, db = dc a, calls of the same op.
/// Shapes: a, b and c of one shape; c may be the same view as a or b.
/// Edges: grad_mode::ignore does nothing.
/// Cost: reads two (accumulate: three), writes one.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error when the shapes differ.
template <class B, floating T>
void mul(context<B>& ctx, input<T, B> a, input<T, B> b, matrix_view<T, B> c,
         grad_mode c_mode = grad_mode::overwrite) {
  if (c_mode == grad_mode::ignore) return;
  check_shape("ops::mul", "a", a, c.rows, c.cols, "shape of c");
  check_shape("ops::mul", "b", b, c.rows, c.cols, "shape of c");
  mul_impl<B>::run(ctx, a, b, c, c_mode);
}

}  // namespace talpa::ops
