// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/cpu/row_products.hpp>
#include <talpa/ops/indexed_gemm.hpp>

#include <algorithm>
#include <cstdint>
#include <span>

// Cuts into tasks change no bit: every inner product, and every sum over slots, lies within one.

namespace talpa::detail {

/// Fewest tokens in one task, and slots of an expert that a task should find among its tokens: its
/// block of the bank is read once for all of them.
inline constexpr index indexed_task_tokens = 64;
inline constexpr index indexed_task_slots = 16;
/// How many tokens ahead rows are fetched.
inline constexpr index sum_prefetch_tokens = 4;
/// Tokens an expert from which on a bank is copied into panels for sums of its rows.
inline constexpr index panel_tokens = 2;

// Not inlined, so that a program may instantiate them in one place.

/// u[s] = block_e x[token of s].
template <class T>
void indexed_inner(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                   matrix_view<const T, cpu> bank, matrix_view<T, cpu> u);
/// y[n] = the sum of z[s] block_e over the slots of n, added to y if `add`.
template <class T>
void indexed_sum(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                 matrix_view<const T, cpu> bank, matrix_view<T, cpu> y, bool add);
/// dbank += the sum of z[s]^T x[token of s] over the slots of each expert in `run`.
template <class T>
void indexed_outer(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                   matrix_view<const T, cpu> x, const row_run& run, matrix_view<T, cpu> dbank);

template <class T>
void indexed_inner(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                   matrix_view<const T, cpu> bank, matrix_view<T, cpu> u) {
  const index experts = s.experts(), slots = s.offsets[experts];
  if (slots == 0) return;
  const index tokens =
      std::max(indexed_task_tokens, ceil_div(indexed_task_slots * experts * x.rows, slots));
  // Tasks that read the same tokens follow each other.
  parallel_for(ctx.threads, ceil_div(x.rows, tokens) * experts, [&](index task, int) {
    const index e = task % experts;
    const std::int32_t* const begin = s.token_of_slot.data;
    const auto slot_from = [&](index token) {
      return static_cast<index>(
          std::lower_bound(begin + s.offsets[e], begin + s.offsets[e + 1], token) - begin);
    };
    const index last = slot_from((task / experts + 1) * tokens);
    const auto block = bank.row_range(e * u.cols, u.cols);
    const index start = slot_from(task / experts * tokens);
    inner_products<T>(
        last - start, x.cols, [&](index i) { return x.row(s.token_of_slot[start + i]); }, block,
        [&](index i, index r, T sum) { u(start + i, r) = sum; });
  });
}

/// Columns [first, first + count) of a bank as one panel [rows, Width], filled up with zeros.
template <index Width, class T>
void copy_panel(matrix_view<const T, cpu> bank, index first, index count, T* out) {
  for (index r = 0; r < bank.rows; ++r, out += Width) {
    const T* const from = bank.row(r) + first;
    if (count == Width) {
      for (index d = 0; d < Width; ++d) out[d] = from[d];
    } else {
      for (index d = 0; d < Width; ++d) out[d] = d < count ? from[d] : T{0};
    }
  }
}

template <class T>
void indexed_sum(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                 matrix_view<const T, cpu> bank, matrix_view<T, cpu> y, bool add) {
  using tile = indexed_tile<T>;
  constexpr index width = tile::sum_cols;
  if (y.empty()) return;
  const index experts = s.experts(), ranks = z.cols;
  const index panels = ceil_div(y.cols, width);
  // Few tokens read the bank where it lies, but for columns that are no whole panel.
  const index borrowed = y.rows < panel_tokens * experts ? y.cols / width : 0;
  const workspace<cpu>::scope scope(ctx.scratch);
  const auto copies = ctx.scratch.take<T>(panels - borrowed, bank.rows * width);
  parallel_for(ctx.threads, panels - borrowed, [&](index panel, int) {
    const index first = (borrowed + panel) * width;
    copy_panel<width, T>(bank, first, std::min(width, y.cols - first), copies.row(panel));
  });

  // What the tokens of a task add up: the factors of each slot and the first row of its expert.
  const index most = indexed_task_tokens * experts;
  const auto factors = ctx.scratch.take<const T*>(ctx.threads, most);
  const auto first_rows = ctx.scratch.take<index>(ctx.threads, most);
  parallel_for_blocks(
      ctx.threads, y.rows, indexed_task_tokens, [&](index first, index rows, int thread) {
        const index* const places = s.slot_offset_of_token.data + first;
        const T** const factor = factors.row(thread);
        index* const first_row = first_rows.row(thread);
        for (index i = 0; i < places[rows] - places[0]; ++i) {
          const index slot = s.slot_of_token[places[0] + i];
          const index* const after =
              std::upper_bound(s.offsets.data, s.offsets.data + experts, slot);
          factor[i] = z.row(slot);
          first_row[i] = (after - s.offsets.data - 1) * ranks;
        }
        for (index panel = 0; panel < panels; ++panel) {
          const bool in_place = panel < borrowed;
          const T* const from = in_place ? bank.data + panel * width : copies.row(panel - borrowed);
          const index stride = in_place ? bank.stride : width;
          const index cols = std::min(width, y.cols - panel * width);
          for (index n = 0; n < rows; ++n) {
            T* const to = y.row(first + n) + panel * width;
            const index place = places[n] - places[0], count = places[n + 1] - places[n];
            // Rows are too far apart for the machine to foresee the next one.
            index row = n + sum_prefetch_tokens, column = panel * width;
            if (row >= rows) {
              row %= rows;
              column += width;
            }
            const auto next = reinterpret_cast<std::uintptr_t>(y.row(first + row)) +
                              static_cast<std::uintptr_t>(column) * sizeof(T);
            for (index line = 0; line < tile::sum_cols / panel_width<T>; ++line) {
              __builtin_prefetch(reinterpret_cast<const void*>(
                                     next + static_cast<std::uintptr_t>(line * panel_bytes)),
                                 1);
            }
            if (cols == width) {
              tile::sum_rows(count, ranks, factor + place, first_row + place, from, stride, add,
                             to);
            } else {
              T edge[width];
              tile::sum_rows(count, ranks, factor + place, first_row + place, from, stride, false,
                             edge);
              for (index d = 0; d < cols; ++d) to[d] = add ? to[d] + edge[d] : edge[d];
            }
          }
        }
      });
}

template <class T>
void indexed_outer(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                   matrix_view<const T, cpu> x, const row_run& run, matrix_view<T, cpu> dbank) {
  const index ranks = z.cols;
  if (ranks == 0 || x.cols == 0) return;
  const index chunk = outer_chunk<T>(ranks, x.cols), chunks = ceil_div(x.cols, chunk);
  const workspace<cpu>::scope scope(ctx.scratch);
  const auto sums = ctx.scratch.take<T>(ctx.threads, ranks * chunk);
  parallel_for(ctx.threads, run.rows / ranks * chunks, [&](index task, int thread) {
    const index e = run.first / ranks + task / chunks, first = task % chunks * chunk;
    const index cols = std::min(chunk, x.cols - first), slot = s.offsets[e];
    T* const sum = sums.row(thread);
    outer_products<T>(
        s.offsets[e + 1] - slot, ranks, cols, [&](index i) { return z.row(slot + i); },
        [&](index i) { return x.row(s.token_of_slot[slot + i]) + first; }, sum);
    for (index r = 0; r < ranks; ++r) {
      T* const to = dbank.row(run.grad_first + task / chunks * ranks + r) + first;
      for_each_outer<T>(sum, ranks, cols, r, [&](index d, T value) { to[d] += value; });
    }
  });
}

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct indexed_gemm_impl<cpu> {
  template <class T>
  static void shrink(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                     matrix_view<const T, cpu> bank, matrix_view<T, cpu> u) {
    detail::indexed_inner<T>(ctx, s, x, bank, u);
  }
  template <class T>
  static void expand(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                     matrix_view<const T, cpu> bank, matrix_view<T, cpu> y, grad_mode y_mode) {
    detail::indexed_sum<T>(ctx, s, z, bank, y, y_mode == grad_mode::accumulate);
  }
  template <class T>
  static void gradient(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                       matrix_view<const T, cpu> x, std::span<const row_run> runs,
                       matrix_view<T, cpu> dbank) {
    for (const row_run& run : runs) detail::indexed_outer<T>(ctx, s, z, x, run, dbank);
  }
};

}  // namespace talpa::ops
