// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/expert_errors.hpp>

namespace talpa::ops {

template <>
struct expert_errors_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> outputs,
                  matrix_view<const T, cpu> target, T share, matrix_view<T, cpu> errors) {
    const index tokens = target.rows, width = target.cols, experts = errors.cols;
    detail::for_each_row(ctx, tokens, experts * (width + 1), [&](index n) {
      const T* const wanted = target.row(n);
      for (index e = 0; e < experts; ++e) {
        const T* const found = outputs.row(e * tokens + n);
        const T sum = detail::lane_sum<T>(width, [&](index d) {
          const T difference = found[d] - share * wanted[d];
          return difference * difference;
        });
        errors(n, e) = width == 0 ? T{0} : sum / static_cast<T>(width);
      }
    });
  }
};

}  // namespace talpa::ops
