// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/softmax.hpp>

namespace talpa::kernels {

/// Each lane reads, writes and reads again its own elements only, so y may be x.
template <class T, class B>
struct softmax_row {
  matrix_view<const T, B> x;
  matrix_view<T, B> y;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const T* const xn = x.row(n);
    T* const yn = y.row(n);
    const T top = warp.template max<T>(y.cols, [&](index d) { return xn[d]; });
    const T sum =
        warp.template sum<T>(y.cols, [&](index d) { return yn[d] = math::exp(xn[d] - top); });
    warp.for_each(y.cols, [&](index d) { yn[d] /= sum; });
  }
};

template <class T, class B, class Put>
struct softmax_gradient_row {
  matrix_view<const T, B> y, dy;
  matrix_view<T, B> dx;
  Put put;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const T *const yn = y.row(n), *const dyn = dy.row(n);
    T* const dxn = dx.row(n);
    const T mean = warp.template sum<T>(dx.cols, [&](index d) { return yn[d] * dyn[d]; });
    warp.for_each(dx.cols, [&](index d) { put(dxn[d], yn[d] * (dyn[d] - mean)); });
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct softmax_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> x, matrix_view<T, B> y) {
    kernels::for_each_row(ctx, y.rows, kernels::softmax_row<T, B>{x, y});
  }

  template <class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> y, matrix_view<const T, B> dy,
                       matrix_view<T, B> dx, grad_mode dx_mode) {
    kernels::with_put(dx_mode, [&](auto put) {
      kernels::for_each_row(ctx, dx.rows,
                            kernels::softmax_gradient_row<T, B, decltype(put)>{y, dy, dx, put});
    });
  }
};

}  // namespace talpa::ops
