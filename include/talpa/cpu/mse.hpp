// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/mse.hpp>

namespace talpa::ops {

template <>
struct mse_impl<cpu> {
  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> y,
                      matrix_view<const T, cpu> target, matrix_view<T, cpu> value) {
    const T sum = detail::sum_over_rows<T>(ctx, y.rows, y.cols, [&](index n) {
      const T *const yn = y.row(n), *const tn = target.row(n);
      return detail::lane_sum<T>(y.cols, [&](index d) {
        const T difference = yn[d] - tn[d];
        return difference * difference;
      });
    });
    value(0, 0) = y.empty() ? T{0} : sum / static_cast<T>(y.size());
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> y,
                       matrix_view<const T, cpu> target, matrix_view<const T, cpu> dvalue,
                       matrix_view<T, cpu> dy, grad_mode dy_mode) {
    if (y.empty()) return;
    const T weight = dvalue(0, 0) * T{2} / static_cast<T>(y.size());
    detail::with_grad_mode(dy_mode, [&](auto put) {
      detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
        const T *const yn = y.row(n), *const tn = target.row(n);
        T* const dyn = dy.row(n);
        for (index d = 0; d < y.cols; ++d) put(dyn[d], weight * (yn[d] - tn[d]));
      });
    });
  }
};

}  // namespace talpa::ops
