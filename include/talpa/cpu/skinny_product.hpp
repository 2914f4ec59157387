// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/cpu/row_products.hpp>

// Products with one short side: logits of routers, low-rank adapters and their gradients. Each
// element of c is summed within one task.

namespace talpa::detail {

/// Rows of c in one task of inner products.
inline constexpr index inner_task_rows = 64;
/// The short side of a skinny product, and least lengths of the two others.
inline constexpr index skinny_least = 2, skinny_most = 16;
inline constexpr index skinny_length = 64, inner_rows = 8, outer_rows = 256;

/// Whether inner products of rows are the fastest c = a b^T, by its shape: c [m, n] has few
/// columns.
inline bool inner_pays(index m, index n, index k) {
  return n >= skinny_least && n <= skinny_most && k >= skinny_length && m >= inner_rows;
}
/// Whether sums of outer products are the fastest c = a^T b, by its shape: c [m, n] has few rows.
inline bool outer_pays(index m, index n, index k) {
  return m >= skinny_least && m <= skinny_most && n >= skinny_length && k >= outer_rows;
}

// Not inlined, so that a program may instantiate them in one place.

/// c = alpha a b^T + beta c.
template <class T>
void inner_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a,
                   matrix_view<const T, cpu> b, T beta, matrix_view<T, cpu> c);
/// c = alpha a^T b + beta c.
template <class T>
void outer_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a,
                   matrix_view<const T, cpu> b, T beta, matrix_view<T, cpu> c);

template <class T>
void inner_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a,
                   matrix_view<const T, cpu> b, T beta, matrix_view<T, cpu> c) {
  parallel_for_blocks(ctx, c.rows, inner_task_rows, [&](index first, index rows, int) {
    inner_products<T>(
        rows, a.cols, [&](index i) { return a.row(first + i); }, b,
        [&](index i, index j, T sum) {
          T& to = c(first + i, j);
          to = beta == T{0} ? alpha * sum : alpha * sum + beta * to;
        });
  });
}

template <class T>
void outer_product(context<cpu>& ctx, T alpha, matrix_view<const T, cpu> a,
                   matrix_view<const T, cpu> b, T beta, matrix_view<T, cpu> c) {
  const index chunk = outer_chunk<T>(c.rows, c.cols);
  const workspace<cpu>::scope scope(ctx.scratch);
  const auto sums = ctx.scratch.take<T>(ctx.threads, c.rows * chunk);
  parallel_for_blocks(ctx, c.cols, chunk, [&](index first, index cols, int thread) {
    T* const sum = sums.row(thread);
    outer_products<T>(
        b.rows, c.rows, cols, [&](index i) { return a.row(i); },
        [&](index i) { return b.row(i) + first; }, sum);
    for (index r = 0; r < c.rows; ++r) {
      T* const to = c.row(r) + first;
      for_each_outer<T>(sum, c.rows, cols, r, [&](index d, T value) {
        to[d] = beta == T{0} ? alpha * value : alpha * value + beta * to[d];
      });
    }
  });
}

}  // namespace talpa::detail
