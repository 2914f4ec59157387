// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct convert_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::convert has no implementation for this backend here, include "
                "talpa/cuda/convert.hpp for gpu (docs/architecture.md)");
};

/// Writes x in another storage, each number rounded once: to = x.
///
/// Shapes: x and `to` [R, C], any strides.
/// Cost: reads one, writes one. Determinism: same bits on every backend.
/// Throws: shape_error.
template <class B, storage_scalar From, storage_scalar To>
void convert(context<B>& ctx, matrix_view<const From, B> x, matrix_view<To, B> to) {
  check_shape("ops::convert", "x", x, to.rows, to.cols, "shape of to");
  convert_impl<B>::run(ctx, x, to);
}

/// Writes x transposed: to[c, r] = x[r, c]. Else as convert.
template <class B, storage_scalar From, storage_scalar To>
void convert_transposed(context<B>& ctx, matrix_view<const From, B> x, matrix_view<To, B> to) {
  check_shape("ops::convert_transposed", "x", x, to.cols, to.rows, "shape of to, transposed");
  convert_impl<B>::run_transposed(ctx, x, to);
}

}  // namespace talpa::ops
