// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/scale.hpp>

namespace talpa::ops {

template <>
struct scale_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> x, matrix_view<T, cpu> y) {
    detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
      const T* const xn = x.row(n);
      T* const yn = y.row(n);
      for (index d = 0; d < y.cols; ++d) yn[d] = alpha * xn[d];
    });
  }
};

}  // namespace talpa::ops
