// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/gated_activation.hpp>

namespace talpa::ops {

template <>
struct gated_activation_impl<cpu> {
  template <class F, class T>
  static void forward(context<cpu>& ctx, const F& f, matrix_view<const T, cpu> a,
                      matrix_view<const T, cpu> b, matrix_view<T, cpu> h) {
    detail::for_each_row(ctx, h.rows, h.cols, [&](index n) {
      const T *const an = a.row(n), *const bn = b.row(n);
      T* const hn = h.row(n);
      for (index d = 0; d < h.cols; ++d) hn[d] = f.value(an[d]) * bn[d];
    });
  }

  template <class F, class T>
  static void backward(context<cpu>& ctx, const F& f, matrix_view<const T, cpu> a,
                       matrix_view<const T, cpu> b, matrix_view<const T, cpu> dh,
                       matrix_view<T, cpu> da, matrix_view<T, cpu> db) {
    detail::for_each_row(ctx, a.rows, a.cols, [&](index n) {
      const T *const an = a.row(n), *const bn = b.row(n), *const dhn = dh.row(n);
      T *const dan = da.row(n), *const dbn = db.row(n);
      for (index d = 0; d < a.cols; ++d) {
        const T up = dhn[d], by_gate = up * bn[d] * f.derivative(an[d]);
        dbn[d] = up * f.value(an[d]);
        dan[d] = by_gate;
      }
    });
  }
};

}  // namespace talpa::ops
