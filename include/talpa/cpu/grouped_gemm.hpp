// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/gemm.hpp>
#include <talpa/cpu/indexed_gemm.hpp>  // an expert may have both
#include <talpa/cpu/streamed_gradient.hpp>
#include <talpa/cpu/streamed_product.hpp>
#include <talpa/ops/grouped_gemm.hpp>

#include <algorithm>

namespace talpa::ops {

/// Blocks of a bank that are large go past the slots of their groups; groups of so many slots that
/// it pays are products by register tiles, one after the other, each by all threads; the rest is
/// Eigen's, in one loop. The shape and the sizes of the groups alone decide, so the number of
/// threads changes no bit. Scratch is what the largest possible group takes, whichever are large
/// today.
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
    const bool streams = detail::streaming_pays(rows, bank.cols);
    const auto tiled = [&](index count) {
      // What does not stream of a bank that does must be one of these.
      return streams ? count > detail::most_streamed(tb)
                     : count >= tiled_slots && detail::tiles_pay(count, c.cols, a.cols);
    };
    if (tiled(a.rows)) ctx.scratch.reserve(detail::tiled_bytes<T>(ctx.threads, c.cols, a.cols));
    if (streams) detail::streamed_product<T>(ctx, offsets, a, bank, rows, tb, c, kept != T{0});
    index longest = streams ? 0 : 1;
    for (index e = 0; e < groups; ++e) {
      const index first = offsets[e], count = offsets[e + 1] - first;
      if (tiled(count)) {
        detail::tiled_product<T>(ctx, T{1}, a.row_range(first, count), transpose::no,
                                 bank.row_range(e * rows, rows), tb, kept,
                                 c.row_range(first, count));
      } else if (!streams) {
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
    const bool streams = detail::streaming_pays(a.cols, b.cols);
    const auto tiled = [&](index count) {
      return streams && count > detail::most_streamed_gradient;
    };
    if (tiled(a.rows)) ctx.scratch.reserve(detail::tiled_bytes<T>(ctx.threads, b.cols, a.rows));
    const index blocks = ceil_div(std::max<index>(b.cols, 1), task_cols);
    for (const row_run& run : runs) {
      if (streams) detail::streamed_gradient<T>(ctx, offsets, a, b, run, dbank);
      const index groups = run.rows / a.cols, start = run.first / a.cols;
      for (index e = 0; streams && e < groups; ++e) {
        const index first = offsets[start + e], count = offsets[start + e + 1] - first;
        if (!tiled(count)) continue;
        detail::tiled_product<T>(ctx, T{1}, a.row_range(first, count), transpose::yes,
                                 b.row_range(first, count), transpose::no, T{1},
                                 dbank.row_range(run.grad_first + e * a.cols, a.cols));
      }
      detail::parallel_for(ctx, streams ? 0 : groups * blocks, [&](index task, int) {
        const index e = start + task / blocks, col = task % blocks * task_cols;
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
