// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/rank_gate.hpp>

namespace talpa::ops {

template <>
struct rank_gate_impl<cpu> {
  static constexpr index task_rows = 128;

  template <class T>
  static void forward(context<cpu>& ctx, T scale, matrix_view<const T, cpu> gates,
                      matrix_view<const T, cpu> u, matrix_view<T, cpu> z) {
    const index ranks = u.cols / gates.cols;
    detail::parallel_for_blocks(ctx, u.rows, task_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        for (index e = 0; e < gates.cols; ++e) {
          const T factor = scale * gates(n, e);
          const T* const from = u.row(n) + e * ranks;
          T* const to = z.row(n) + e * ranks;
          for (index r = 0; r < ranks; ++r) to[r] = factor * from[r];
        }
      }
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, T scale, matrix_view<const T, cpu> gates,
                       matrix_view<const T, cpu> u, matrix_view<const T, cpu> dz,
                       matrix_view<T, cpu> du, matrix_view<T, cpu> dgates) {
    const index ranks = u.cols / gates.cols;
    detail::parallel_for_blocks(ctx, u.rows, task_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        for (index e = 0; e < gates.cols; ++e) {
          const T factor = scale * gates(n, e);
          const T* const values = u.row(n) + e * ranks;
          const T* const from = dz.row(n) + e * ranks;
          T* const to = du.row(n) + e * ranks;
          T sum{};
          for (index r = 0; r < ranks; ++r) {
            sum += from[r] * values[r];
            to[r] = factor * from[r];
          }
          dgates(n, e) = scale * sum;
        }
      }
    });
  }
};

}  // namespace talpa::ops
