// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <algorithm>

namespace talpa::ops {

template <class B>
struct svd_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::svd has no implementation for this backend here, include "
                "talpa/cpu/svd.hpp for cpu, talpa/cuda/svd.hpp for gpu (docs/architecture.md)");
};

/// Singular value decomposition W = sum_k s_k u_k v_k^T, k < K = min(O, D), of a weight.
///
/// s descends, equal values in an order that depends on W alone; the u_k, and the v_k, are
/// orthonormal. The signs are fixed: of the largest elements of u_k by absolute value the first is
/// positive.
/// Shapes: w [O, D]; u [K, O], row k is u_k; s [1, K]; v [K, D], row k is v_k.
/// Edges: to a singular value of zero belongs a row of zeros in the longer of u and v, and a
/// direction in the other. NaN or infinity anywhere in w makes all results NaN. O = 0 or D = 0
/// gives nothing.
/// Cost: one-sided Jacobi in double, sweeps of 6 K^2 (O + D) flop each until no pair of rows is
/// more than rounding away from orthogonal, some ten; takes K (O + D) doubles of scratch. For the
/// beginning of a training, not for its steps. For a device the host does it, and waits.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error.
/// Source: Hestenes 1958; the order of pairs Brent and Luk 1985.
template <class B, floating T>
void svd(context<B>& ctx, input<T, B> w, matrix_view<T, B> u, output<T, B> s, output<T, B> v) {
  const index rank = std::min(w.rows, w.cols);
  check_shape("ops::svd", "u", u, rank, w.rows, "singular values, rows of w");
  check_shape("ops::svd", "s", s, 1, rank, "singular values");
  check_shape("ops::svd", "v", v, rank, w.cols, "singular values, columns of w");
  svd_impl<B>::run(ctx, w, u, s, v);
}

}  // namespace talpa::ops
