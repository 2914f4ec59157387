// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/gemm.hpp>
#include <talpa/ops/ragged_gemm.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct ragged_gemm_impl<cpu> {
  /// One task is a group's block of rows: which rows belong together depends on the offsets only.
  template <class T>
  static void product(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                      vector_view<const index, cpu> blocks, matrix_view<const T, cpu> a,
                      matrix_view<const T, cpu> bank, transpose tb, matrix_view<T, cpu> c,
                      grad_mode c_mode) {
    const T kept = c_mode == grad_mode::accumulate ? T{1} : T{0};
    const index groups = offsets.size - 1;
    index longest = 1;
    for (index e = 0; e < groups; ++e) longest = std::max(longest, offsets[e + 1] - offsets[e]);
    const index tasks = ceil_div(longest, detail::gemm_task_rows);
    detail::parallel_for(ctx, groups * tasks, [&](index task, int) {
      const index e = task / tasks;
      const index first = offsets[e] + task % tasks * detail::gemm_task_rows;
      const index count = std::min(detail::gemm_task_rows, offsets[e + 1] - first);
      if (count <= 0) return;
      const index ranks = blocks[e + 1] - blocks[e];
      const auto block = bank.row_range(blocks[e], ranks);
      const auto from = a.row_range(first, count);
      const auto to = c.row_range(first, count);
      if (tb == transpose::yes) {
        detail::eigen_product<T>(T{1}, from, transpose::no, block, tb, kept,
                                 to.col_range(0, ranks));
      } else {
        detail::eigen_product<T>(T{1}, from.col_range(0, ranks), transpose::no, block, tb, kept,
                                 to);
      }
    });
  }

  template <class T>
  static void gradient(context<cpu>& ctx, vector_view<const index, cpu> offsets,
                       vector_view<const index, cpu> blocks, matrix_view<const T, cpu> a,
                       matrix_view<const T, cpu> b, std::span<const row_run> runs,
                       matrix_view<T, cpu> dbank) {
    detail::parallel_for(ctx, offsets.size - 1, [&](index e, int) {
      const index count = offsets[e + 1] - offsets[e];
      if (count == 0) return;
      for (const row_run& run : runs) {
        const index from = std::max(blocks[e], run.first);
        const index to = std::min(blocks[e + 1], run.first + run.rows);
        if (from >= to) continue;
        detail::eigen_product<T>(
            T{1}, a.row_range(offsets[e], count).col_range(from - blocks[e], to - from),
            transpose::yes, b.row_range(offsets[e], count), transpose::no, T{1},
            dbank.row_range(run.grad_first + from - run.first, to - from));
      }
    });
  }
};

}  // namespace talpa::ops
