// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct weight_norm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::weight_norm has no implementation for this backend here, include "
                "talpa/cpu/weight_norm.hpp for cpu, talpa/cuda/weight_norm.hpp for gpu "
                "(docs/architecture.md)");
};

/// Lengths of the rows of a weight and what brings them to given magnitudes:
/// norm_o = |v_o|, ratio_o = m_o / norm_o, shift_o = (m_o - norm_o) / norm_o = ratio_o - 1.
///
/// Backward: see weight_norm_backward.
/// Shapes: v [O, D]; m, norm, ratio and shift [1, O].
/// Edges: m_o equal to norm_o gives ratio 1 and shift 0 exactly. A row of zeros has no direction:
/// norm 0, ratio 1, shift 0. NaN gives NaN.
/// Cost: reads v. Determinism: same bits for any number of threads.
/// Throws: shape_error.
/// Source: Salimans and Kingma 2016 (arXiv 1602.07868).
template <class B, floating T>
void weight_norm(context<B>& ctx, input<T, B> v, input<T, B> m, output<T, B> norm,
                 matrix_view<T, B> ratio, output<T, B> shift) {
  check_shape("ops::weight_norm", "m", m, 1, v.rows, "one number a row of v");
  check_shape("ops::weight_norm", "norm", norm, 1, v.rows, "one number a row of v");
  check_shape("ops::weight_norm", "ratio", ratio, 1, v.rows, "one number a row of v");
  check_shape("ops::weight_norm", "shift", shift, 1, v.rows, "one number a row of v");
  weight_norm_impl<B>::forward(ctx, v, m, norm, ratio, shift);
}

/// Gradient of weight_norm from its results and that of the ratio:
/// dm_o += dratio_o / norm_o and dv_o = -(dratio_o ratio_o / norm_o^2) v_o.
///
/// Shapes: v and dv [O, D], the others [1, O]; dv may be v, and an empty one is left out, which
/// takes the norm for a constant. dm is added to, dv overwritten.
/// Edges: a row of zeros gets nothing. Throws: shape_error.
template <class B, floating T>
void weight_norm_backward(context<B>& ctx, input<T, B> v, input<T, B> norm, input<T, B> ratio,
                          input<T, B> dratio, matrix_view<T, B> dm, output<T, B> dv) {
  check_shape("ops::weight_norm_backward", "norm", norm, 1, v.rows, "one number a row of v");
  check_shape("ops::weight_norm_backward", "ratio", ratio, 1, v.rows, "one number a row of v");
  check_shape("ops::weight_norm_backward", "dratio", dratio, 1, v.rows, "one number a row of v");
  check_shape("ops::weight_norm_backward", "dm", dm, 1, v.rows, "one number a row of v");
  if (!dv.empty()) check_shape("ops::weight_norm_backward", "dv", dv, v.rows, v.cols, "shape of v");
  weight_norm_impl<B>::backward(ctx, v, norm, ratio, dratio, dm, dv);
}

}  // namespace talpa::ops
