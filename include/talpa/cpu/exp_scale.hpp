// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/exp_scale.hpp>

namespace talpa::ops {

template <>
struct exp_scale_impl<cpu> {
  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> s, matrix_view<const T, cpu> x,
                      matrix_view<T, cpu> y) {
    const T factor = math::exp(s(0, 0));
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      for (index d = 0; d < y.cols; ++d) y(n, d) = factor * x(n, d);
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> s, matrix_view<const T, cpu> x,
                       matrix_view<const T, cpu> dy, matrix_view<T, cpu> dx, grad_mode dx_mode,
                       matrix_view<T, cpu> ds) {
    const T factor = math::exp(s(0, 0));
    if (!ds.empty()) {
      const T sum = detail::sum_over_rows<T>(ctx, x.rows, x.cols, [&](index n) {
        return detail::lane_sum<T>(x.cols, [&](index d) { return x(n, d) * dy(n, d); });
      });
      ds(0, 0) += factor * sum;
    }
    detail::with_grad_mode(dx_mode, [&](auto put) {
      detail::for_each_row(ctx, dx.rows, dx.cols, [&](index n) {
        for (index d = 0; d < dx.cols; ++d) put(dx(n, d), factor * dy(n, d));
      });
    });
  }
};

}  // namespace talpa::ops
