// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/copy.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct copy_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> x, matrix_view<T, cpu> y) {
    if (x.data == y.data) return;
    detail::for_each_row(ctx, y.rows, y.cols,
                         [&](index n) { std::copy_n(x.row(n), y.cols, y.row(n)); });
  }
};

}  // namespace talpa::ops
