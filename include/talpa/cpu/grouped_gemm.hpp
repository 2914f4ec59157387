// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/indexed_gemm.hpp>  // an expert may have both
#include <talpa/ops/grouped_gemm.hpp>

#include <algorithm>

namespace talpa::ops {

/// Products of groups for which register tiles pay go through them one after the other, each by all
/// threads; the rest and gradients, where tiles were no faster, by Eigen in one loop. The sizes of
/// the groups alone decide, so the number of threads changes no bit. Scratch is what the largest
/// possible group takes, whichever are large today.
template <>
struct grouped_gemm_impl<cpu> {
  /// Fewest slots of a group for register tiles: with half as many they were no faster than Eigen,
  /// as each group packs a block of the bank for itself.
  static constexpr index tiled_slots = 256;
  /// Columns of one task of a gradient.
  static constexpr index task_cols = 512;

  /// A task of the rest is a group's block of rows.
  template <class T>
  static void product(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                      matrix_view<const T, cpu> a, matrix_view<const T, cpu> bank, index rows,
                      transpose tb, matrix_view<T, cpu> c, grad_mode c_mode) {
    const T kept = c_mode == grad_mode::accumulate ? T{1} : T{0};
    const index groups = offsets.size - 1;
    const auto tiled = [&](index count) {
      return count >= tiled_slots && detail::tiles_pay(count, c.cols, a.cols);
    };
    if (tiled(a.rows)) ctx.scratch.reserve(detail::tiled_bytes<T>(ctx.threads, c.cols, a.cols));
    index longest = 1;
    for (index e = 0; e < groups; ++e) {
      const index first = offsets[e], count = offsets[e + 1] - first;
      if (tiled(count)) {
        detail::tiled_product<T>(ctx, T{1}, a.row_range(first, count), transpose::no,
                                 bank.row_range(e * rows, rows), tb, kept,
                                 c.row_range(first, count));
      } else {
        longest = std::max(longest, count);
      }
    }
    const index blocks = ceil_div(longest, detail::gemm_task_rows);
    detail::parallel_for(ctx, groups * blocks, [&](index task, int) {
      const index e = task / blocks, all = offsets[e + 1] - offsets[e];
      const index skipped = task % blocks * detail::gemm_task_rows;
      const index first = offsets[e] + skipped;
      const index count = std::min(detail::gemm_task_rows, all - skipped);
      if (count <= 0 || tiled(all)) return;
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
      detail::parallel_for(ctx, groups * blocks, [&](index task, int) {
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
};

}  // namespace talpa::ops
