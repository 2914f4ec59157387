// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/reduce.hpp>

namespace talpa::ops {

template <>
struct reduce_impl<cpu> {
  template <class T>
  static void column_sum(context<cpu>& ctx, matrix_view<const T, cpu> x, T beta,
                         matrix_view<T, cpu> y) {
    detail::sum_columns(ctx, x.rows, x.cols, beta, y.data,
                        [&](index n, index d) { return x(n, d); });
  }

  template <class T>
  static void sum_of_squares(context<cpu>& ctx, matrix_view<const T, cpu> x, T beta,
                             matrix_view<T, cpu> y) {
    const T sum = detail::sum_over_rows<T>(ctx, x.rows, x.cols, [&](index n) {
      const T* const xn = x.row(n);
      return detail::lane_sum<T>(x.cols, [&](index d) { return xn[d] * xn[d]; });
    });
    y(0, 0) = beta == T{0} ? sum : beta * y(0, 0) + sum;
  }
};

}  // namespace talpa::ops
