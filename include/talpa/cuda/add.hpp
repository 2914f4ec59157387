// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/add.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct add_impl<B> {
  template <class T>
  static void add(context<B>& ctx, matrix_view<const T, B> a, matrix_view<const T, B> b,
                  matrix_view<T, B> c) {
    kernels::for_each_element(ctx, c.rows, c.cols,
                              [=] TALPA_DEVICE(index n, index d) { c(n, d) = a(n, d) + b(n, d); });
  }

  template <class T>
  static void axpy(context<B>& ctx, T alpha, matrix_view<const T, B> x, matrix_view<T, B> y) {
    kernels::for_each_element(ctx, y.rows, y.cols,
                              [=] TALPA_DEVICE(index n, index d) { y(n, d) += alpha * x(n, d); });
  }
};

}  // namespace talpa::ops
