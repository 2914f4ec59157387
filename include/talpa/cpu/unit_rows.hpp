// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/unit_rows.hpp>

namespace talpa::ops {

template <>
struct unit_rows_impl<cpu> {
  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> x, T epsilon,
                      matrix_view<T, cpu> y, matrix_view<T, cpu> inverse) {
    if (x.cols == 0) {
      for (index n = 0; n < x.rows; ++n) inverse(n, 0) = T{1} / epsilon;
      return;
    }
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      const T* const xn = x.row(n);
      T* const yn = y.row(n);
      const T length =
          math::sqrt(detail::lane_sum<T>(y.cols, [&](index d) { return xn[d] * xn[d]; }));
      // Written so that a NaN is kept.
      const T r = T{1} / (length < epsilon ? epsilon : length);
      for (index d = 0; d < y.cols; ++d) yn[d] = xn[d] * r;
      inverse(n, 0) = r;
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> y,
                       matrix_view<const T, cpu> inverse, T epsilon, matrix_view<const T, cpu> dy,
                       matrix_view<T, cpu> dx, grad_mode dx_mode) {
    const T clamped = T{1} / epsilon;
    detail::with_grad_mode(dx_mode, [&](auto put) {
      detail::for_each_row(ctx, dx.rows, dx.cols, [&](index n) {
        const T *const yn = y.row(n), *const dyn = dy.row(n);
        T* const dxn = dx.row(n);
        const T r = inverse(n, 0);
        const T along = r == clamped
                            ? T{0}
                            : detail::lane_sum<T>(dx.cols, [&](index d) { return yn[d] * dyn[d]; });
        for (index d = 0; d < dx.cols; ++d) put(dxn[d], r * (dyn[d] - yn[d] * along));
      });
    });
  }
};

}  // namespace talpa::ops
