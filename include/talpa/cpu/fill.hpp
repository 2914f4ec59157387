// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/fill.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct fill_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, T value, matrix_view<T, cpu> y) {
    detail::for_each_row(ctx, y.rows, y.cols,
                         [&](index n) { std::fill_n(y.row(n), y.cols, value); });
  }
};

}  // namespace talpa::ops
