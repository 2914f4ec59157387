// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/block_scale.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct block_scale_impl<B> {
  template <class T>
  static void forward(context<B>& ctx, matrix_view<const T, B> f, matrix_view<const T, B> x,
                      matrix_view<T, B> y) {
    if (x.empty()) return;
    const index rows = x.rows / f.rows;
    kernels::for_each_element(ctx, x.rows, x.cols, [=] TALPA_DEVICE(index i, index o) {
      y(i, o) = f(i / rows, o) * x(i, o);
    });
  }

  /// One thread a factor, which sums over the rows of its block in order; dx may be dy.
  template <class T>
  static void backward(context<B>& ctx, matrix_view<const T, B> f, matrix_view<const T, B> x,
                       matrix_view<const T, B> dy, matrix_view<T, B> dx, matrix_view<T, B> df) {
    if (x.empty()) return;
    const index rows = x.rows / f.rows;
    kernels::for_each_element(ctx, f.rows, x.cols, [=] TALPA_DEVICE(index e, index o) {
      const T factor = f(e, o);
      T sum = df(e, o);
      for (index i = e * rows; i < (e + 1) * rows; ++i) {
        const T up = dy(i, o);
        sum += up * x(i, o);
        dx(i, o) = factor * up;
      }
      df(e, o) = sum;
    });
  }
};

}  // namespace talpa::ops
