// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/cpu/eigen_map.hpp>
#include <talpa/cpu/packed_gemm.hpp>  // a weight may come packed
#include <talpa/cpu/skinny_product.hpp>
#include <talpa/cpu/tiled_product.hpp>
#include <talpa/ops/gemm.hpp>

#include <algorithm>

namespace talpa::detail {

/// One product on one thread. Not inlined, so that a program may instantiate it in one place.
template <class T>
void eigen_product(T alpha, matrix_view<const T, cpu> a, transpose ta, matrix_view<const T, cpu> b,
                   transpose tb, T beta, matrix_view<T, cpu> c);

template <class T>
void eigen_product(T alpha, matrix_view<const T, cpu> a, transpose ta, matrix_view<const T, cpu> b,
                   transpose tb, T beta, matrix_view<T, cpu> c) {
  eigen_map<const T> am = map(a), bm = map(b);
  eigen_map<T> cm = map(c);
  if (beta == T{0}) {
    cm.setZero();
  } else if (beta != T{1}) {
    cm *= beta;
  }
  // noalias: c overlaps neither operand by contract.
  if (ta == transpose::no && tb == transpose::no) {
    cm.noalias() += alpha * (am * bm);
  } else if (ta == transpose::no) {
    cm.noalias() += alpha * (am * bm.transpose());
  } else if (tb == transpose::no) {
    cm.noalias() += alpha * (am.transpose() * bm);
  } else {
    cm.noalias() += alpha * (am.transpose() * bm.transpose());
  }
}

/// Rows of c in one task: large enough that packing b pays, small enough to feed the threads.
inline constexpr index gemm_task_rows = 256;
/// Columns of c in one task when there are few rows.
inline constexpr index gemm_task_cols = 512;
/// Fewest rows and columns of c and length of K for register tiles: what they pack is then read
/// often enough, and little of a tile is wasted.
inline constexpr index tiled_rows = 128, tiled_cols = 32, tiled_inner = 16;
/// Fewest multiply-adds for register tiles.
inline constexpr index tiled_work = index{1} << 20;

/// Whether register tiles are faster than Eigen, by the shape alone.
inline bool tiles_pay(index m, index n, index k) {
  return m >= tiled_rows && n >= tiled_cols && k >= tiled_inner && m * n * k >= tiled_work;
}

}  // namespace talpa::detail

namespace talpa::ops {

/// Products by register tiles, those with one short side by products of rows, small ones by Eigen,
/// over tasks that depend on the shape only; each element of c is summed over all of K inside one
/// task, so the number of threads changes no bit.
template <>
struct gemm_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a, transpose ta,
                  matrix_view<const T, cpu> b, transpose tb, T beta, matrix_view<T, cpu> c) {
    if (c.empty()) return;
    const index k = detail::cols_of(a, ta);
    if (ta == transpose::no && tb == transpose::yes && detail::inner_pays(c.rows, c.cols, k)) {
      return detail::inner_product<T>(ctx, alpha, a, b, beta, c);
    }
    if (ta == transpose::yes && tb == transpose::no && detail::outer_pays(c.rows, c.cols, k)) {
      return detail::outer_product<T>(ctx, alpha, a, b, beta, c);
    }
    if (detail::tiles_pay(c.rows, c.cols, k)) {
      return detail::tiled_product<T>(ctx, alpha, a, ta, b, tb, beta, c);
    }
    const bool few_rows = c.rows < 2 * detail::gemm_task_rows;
    const index task_rows = few_rows ? c.rows : detail::gemm_task_rows;
    const index task_cols = few_rows ? detail::gemm_task_cols : c.cols;
    const index row_tasks = ceil_div(c.rows, task_rows), col_tasks = ceil_div(c.cols, task_cols);
    detail::parallel_for(ctx, row_tasks * col_tasks, [&](index task, int) {
      const index row = task / col_tasks * task_rows, col = task % col_tasks * task_cols;
      const index rows = std::min(task_rows, c.rows - row);
      const index cols = std::min(task_cols, c.cols - col);
      detail::eigen_product<T>(
          alpha, ta == transpose::no ? a.row_range(row, rows) : a.col_range(row, rows), ta,
          tb == transpose::no ? b.col_range(col, cols) : b.row_range(col, cols), tb, beta,
          c.row_range(row, rows).col_range(col, cols));
    });
  }
};

}  // namespace talpa::ops
