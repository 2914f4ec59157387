// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/mse.hpp>

namespace talpa::kernels {

/// The sum of squared differences of row n.
template <class T, class B>
struct squared_error_row {
  matrix_view<const T, B> y, target;
  template <class Warp>
  TALPA_HD T operator()(const Warp& warp, index n) const {
    const T *const yn = y.row(n), *const tn = target.row(n);
    return warp.template sum<T>(y.cols, [&](index d) {
      const T difference = yn[d] - tn[d];
      return difference * difference;
    });
  }
};

template <class T, class B, class Put>
struct squared_error_gradient {
  matrix_view<const T, B> y, target, dvalue;
  matrix_view<T, B> dy;
  Put put;
  TALPA_HD void operator()(index n, index d) const {
    const T weight = dvalue(0, 0) * T{2} / static_cast<T>(y.rows * y.cols);
    put(dy(n, d), weight * (y(n, d) - target(n, d)));
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct mse_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> y, matrix_view<const T, B> target,
                      matrix_view<T, B> value) {
    const index size = y.rows * y.cols;
    kernels::sum_rows(ctx, y.rows, value.data, kernels::squared_error_row<T, B>{y, target});
    kernels::for_each_element(ctx, 1, 1, [=] TALPA_DEVICE(index, index) {
      value(0, 0) = size == 0 ? T{0} : value(0, 0) / static_cast<T>(size);
    });
  }

  template <class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> y, matrix_view<const T, B> target,
                       matrix_view<const T, B> dvalue, matrix_view<T, B> dy, grad_mode dy_mode) {
    kernels::with_put(dy_mode, [&](auto put) {
      kernels::for_each_element(
          ctx, y.rows, y.cols,
          kernels::squared_error_gradient<T, B, decltype(put)>{y, target, dvalue, dy, put});
    });
  }
};

}  // namespace talpa::ops
