// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/activation.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct activation_impl<B> {
  template <class F, class T>
  static void forward(context<B>& ctx, const F& f, matrix_view<const T, B> x, matrix_view<T, B> y) {
    const F function = f;
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index n, index d) {
      y(n, d) = function.value(x(n, d));
    });
  }

  template <class F, class T>
  static void backward(context<B>& ctx, const F& f, matrix_view<const T, B> x,
                       matrix_view<const T, B> dy, matrix_view<T, B> dx, grad_mode dx_mode) {
    if (dx_mode == grad_mode::ignore) return;
    const bool adds = dx_mode == grad_mode::accumulate;
    const F function = f;
    kernels::for_each_element(ctx, dx.rows, dx.cols, [=] TALPA_DEVICE(index n, index d) {
      const T slope = dy(n, d) * function.derivative(x(n, d));
      dx(n, d) = adds ? dx(n, d) + slope : slope;
    });
  }
};

}  // namespace talpa::ops
