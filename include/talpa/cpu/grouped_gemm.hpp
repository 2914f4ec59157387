// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/indexed_gemm.hpp>  // an expert may have both
#include <talpa/ops/grouped_gemm.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct grouped_gemm_impl<cpu> {
  /// Columns of one task of a gradient.
  static constexpr index task_cols = 512;

  /// One task is a group's block of rows: which rows belong together depends on the offsets only.
  template <class T>
  static void product(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                      matrix_view<const T, cpu> a, matrix_view<const T, cpu> bank, index rows,
                      transpose tb, matrix_view<T, cpu> c, grad_mode c_mode) {
    const T kept = c_mode == grad_mode::accumulate ? T{1} : T{0};
    const index groups = offsets.size - 1;
    const index blocks = ceil_div(std::max<index>(longest(offsets), 1), detail::gemm_task_rows);
    detail::parallel_for(ctx.threads, groups * blocks, [&](index task, int) {
      const index e = task / blocks;
      const index first = offsets[e] + task % blocks * detail::gemm_task_rows;
      const index count = std::min(detail::gemm_task_rows, offsets[e + 1] - first);
      if (count <= 0) return;
      detail::eigen_product<T>(T{1}, a.row_range(first, count), transpose::no,
                               bank.row_range(e * rows, rows), tb, kept, c.row_range(first, count));
    });
  }

  template <class T>
  static void gradient(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                       matrix_view<const T, cpu> a, matrix_view<const T, cpu> b,
                       std::span<const row_run> runs, matrix_view<T, cpu> dbank) {
    const index blocks = ceil_div(std::max<index>(b.cols, 1), task_cols);
    for (const row_run& run : runs) {
      const index groups = run.rows / a.cols;
      detail::parallel_for(ctx.threads, groups * blocks, [&](index task, int) {
        const index e = run.first / a.cols + task / blocks;
        const index col = task % blocks * task_cols;
        const index count = offsets[e + 1] - offsets[e];
        if (count == 0) return;
        const index cols = std::min(task_cols, b.cols - col);
        detail::eigen_product<T>(
            T{1}, a.row_range(offsets[e], count), transpose::yes,
            b.row_range(offsets[e], count).col_range(col, cols), transpose::no, T{1},
            dbank.row_range(run.grad_first + task / blocks * a.cols, a.cols).col_range(col, cols));
      });
    }
  }

 private:
  static index longest(vector_view<const index, cpu> offsets) {
    index most = 0;
    for (index e = 0; e + 1 < offsets.size; ++e) {
      most = std::max(most, offsets[e + 1] - offsets[e]);
    }
    return most;
  }
};

}  // namespace talpa::ops
