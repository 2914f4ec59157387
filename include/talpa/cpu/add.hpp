// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/add.hpp>

namespace talpa::ops {

template <>
struct add_impl<cpu> {
  template <class T>
  static void add(context<cpu>& ctx, matrix_view<const T, cpu> a, matrix_view<const T, cpu> b,
                  matrix_view<T, cpu> c) {
    detail::for_each_row(ctx, c.rows, c.cols, [&](index n) {
      const T *const an = a.row(n), *const bn = b.row(n);
      T* const cn = c.row(n);
      for (index d = 0; d < c.cols; ++d) cn[d] = an[d] + bn[d];
    });
  }

  template <class T>
  static void axpy(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> x, matrix_view<T, cpu> y) {
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      const T* const xn = x.row(n);
      T* const yn = y.row(n);
      for (index d = 0; d < y.cols; ++d) yn[d] += alpha * xn[d];
    });
  }
};

}  // namespace talpa::ops
