// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/fill.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct fill_impl<B> {
  template <class T>
  static void run(context<B>& ctx, T value, matrix_view<T, B> y) {
    kernels::for_each_element(ctx, y.rows, y.cols,
                              [=] TALPA_DEVICE(index n, index d) { y(n, d) = value; });
  }
};

}  // namespace talpa::ops
