// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/reduce.hpp>

namespace talpa::kernels {

/// The sum of squares of row n.
template <class T, class B>
struct row_squares {
  matrix_view<const T, B> x;
  template <class Warp>
  TALPA_HD T operator()(const Warp& warp, index n) const {
    const T* const xn = x.row(n);
    return warp.template sum<T>(x.cols, [&](index d) { return xn[d] * xn[d]; });
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct reduce_impl<B> {
  template <class T>
  static void column_sum(context<B>& ctx, matrix_view<const T, B> x, T beta, matrix_view<T, B> y) {
    kernels::sum_columns(ctx, x.rows, x.cols, beta, y.data,
                         [=] TALPA_DEVICE(index n, index d) { return x(n, d); });
  }

  template <class T>
  static void sum_of_squares(context<B>& ctx, matrix_view<const T, B> x, T beta,
                             matrix_view<T, B> y) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto sums = ctx.scratch.template take<T>(x.rows);  // [rows]
    kernels::for_each_row(ctx, x.rows,
                          kernels::row_values<T, kernels::row_squares<T, B>>{{x}, sums.data});
    kernels::sum_columns(ctx, x.rows, 1, beta, y.data, kernels::value_of_row<T>{sums.data});
  }
};

}  // namespace talpa::ops
