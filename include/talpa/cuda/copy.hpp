// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/copy.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct copy_impl<B> {
  template <class T>
  static void run(context<B>& ctx, matrix_view<const T, B> x, matrix_view<T, B> y) {
    if (x.data == y.data) return;
    kernels::for_each_element(ctx, y.rows, y.cols,
                              [=] TALPA_DEVICE(index n, index d) { y(n, d) = x(n, d); });
  }
};

}  // namespace talpa::ops
