// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/activation.hpp>

namespace talpa::ops {

template <>
struct activation_impl<cpu> {
  template <class F, class T>
  static void forward(context<cpu>& ctx, const F& f, matrix_view<const T, cpu> x,
                      matrix_view<T, cpu> y) {
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      const T* const xn = x.row(n);
      T* const yn = y.row(n);
      for (index d = 0; d < y.cols; ++d) yn[d] = f.value(xn[d]);
    });
  }

  template <class F, class T>
  static void backward(context<cpu>& ctx, const F& f, matrix_view<const T, cpu> x,
                       matrix_view<const T, cpu> dy, matrix_view<T, cpu> dx, grad_mode dx_mode) {
    detail::with_grad_mode(dx_mode, [&](auto put) {
      detail::for_each_row(ctx, dx.rows, dx.cols, [&](index n) {
        const T *const xn = x.row(n), *const dyn = dy.row(n);
        T* const dxn = dx.row(n);
        for (index d = 0; d < dx.cols; ++d) put(dxn[d], dyn[d] * f.derivative(xn[d]));
      });
    });
  }
};

}  // namespace talpa::ops
