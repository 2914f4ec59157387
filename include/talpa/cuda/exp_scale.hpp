// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/exp_scale.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct exp_scale_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> s, matrix_view<const T, B> x,
                      matrix_view<T, B> y) {
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index n, index d) {
      y(n, d) = math::exp(s(0, 0)) * x(n, d);
    });
  }

  template <class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> s, matrix_view<const T, B> x,
                       matrix_view<const T, B> dy, matrix_view<T, B> dx, grad_mode dx_mode,
                       matrix_view<T, B> ds) {
    if (!ds.empty()) {
      const typename workspace<B>::scope scope(ctx.scratch);
      const auto sum = ctx.scratch.template take<T>(1);  // [1]
      kernels::sum_rows<T>(ctx, x.rows, sum.data, kernels::row_product<T, B>{x, dy});
      kernels::for_each_element(
          ctx, 1, 1, [=] TALPA_DEVICE(index, index) { ds(0, 0) += math::exp(s(0, 0)) * sum[0]; });
    }
    if (dx_mode == grad_mode::ignore) return;
    const bool adds = dx_mode == grad_mode::accumulate;
    kernels::for_each_element(ctx, dx.rows, dx.cols, [=] TALPA_DEVICE(index n, index d) {
      const T slope = math::exp(s(0, 0)) * dy(n, d);
      dx(n, d) = adds ? dx(n, d) + slope : slope;
    });
  }
};

}  // namespace talpa::ops
