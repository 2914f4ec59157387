// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/layer_norm.hpp>

namespace talpa::ops {

template <>
struct layer_norm_impl<cpu> {
  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> x,
                      matrix_view<const T, cpu> gamma, matrix_view<const T, cpu> beta, T epsilon,
                      const layer_norm_saved<T, cpu>& saved, matrix_view<T, cpu> y) {
    const index width = x.cols;
    detail::for_each_row(ctx, x.rows, width, [&](index n) {
      const T* const xn = x.row(n);
      T* const yn = y.row(n);
      const T mean =
          detail::lane_sum<T>(width, [&](index d) { return xn[d]; }) / static_cast<T>(width);
      const T variance = detail::lane_sum<T>(width,
                                             [&](index d) {
                                               const T distance = xn[d] - mean;
                                               return distance * distance;
                                             }) /
                         static_cast<T>(width);
      const T rstd = T{1} / math::sqrt(variance + epsilon);
      saved.mean[n] = mean;
      saved.rstd[n] = rstd;
      for (index d = 0; d < width; ++d) {
        yn[d] = gamma.data[d] * ((xn[d] - mean) * rstd) + beta.data[d];
      }
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, const layer_norm_saved<T, cpu>& saved,
                       matrix_view<const T, cpu> x, matrix_view<const T, cpu> gamma,
                       matrix_view<const T, cpu> dy, matrix_view<T, cpu> dx, grad_mode dx_mode,
                       matrix_view<T, cpu> dgamma, grad_mode dgamma_mode, matrix_view<T, cpu> dbeta,
                       grad_mode dbeta_mode) {
    const index width = x.cols;
    if (dgamma_mode != grad_mode::ignore) {
      const T kept = dgamma_mode == grad_mode::accumulate ? T{1} : T{0};
      detail::sum_columns(ctx, x.rows, width, kept, dgamma.data, [&](index n, index d) {
        return dy(n, d) * ((x(n, d) - saved.mean[n]) * saved.rstd[n]);
      });
    }
    if (dbeta_mode != grad_mode::ignore) {
      const T kept = dbeta_mode == grad_mode::accumulate ? T{1} : T{0};
      detail::sum_columns(ctx, x.rows, width, kept, dbeta.data,
                          [&](index n, index d) { return dy(n, d); });
    }
    detail::with_grad_mode(dx_mode, [&](auto put) {
      detail::for_each_row(ctx, x.rows, width, [&](index n) {
        const T *const xn = x.row(n), *const dyn = dy.row(n);
        T* const dxn = dx.row(n);
        const T mean = saved.mean[n], rstd = saved.rstd[n];
        const T mean_g =
            detail::lane_sum<T>(width, [&](index d) { return dyn[d] * gamma.data[d]; }) /
            static_cast<T>(width);
        const T mean_gx =
            detail::lane_sum<T>(
                width, [&](index d) { return dyn[d] * gamma.data[d] * ((xn[d] - mean) * rstd); }) /
            static_cast<T>(width);
        for (index d = 0; d < width; ++d) {
          const T xhat = (xn[d] - mean) * rstd;
          put(dxn[d], rstd * (dyn[d] * gamma.data[d] - mean_g - xhat * mean_gx));
        }
      });
    });
  }
};

}  // namespace talpa::ops
