// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/kl_divergence.hpp>

namespace talpa::kernels {

/// v in [clip, 1 - clip]; NaN stays.
template <class T>
TALPA_HD inline T clipped_probability(T v, T clip) {
  return v < clip ? clip : (v > T{1} - clip ? T{1} - clip : v);
}

/// The divergence of row n.
template <class T, class B>
struct kl_divergence_row {
  matrix_view<const T, B> p, q;
  T clip;
  template <class Warp>
  TALPA_HD T operator()(const Warp& warp, index n) const {
    const T *const pn = p.row(n), *const qn = q.row(n);
    return warp.template sum<T>(p.cols, [&](index c) {
      const T a = clipped_probability(pn[c], clip), b = clipped_probability(qn[c], clip);
      return a * (math::log(a) - math::log(b));
    });
  }
};

template <class T, class B, class Put>
struct kl_divergence_gradient {
  matrix_view<const T, B> p, q;
  T clip;
  matrix_view<const T, B> dvalue;
  matrix_view<T, B> dp;
  Put put;
  TALPA_HD void operator()(index n, index c) const {
    const T weight = dvalue(0, 0) / static_cast<T>(p.rows);
    const T a = p(n, c);
    const bool outside = a < clip || a > T{1} - clip;
    const T slope = math::log(a) - math::log(clipped_probability(q(n, c), clip)) + T{1};
    put(dp(n, c), outside ? T{0} : weight * slope);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct kl_divergence_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> p, matrix_view<const T, B> q, T clip,
                      matrix_view<T, B> value) {
    const index rows = p.rows;
    kernels::sum_rows(ctx, rows, value.data, kernels::kl_divergence_row<T, B>{p, q, clip});
    kernels::for_each_element(ctx, 1, 1, [=] TALPA_DEVICE(index, index) {
      value(0, 0) = rows == 0 ? T{0} : value(0, 0) / static_cast<T>(rows);
    });
  }

  template <class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> p, matrix_view<const T, B> q,
                       T clip, matrix_view<const T, B> dvalue, matrix_view<T, B> dp,
                       grad_mode dp_mode) {
    kernels::with_put(dp_mode, [&](auto put) {
      kernels::for_each_element(
          ctx, p.rows, p.cols,
          kernels::kl_divergence_gradient<T, B, decltype(put)>{p, q, clip, dvalue, dp, put});
    });
  }
};

}  // namespace talpa::ops
