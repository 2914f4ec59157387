// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cuda/kernel.hpp>

#include <algorithm>
#include <limits>
#include <type_traits>

// How the simple ops walk over matrices on a device. Every cut depends on shapes only, and sums are
// added in an order that depends on shapes only, so equal inputs give equal bits.

namespace talpa::kernels {

/// Threads of a block of a simple loop, and the most blocks it is given.
inline constexpr int loop_threads = 256;
inline constexpr index loop_blocks = 132 * 16;

/// Calls f(r, c) for each element, one thread each in turn.
template <class F>
struct element_loop {
  static constexpr bool independent = true;

  F f;
  index rows;
  index cols;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    const index first = block.index() * Block::threads() + block.thread();
    const index step = block.count() * Block::threads();
    if (rows * cols <= std::numeric_limits<std::int32_t>::max() - step) {
      // Division of 32 bits takes a fifth of that of 64.
      const std::uint32_t n = static_cast<std::uint32_t>(rows * cols);
      const std::uint32_t width = static_cast<std::uint32_t>(cols);
      for (std::uint32_t i = static_cast<std::uint32_t>(first); i < n;
           i += static_cast<std::uint32_t>(step)) {
        const std::uint32_t r = i / width;
        f(static_cast<index>(r), static_cast<index>(i - r * width));
      }
    } else {
      for (index i = first; i < rows * cols; i += step) f(i / cols, i % cols);
    }
  }
};

/// f(r, c) for r < rows, c < cols, in any order; f is TALPA_HD and captures by value.
template <class B, class F>
void for_each_element(context<B>& ctx, index rows, index cols, const F& f) {
  const index n = rows * cols;
  detail::launch<loop_threads>(ctx, std::min(ceil_div(n, loop_threads), loop_blocks), 0,
                               element_loop<F>{f, rows, cols});
}

/// c = beta c; beta == 0 forgets what c held.
template <class C, class Sum, class B>
struct scale_in_place {
  Sum beta;
  matrix_view<C, B> c;
  TALPA_HD void operator()(index m, index n) const {
    c(m, n) =
        beta == Sum{0} ? static_cast<C>(Sum{0}) : static_cast<C>(beta * static_cast<Sum>(c(m, n)));
  }
};

/// f(put), where put(out, value) writes as `mode` says; nothing for grad_mode::ignore.
struct put_overwrite {
  template <class T>
  TALPA_HD void operator()(T& out, std::type_identity_t<T> value) const {
    out = value;
  }
};
struct put_accumulate {
  template <class T>
  TALPA_HD void operator()(T& out, std::type_identity_t<T> value) const {
    out += value;
  }
};
template <class F>
void with_put(grad_mode mode, F f) {
  if (mode == grad_mode::overwrite) {
    f(put_overwrite{});
  } else if (mode == grad_mode::accumulate) {
    f(put_accumulate{});
  }
}

/// The lanes of the warp of a thread, all of them.
inline constexpr std::uint32_t whole_warp = 0xffffffffu;

/// The sum over the lanes of a warp, the same bits in each: tree 16, 8, 4, 2, 1.
template <class Block, class T>
TALPA_HD T warp_sum(Block& block, T x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x = x + block.shuffle_xor(x, distance, whole_warp);
  }
  return x;
}
template <class Block, class T>
TALPA_HD T warp_max(Block& block, T x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    const T other = block.shuffle_xor(x, distance, whole_warp);
    x = other > x ? other : x;
  }
  return x;
}

/// One warp a row: calls f(warp, r) with all its lanes; warp.lane() is 0 .. 31.
template <class Block>
struct row_warp {
  Block& block;
  TALPA_HD int lane() const { return block.thread() % 32; }
  /// f(0) + ... + f(n - 1): term i belongs to lane i mod 32, each sums in order, then the tree.
  template <class T, class F>
  TALPA_HD T sum(index n, F f) const {
    T x{0};
    for (index i = lane(); i < n; i += 32) x = x + f(i);
    return warp_sum(block, x);
  }
  /// Largest f(i), NaN skipped; -inf for n = 0.
  template <class T, class F>
  TALPA_HD T max(index n, F f) const {
    T x = -std::numeric_limits<T>::infinity();
    for (index i = lane(); i < n; i += 32) {
      const T y = f(i);
      x = y > x ? y : x;
    }
    return warp_max(block, x);
  }
  /// f(i) for i < n, shared out over the lanes.
  template <class F>
  TALPA_HD void for_each(index n, F f) const {
    for (index i = lane(); i < n; i += 32) f(i);
  }
  /// What the lanes wrote before is there for all of them after.
  TALPA_HD void sync() const { block.sync_lanes(whole_warp); }
};

