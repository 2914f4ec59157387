// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/softmax.hpp>

namespace talpa::ops {

template <>
struct softmax_impl<cpu> {
  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> x, matrix_view<T, cpu> y) {
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      const T* const xn = x.row(n);
      T* const yn = y.row(n);
      const T top = detail::lane_max(xn, y.cols);
      for (index d = 0; d < y.cols; ++d) yn[d] = math::exp(xn[d] - top);
      const T sum = detail::lane_sum<T>(y.cols, [&](index d) { return yn[d]; });
      for (index d = 0; d < y.cols; ++d) yn[d] /= sum;
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> y, matrix_view<const T, cpu> dy,
                       matrix_view<T, cpu> dx, grad_mode dx_mode) {
    detail::with_grad_mode(dx_mode, [&](auto put) {
      detail::for_each_row(ctx, dx.rows, dx.cols, [&](index n) {
        const T *const yn = y.row(n), *const dyn = dy.row(n);
        T* const dxn = dx.row(n);
        const T mean = detail::lane_sum<T>(dx.cols, [&](index d) { return yn[d] * dyn[d]; });
        for (index d = 0; d < dx.cols; ++d) put(dxn[d], yn[d] * (dyn[d] - mean));
      });
    });
  }
};

}  // namespace talpa::ops
