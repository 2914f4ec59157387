// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/unit_rows.hpp>

namespace talpa::kernels {

/// Each lane reads and writes its own elements only, so y may be x.
template <class T, class B>
struct unit_row {
  matrix_view<const T, B> x;
  T epsilon;
  matrix_view<T, B> y, inverse;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const T* const xn = x.row(n);
    T* const yn = y.row(n);
    const T length =
        math::sqrt(warp.template sum<T>(x.cols, [&](index d) { return xn[d] * xn[d]; }));
    // Written so that a NaN is kept.
    const T r = T{1} / (length < epsilon ? epsilon : length);
    warp.for_each(x.cols, [&](index d) { yn[d] = xn[d] * r; });
    if (warp.lane() == 0) inverse(n, 0) = r;
  }
};

/// As above, so dx may be dy or y.
template <class T, class B, class Put>
struct unit_row_gradient {
  matrix_view<const T, B> y, inverse;
  T epsilon;
  matrix_view<const T, B> dy;
  matrix_view<T, B> dx;
  Put put;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const T *const yn = y.row(n), *const dyn = dy.row(n);
    T* const dxn = dx.row(n);
    const T r = inverse(n, 0);
    const T product = warp.template sum<T>(dx.cols, [&](index d) { return yn[d] * dyn[d]; });
    // The row was no longer than epsilon: divided as it was then.
    const T along = r == T{1} / epsilon ? T{0} : product;
    warp.for_each(dx.cols, [&](index d) { put(dxn[d], r * (dyn[d] - yn[d] * along)); });
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct unit_rows_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> x, T epsilon, matrix_view<T, B> y,
                      matrix_view<T, B> inverse) {
    kernels::for_each_row(ctx, x.rows, kernels::unit_row<T, B>{x, epsilon, y, inverse});
  }

  template <class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> y, matrix_view<const T, B> inverse,
                       T epsilon, matrix_view<const T, B> dy, matrix_view<T, B> dx,
                       grad_mode dx_mode) {
    kernels::with_put(dx_mode, [&](auto put) {
      kernels::for_each_row(
          ctx, dx.rows,
          kernels::unit_row_gradient<T, B, decltype(put)>{y, inverse, epsilon, dy, dx, put});
    });
  }
};

}  // namespace talpa::ops
