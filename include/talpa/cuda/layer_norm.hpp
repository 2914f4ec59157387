// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/layer_norm.hpp>

namespace talpa::kernels {

/// Each lane reads and writes its own elements only, so y may be x.
template <class T, class B>
struct layer_norm_row {
  matrix_view<const T, B> x, gamma, beta;
  T epsilon;
  layer_norm_saved<T, B> saved;
  matrix_view<T, B> y;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const index width = x.cols;
    const T* const xn = x.row(n);
    T* const yn = y.row(n);
    const T mean =
        warp.template sum<T>(width, [&](index d) { return xn[d]; }) / static_cast<T>(width);
    const T variance = warp.template sum<T>(width, [&](index d) {
      const T distance = xn[d] - mean;
      return distance * distance;
    }) / static_cast<T>(width);
    const T rstd = T{1} / math::sqrt(variance + epsilon);
    if (warp.lane() == 0) {
      saved.mean[n] = mean;
      saved.rstd[n] = rstd;
    }
    warp.for_each(width,
                  [&](index d) { yn[d] = gamma.data[d] * ((xn[d] - mean) * rstd) + beta.data[d]; });
  }
};

/// As above, so dx may be dy or x.
template <class T, class B, class Put>
struct layer_norm_gradient_row {
  layer_norm_saved<T, B> saved;
  matrix_view<const T, B> x, gamma, dy;
  matrix_view<T, B> dx;
  Put put;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const index width = x.cols;
    const T *const xn = x.row(n), *const dyn = dy.row(n);
    T* const dxn = dx.row(n);
    const T mean = saved.mean[n], rstd = saved.rstd[n];
    const T mean_g = warp.template sum<T>(width, [&](index d) { return dyn[d] * gamma.data[d]; }) /
                     static_cast<T>(width);
    const T mean_gx = warp.template sum<T>(width, [&](index d) {
      return dyn[d] * gamma.data[d] * ((xn[d] - mean) * rstd);
    }) / static_cast<T>(width);
    warp.for_each(width, [&](index d) {
      const T xhat = (xn[d] - mean) * rstd;
      put(dxn[d], rstd * (dyn[d] * gamma.data[d] - mean_g - xhat * mean_gx));
    });
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct layer_norm_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> x, matrix_view<const T, B> gamma,
                      matrix_view<const T, B> beta, T epsilon, const layer_norm_saved<T, B>& saved,
                      matrix_view<T, B> y) {
    kernels::for_each_row(ctx, x.rows,
                          kernels::layer_norm_row<T, B>{x, gamma, beta, epsilon, saved, y});
  }

  template <class T>
  static void backward(context<B>& ctx, const layer_norm_saved<T, B>& saved,
                       matrix_view<const T, B> x, matrix_view<const T, B> gamma,
                       matrix_view<const T, B> dy, matrix_view<T, B> dx, grad_mode dx_mode,
                       matrix_view<T, B> dgamma, grad_mode dgamma_mode, matrix_view<T, B> dbeta,
                       grad_mode dbeta_mode) {
    if (dgamma_mode != grad_mode::ignore) {
      const T kept = dgamma_mode == grad_mode::accumulate ? T{1} : T{0};
      const vector_view<T, B> mean = saved.mean, rstd = saved.rstd;
      kernels::sum_columns(ctx, x.rows, x.cols, kept, dgamma.data,
                           [=] TALPA_DEVICE(index n, index d) {
                             return dy(n, d) * ((x(n, d) - mean[n]) * rstd[n]);
                           });
    }
    if (dbeta_mode != grad_mode::ignore) {
      const T kept = dbeta_mode == grad_mode::accumulate ? T{1} : T{0};
      kernels::sum_columns(ctx, x.rows, x.cols, kept, dbeta.data,
                           [=] TALPA_DEVICE(index n, index d) { return dy(n, d); });
    }
    kernels::with_put(dx_mode, [&](auto put) {
      kernels::for_each_row(
          ctx, x.rows,
          kernels::layer_norm_gradient_row<T, B, decltype(put)>{saved, x, gamma, dy, dx, put});
    });
  }
};

}  // namespace talpa::ops