/// Calls f(warp, r) for each row, one warp each in turn.
template <class F>
struct row_loop {
  F f;
  index rows;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr index warps = Block::threads() / 32;
    for (index r = block.index() * warps + block.thread() / 32; r < rows;
         r += block.count() * warps) {
      f(row_warp<Block>{block}, r);
    }
  }
};

/// One warp a row: f is a struct with `template <class Warp> TALPA_HD void operator()(const Warp&
/// warp, index r) const`.
template <class B, class F>
void for_each_row(context<B>& ctx, index rows, const F& f) {
  detail::launch<loop_threads>(ctx, std::min(ceil_div(rows, loop_threads / 32), loop_blocks), 0,
                               row_loop<F>{f, rows});
}

/// Rows in one partial sum of columns.
inline constexpr index column_block_rows = 128;

/// partial(b, c) = the sum over the rows of block b of term(r, c), in order.
template <class T, class Term, class B>
struct column_partials {
  Term term;
  index rows;
  matrix_view<T, B> partial;

  TALPA_HD void operator()(index b, index c) const {
    const index first = b * column_block_rows;
    const index last = first + column_block_rows < rows ? first + column_block_rows : rows;
    T sum = term(first, c);
    for (index r = first + 1; r < last; ++r) sum = sum + term(r, c);
    partial(b, c) = sum;
  }
};
template <class T, class B>
struct column_totals {
  matrix_view<T, B> partial;
  T beta;
  T* out;

  TALPA_HD void operator()(index, index c) const {
    T sum{0};
    for (index b = 0; b < partial.rows; ++b) sum = sum + partial(b, c);
    out[c] = beta == T{0} ? sum : beta * out[c] + sum;
  }
};

/// out[c] = beta out[c] + the sum over r of term(r, c): partial sums over 128 rows each, then the
/// partials in order. beta == 0 ignores what out held.
template <class T, class B, class Term>
void sum_columns(context<B>& ctx, index rows, index cols, T beta, T* out, const Term& term) {
  const typename workspace<B>::scope scope(ctx.scratch);
  const index blocks = ceil_div(rows, column_block_rows);
  const auto partial = ctx.scratch.template take<T>(blocks, cols);  // [blocks, cols]
  for_each_element(ctx, blocks, cols, column_partials<T, Term, B>{term, rows, partial});
  for_each_element(ctx, 1, cols, column_totals<T, B>{partial, beta, out});
}

/// The sum over all rows of term(warp, r), the same in every lane: one partial sum a block of rows,
/// then the partials in order, to *out.
template <class T, class Term>
struct row_values {
  Term term;
  T* value;
  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index r) const {
    const T x = term(warp, r);
    if (warp.lane() == 0) value[r] = x;
  }
};
template <class T>
struct value_of_row {
  const T* value;
  TALPA_HD T operator()(index r, index) const { return value[r]; }
};
template <class T, class B, class Term>
void sum_rows(context<B>& ctx, index rows, T* out, const Term& term) {
  const typename workspace<B>::scope scope(ctx.scratch);
  const auto values = ctx.scratch.template take<T>(rows);  // [rows]
  for_each_row(ctx, rows, row_values<T, Term>{term, values.data});
  sum_columns(ctx, rows, 1, T{0}, out, value_of_row<T>{values.data});
}

/// <x_r, y_r> of a row.
template <class T, class B>
struct row_product {
  matrix_view<const T, B> x, y;
  template <class Warp>
  TALPA_HD T operator()(const Warp& warp, index r) const {
    return warp.template sum<T>(x.cols, [&](index c) { return x(r, c) * y(r, c); });
  }
};

}  // namespace talpa::kernels
