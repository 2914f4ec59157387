// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/kl_divergence.hpp>

namespace talpa::ops {

template <>
struct kl_divergence_impl<cpu> {
  template <class T>
  static T clipped(T v, T clip) {
    return v < clip ? clip : (v > T{1} - clip ? T{1} - clip : v);
  }

  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> p, matrix_view<const T, cpu> q,
                      T clip, matrix_view<T, cpu> value) {
    const T sum = detail::sum_over_rows<T>(ctx, p.rows, p.cols, [&](index n) {
      const T *const pn = p.row(n), *const qn = q.row(n);
      return detail::lane_sum<T>(p.cols, [&](index c) {
        const T a = clipped(pn[c], clip), b = clipped(qn[c], clip);
        return a * (math::log(a) - math::log(b));
      });
    });
    value(0, 0) = p.rows == 0 ? T{0} : sum / static_cast<T>(p.rows);
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> p, matrix_view<const T, cpu> q,
                       T clip, matrix_view<const T, cpu> dvalue, matrix_view<T, cpu> dp,
                       grad_mode dp_mode) {
    if (p.empty()) return;
    const T weight = dvalue(0, 0) / static_cast<T>(p.rows);
    detail::with_grad_mode(dp_mode, [&](auto put) {
      detail::for_each_row(ctx, p.rows, p.cols, [&](index n) {
        const T *const pn = p.row(n), *const qn = q.row(n);
        T* const dpn = dp.row(n);
        for (index c = 0; c < p.cols; ++c) {
          const T a = pn[c];
          const bool outside = a < clip || a > T{1} - clip;
          const T slope = math::log(a) - math::log(clipped(qn[c], clip)) + T{1};
          put(dpn[c], outside ? T{0} : weight * slope);
        }
      });
    });
  }
};

}  // namespace talpa::ops
