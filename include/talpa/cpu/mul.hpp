// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/mul.hpp>

namespace talpa::ops {

template <>
struct mul_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> a, matrix_view<const T, cpu> b,
                  matrix_view<T, cpu> c, grad_mode c_mode) {
    detail::with_grad_mode(c_mode, [&](auto put) {
      detail::for_each_row(ctx, c.rows, c.cols, [&](index n) {
        const T *const an = a.row(n), *const bn = b.row(n);
        T* const cn = c.row(n);
        for (index d = 0; d < c.cols; ++d) put(cn[d], an[d] * bn[d]);
      });
    });
  }
};

}  // namespace talpa::ops
