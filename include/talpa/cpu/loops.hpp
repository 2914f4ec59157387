// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/lane_sum.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/cpu/context.hpp>

#include <algorithm>

// How the simple ops walk over matrices. Every cut depends on shapes only, so results have the same
// bits for any number of threads.

namespace talpa::detail {

/// Elements in one task of a loop over rows: enough to pay for handing the task out.
inline constexpr index task_elements = index{1} << 14;
/// Rows in one partial sum of columns, and columns in one task.
inline constexpr index column_block_rows = 256;
inline constexpr index column_block_cols = 256;

/// Rows in one task when a row has `cols` elements.
inline index task_rows(index cols) {
  return std::max<index>(1, task_elements / std::max<index>(1, cols));
}

/// row(n) for n in [0, rows), where a row is about `cols` elements of work.
template <class Row>
void for_each_row(context<cpu>& ctx, index rows, index cols, Row row) {
  if (rows == 0 || cols == 0) return;
  parallel_for_blocks(ctx, rows, task_rows(cols), [&](index first, index count, int) {
    for (index n = first; n < first + count; ++n) row(n);
  });
}

/// f(put), where put(out, value) writes as `mode` says; nothing for grad_mode::ignore.
template <class F>
void with_grad_mode(grad_mode mode, F f) {
  if (mode == grad_mode::overwrite) {
    f([](auto& out, const auto& value) { out = value; });
  } else if (mode == grad_mode::accumulate) {
    f([](auto& out, const auto& value) { out += value; });
  }
}

/// Largest of n > 0 values; NaN is skipped unless it is the first of its lane.
template <class T>
T lane_max(const T* x, index n) {
  T lane[sum_lanes];
  for (index l = 0; l < sum_lanes; ++l) lane[l] = x[l < n ? l : 0];
  index i = sum_lanes;
  for (; i + sum_lanes <= n; i += sum_lanes) {
    for (index l = 0; l < sum_lanes; ++l) lane[l] = x[i + l] > lane[l] ? x[i + l] : lane[l];
  }
  for (index l = 0; i < n; ++i, ++l) lane[l] = x[i] > lane[l] ? x[i] : lane[l];
  for (index half = sum_lanes / 2; half > 0; half /= 2) {
    for (index l = 0; l < half; ++l) lane[l] = lane[l + half] > lane[l] ? lane[l + half] : lane[l];
  }
  return lane[0];
}

/// The sum over all rows of row(n): one partial sum per task, then the partials in order.
template <class T, class Row>
T sum_over_rows(context<cpu>& ctx, index rows, index cols, Row row) {
  if (rows == 0 || cols == 0) return T{0};
  const workspace<cpu>::scope scratch(ctx.scratch);
  const index block_rows = task_rows(cols), blocks = ceil_div(rows, block_rows);
  const vector_view<T, cpu> partial = ctx.scratch.take<T>(blocks);
  parallel_for_blocks(ctx, rows, block_rows, [&](index first, index count, int) {
    T sum{0};
    for (index n = first; n < first + count; ++n) sum += row(n);
    partial[first / block_rows] = sum;
  });
  T sum{0};
  for (index b = 0; b < blocks; ++b) sum += partial[b];
  return sum;
}

/// out[d] = beta out[d] + the sum over n of term(n, d): partial sums over 256 rows each, then the
/// partials in order. beta == 0 ignores what out held.
template <class T, class Term>
void sum_columns(context<cpu>& ctx, index rows, index cols, T beta, T* out, Term term) {
  const workspace<cpu>::scope scratch(ctx.scratch);
  const index row_blocks = ceil_div(rows, column_block_rows);
  const index col_blocks = ceil_div(cols, column_block_cols);
  const matrix_view<T, cpu> partial = ctx.scratch.take<T>(row_blocks, cols);  // [row_blocks, cols]
  parallel_for(ctx, row_blocks * col_blocks, [&](index task, int) {
    const index block = task / col_blocks;
    const index first_row = block * column_block_rows;
    const index last_row = std::min(rows, first_row + column_block_rows);
    const index first_col = task % col_blocks * column_block_cols;
    const index last_col = std::min(cols, first_col + column_block_cols);
    T* const sum = partial.row(block);
    for (index d = first_col; d < last_col; ++d) sum[d] = term(first_row, d);
    for (index n = first_row + 1; n < last_row; ++n) {
      for (index d = first_col; d < last_col; ++d) sum[d] += term(n, d);
    }
  });
  parallel_for_blocks(ctx, cols, task_rows(row_blocks), [&](index first, index count, int) {
    for (index d = first; d < first + count; ++d) {
      T sum{0};
      for (index b = 0; b < row_blocks; ++b) sum += partial(b, d);
      out[d] = beta == T{0} ? sum : beta * out[d] + sum;
    }
  });
}

}  // namespace talpa::detail
