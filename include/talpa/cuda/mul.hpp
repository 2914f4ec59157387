// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/mul.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct mul_impl<B> {
  template <class T>
  static void run(context<B>& ctx, matrix_view<const T, B> a, matrix_view<const T, B> b,
                  matrix_view<T, B> c, grad_mode c_mode) {
    if (c_mode == grad_mode::ignore) return;
    const bool adds = c_mode == grad_mode::accumulate;
    kernels::for_each_element(ctx, c.rows, c.cols, [=] TALPA_DEVICE(index n, index d) {
      const T product = a(n, d) * b(n, d);
      c(n, d) = adds ? c(n, d) + product : product;
    });
  }
};

}  // namespace talpa::ops
