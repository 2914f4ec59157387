// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/block_scale.hpp>

namespace talpa::ops {

template <>
struct block_scale_impl<cpu> {
  template <class T>
  static void forward(context<cpu>& ctx, matrix_view<const T, cpu> f, matrix_view<const T, cpu> x,
                      matrix_view<T, cpu> y) {
    const index rows = x.rows / f.rows;
    detail::for_each_row(ctx, x.rows, x.cols, [&](index i) {
      const T *const factor = f.row(i / rows), *const from = x.row(i);
      T* const to = y.row(i);
      for (index o = 0; o < x.cols; ++o) to[o] = factor[o] * from[o];
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const T, cpu> f, matrix_view<const T, cpu> x,
                       matrix_view<const T, cpu> dy, matrix_view<T, cpu> dx,
                       matrix_view<T, cpu> df) {
    const index rows = x.rows / f.rows;
    detail::for_each_row(ctx, f.rows, rows * x.cols, [&](index e) {
      const T* const factor = f.row(e);
      T* const sum = df.row(e);
      for (index i = e * rows; i < (e + 1) * rows; ++i) {
        const T *const value = x.row(i), *const from = dy.row(i);
        T* const to = dx.row(i);
        for (index o = 0; o < x.cols; ++o) {
          sum[o] += from[o] * value[o];
          to[o] = factor[o] * from[o];
        }
      }
    });
  }
};

}  // namespace talpa::ops
