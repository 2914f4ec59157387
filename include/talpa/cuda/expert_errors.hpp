// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/expert_errors.hpp>

namespace talpa::kernels {

/// The error of one expert for one token: row e N + n of outputs.
template <class T, class B>
struct expert_error_row {
  matrix_view<const T, B> outputs, target;
  T share;
  matrix_view<T, B> errors;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index row) const {
    const index tokens = target.rows, width = target.cols, e = row / tokens, n = row % tokens;
    const T *const wanted = target.row(n), *const found = outputs.row(row);
    const T sum = warp.template sum<T>(width, [&](index d) {
      const T difference = found[d] - share * wanted[d];
      return difference * difference;
    });
    if (warp.lane() == 0) errors(n, e) = width == 0 ? T{0} : sum / static_cast<T>(width);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct expert_errors_impl<B> {
  template <class T>
  static void run(context<B>& ctx, matrix_view<const T, B> outputs, matrix_view<const T, B> target,
                  T share, matrix_view<T, B> errors) {
    kernels::for_each_row(ctx, outputs.rows,
                          kernels::expert_error_row<T, B>{outputs, target, share, errors});
  }
};

}  // namespace talpa::ops
