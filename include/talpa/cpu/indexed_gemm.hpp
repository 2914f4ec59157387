// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/packed_gemm.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/cpu/row_products.hpp>
#include <talpa/cpu/tiled_product.hpp>
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
/// Bytes of rows that are read for all experts before the next ones: they stay in L2.
inline constexpr index indexed_block_bytes = 393216;
/// Fewest tokens for which other threads make lists of terms.
inline constexpr index terms_threaded_rows = 2048;
/// Tokens an expert from which on a bank is copied into panels for sums of its rows.
inline constexpr index panel_tokens = 2;

// Not inlined, so that a program may instantiate them in one place.

/// u[s] = block_e x[token of s].
template <class T>
void indexed_inner(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                   matrix_view<const T, cpu> bank, matrix_view<T, cpu> u);
/// y[n] = what `kept` leaves of the sum of z[s] block_e over the slots of n, added to y if `add`.
template <class T>
void indexed_sum(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                 matrix_view<const T, cpu> bank, matrix_view<T, cpu> y, bool add,
                 const dropout_bits<cpu>& kept);
/// dbank += the sum of z[s]^T x[token of s] over the slots of each expert in `run`.
template <class T>
void indexed_outer(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                   matrix_view<const T, cpu> x, const row_run& run, matrix_view<T, cpu> dbank);

/// Slots [first, last).
struct slot_range {
  index first, last;
};

/// u[s] = block_e x[token of s] for the slots of expert e among tokens [first, last), which are
/// returned.
template <class T>
slot_range inner_of_expert(const segments<cpu>& s, index e, index first, index last,
                           matrix_view<const T, cpu> x, matrix_view<const T, cpu> bank,
                           matrix_view<T, cpu> u) {
  const std::int32_t* const tokens = s.token_of_slot.data;
  const auto slot_from = [&](index token) {
    return static_cast<index>(
        std::lower_bound(tokens + s.offsets[e], tokens + s.offsets[e + 1], token) - tokens);
  };
  const slot_range slots{slot_from(first), slot_from(last)};
  inner_products<T>(
      slots.last - slots.first, x.cols, [&](index i) { return x.row(tokens[slots.first + i]); },
      bank.row_range(e * u.cols, u.cols),
      [&](index i, index r, T sum) { u(slots.first + i, r) = sum; });
  return slots;
}

template <class T>
void indexed_inner(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                   matrix_view<const T, cpu> bank, matrix_view<T, cpu> u) {
  const index experts = s.experts(), slots = s.offsets[experts];
  if (slots == 0) return;
  const index tokens =
      std::max(indexed_task_tokens, ceil_div(indexed_task_slots * experts * x.rows, slots));
  // Tasks that read the same tokens follow each other.
  parallel_for(ctx, ceil_div(x.rows, tokens) * experts, [&](index task, int) {
    const index first = task / experts * tokens;
    inner_of_expert<T>(s, task % experts, first, first + tokens, x, bank, u);
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

/// What the tokens add up: some terms each, factors of rows of a panel.
template <class T, class Tile = indexed_tile<T>>
struct token_terms {
  using term = typename Tile::row_factors;
  using list = typename Tile::row_terms;

  /// In scratch, at most `most` terms a token, none yet.
  token_terms(context<cpu>& ctx, index tokens, index most) : most_(most) {
    lists_ = ctx.scratch.take<list>(tokens).data;
    terms_ = ctx.scratch.take<term>(tokens * most).data;
  }
  /// A term for each slot, with the first row of its expert in the bank, and one for the token's
  /// row of d, if that has rows, with the rows behind the bank. In scratch.
  token_terms(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
              matrix_view<const T, cpu> d)
      : most_(0) {
    const index experts = s.experts(), more = d.rows != 0 ? 1 : 0;
    lists_ = ctx.scratch.take<list>(s.tokens()).data;
    terms_ = ctx.scratch.take<term>(s.offsets[experts] + more * s.tokens()).data;
    const auto threads = threads_from(ctx, s.tokens(), terms_threaded_rows);
    parallel_for_blocks(threads, s.tokens(), 256, [&](index begin, index count, int) {
      for (index n = begin; n < begin + count; ++n) {
        const index first = s.slot_offset_of_token[n];
        list& to = lists_[n];
        to = {terms_ + first + more * n, 0};
        for (index i = first; i < s.slot_offset_of_token[n + 1]; ++i) {
          const index slot = s.slot_of_token[i];
          const index* const after =
              std::upper_bound(s.offsets.data, s.offsets.data + experts, slot);
          to.terms[to.count++] = {z.row(slot), (after - s.offsets.data - 1) * z.cols, z.cols};
        }
        if (more != 0) to.terms[to.count++] = {d.row(n), experts * z.cols, d.cols};
      }
    });
  }

  const list& of(index n) const { return lists_[n]; }
  void clear(index n) const { lists_[n] = {terms_ + n * most_, 0}; }
  void add(index n, const term& t) const { lists_[n].terms[lists_[n].count++] = t; }

 private:
  index most_;
  list* lists_ = nullptr;
  term* terms_ = nullptr;
};

/// Sums of rows of a panel for a block of y at row `first`, column `col`, at most a panel wide, of
/// which `kept` stays but for the last `others` terms of each, added to `to`. While the last rows
/// are computed the first ones `ahead` columns further are fetched.
template <class T, class Tile = indexed_tile<T>>
void sum_block(const token_terms<T, Tile>& of, index first, index col, const T* panel, index stride,
               index ahead, typename Tile::addend to, const dropout_bits<cpu>& kept, index others,
               matrix_view<T, cpu> y) {
  constexpr index width = Tile::sum_cols;
  const T factor = kept.active() ? dropout_factor<T>(kept.keep) : T{1};
  const index word = col / mask_word_bits, bit = col % mask_word_bits;
  if (y.cols == width) {
    if (!kept.active()) {
      Tile::sum_rows(y.rows, &of.of(first), panel, stride, to, y.data, y.stride, ahead);
    } else {
      Tile::sum_kept_rows(y.rows, &of.of(first), panel, stride, to, y.data, y.stride, ahead,
                          {kept.words.row(first) + word, kept.words.stride, bit, others, factor});
    }
    return;
  }
  for (index n = 0; n < y.rows; ++n) {
    T edge[width];
    if (!kept.active()) {
      Tile::sum_rows(1, &of.of(first + n), panel, stride, {}, edge, width, 0);
    } else {
      std::uint32_t words[mask_words(width) + 1] = {};  // behind the last one there are no more
      std::copy(kept.words.row(first + n) + word,
                kept.words.row(first + n) + mask_words(col + y.cols), words);
      Tile::sum_kept_rows(1, &of.of(first + n), panel, stride, {}, edge, width, 0,
                          {words, 0, bit, others, factor});
    }
    T* const row = y.row(n);
    for (index d = 0; d < y.cols; ++d) {
      if (to.bias != nullptr) row[d] += to.bias[d];
      row[d] = to.held ? row[d] + edge[d] : edge[d];
    }
  }
}

template <class T>
void indexed_sum(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                 matrix_view<const T, cpu> bank, matrix_view<T, cpu> y, bool add,
                 const dropout_bits<cpu>& kept) {
  constexpr index width = indexed_tile<T>::sum_cols;
  if (y.empty()) return;
  const index panels = ceil_div(y.cols, width);
  // Few tokens read the bank where it lies, but for columns that are no whole panel.
  const index borrowed = y.rows < panel_tokens * s.experts() ? y.cols / width : 0;
  const workspace<cpu>::scope scope(ctx.scratch);
  const auto copies = ctx.scratch.take<T>(panels - borrowed, bank.rows * width);
  parallel_for(ctx, panels - borrowed, [&](index panel, int) {
    const index first = (borrowed + panel) * width;
    copy_panel<width, T>(bank, first, std::min(width, y.cols - first), copies.row(panel));
  });
  const token_terms<T> terms(ctx, s, z, {});
  parallel_for_blocks(ctx, y.rows, indexed_task_tokens, [&](index first, index rows, int) {
    for (index panel = 0; panel < panels; ++panel) {
      const index col = panel * width;
      const bool in_place = panel < borrowed;
      sum_block<T>(terms, first, col, in_place ? bank.data + col : copies.row(panel - borrowed),
                   in_place ? bank.stride : width, width, {add}, kept, 0,
                   y.row_range(first, rows).col_range(col, std::min(width, y.cols - col)));
    }
  });
}

/// Rows that token_terms point to: a bank and what lies behind it, to which the last term of each
/// token belongs, if there is something. `kept` stays of the bank's terms.
template <class T>
struct summed_rows {
  matrix_view<const T, cpu> bank;
  matrix_view<const T, cpu> more{};
  dropout_bits<cpu> kept{};
};

/// y = `product`, added to y if `add`, plus the tokens' terms, which each block of y takes behind
/// the bias while it is in the near caches. `before` may make the terms: it is called once for each
/// row before that is read, at the start of its task where columns are in one piece.
template <class T>
void product_and_sum(context<cpu>& ctx, const packed_product<T, cpu>& product,
                     const token_terms<T>& terms, const summed_rows<T>& rows, matrix_view<T, cpu> y,
                     bool add, const row_function& before);

/// `of_b` are the panels of product.b.
template <class T, class Stored, class Tile = stored_tile<T, Stored>>
void product_and_sum(context<cpu>& ctx, const packed_product<T, cpu>& product, const Stored* of_b,
                     const token_terms<T>& terms, const summed_rows<T>& rows, matrix_view<T, cpu> y,
                     bool add, const row_function& before) {
  constexpr index width = indexed_tile<T>::sum_cols;
  static_assert(width % Tile::cols == 0);
  const index depth = product.b->rows(), bank_rows = rows.bank.rows;
  const workspace<cpu>::scope scope(ctx.scratch);
  // Panels of the bank begin where the pieces of the product's columns do.
  const tile_tasks_of<T, Tile> cut(y.rows, y.cols, depth, ctx.threads);
  const index panels = ceil_div(cut.cols, width);
  const auto copies =
      ctx.scratch.take<T>(cut.col_tasks * panels, (bank_rows + rows.more.rows) * width);
  parallel_for(ctx, cut.col_tasks * panels, [&](index panel, int) {
    const index at = panel % panels * width, first = panel / panels * cut.cols + at;
    const index some = std::min({width, cut.cols - at, y.cols - first});
    if (some <= 0) return;
    copy_panel<width, T>(rows.bank, first, some, copies.row(panel));
    copy_panel<width, T>(rows.more, first, some, copies.row(panel) + bank_rows * width);
  });
  const auto add_sums = [&](const finished_block& block) {
    const index panel = block.col_task * panels + block.at / width;
    const T* const bias = product.bias.empty() ? nullptr : product.bias.data + block.col;
    sum_block<T>(terms, block.row, block.col, copies.row(panel), width, 0, {true, bias}, rows.kept,
                 rows.more.rows != 0 ? 1 : 0,
                 y.row_range(block.row, block.rows).col_range(block.col, block.cols));
  };
  const T kept = add ? T{1} : T{0};
  const bool joins = cut.col_tasks == 1 && depth > 0;
  if (before && !joins) {
    parallel_for_blocks(ctx, y.rows, indexed_task_tokens,
                        [&](index first, index count, int t) { before(first, count, t); });
  }
  if (depth == 0) {
    // No product: nothing is complete block by block.
    for (index i = 0; i < y.rows && !add; ++i) std::fill_n(y.row(i), y.cols, T{0});
    for (index col = 0; col < y.cols; col += cut.cols) {
      const index cols = std::min(cut.cols, y.cols - col);
      for (index at = 0; at < cols; at += width) {
        add_sums({0, y.rows, col + at, std::min(width, cols - at), col / cut.cols, at});
      }
    }
    return;
  }
  panel_product<T>(ctx, T{1}, product.a, transpose::no, of_b, depth, kept, y, width, add_sums,
                   joins ? before : row_function{});
}

template <class T>
void product_and_sum(context<cpu>& ctx, const packed_product<T, cpu>& product,
                     const token_terms<T>& terms, const summed_rows<T>& rows, matrix_view<T, cpu> y,
                     bool add, const row_function& before) {
  if (y.empty()) return;
  product.b->visit([&](const auto* of_b) {
    product_and_sum<T>(ctx, product, of_b, terms, rows, y, add, before);
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
  parallel_for(ctx, run.rows / ranks * chunks, [&](index task, int thread) {
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
                     matrix_view<const T, cpu> bank, matrix_view<T, cpu> y, grad_mode y_mode,
                     const dropout_bits<cpu>& kept = {}) {
    detail::indexed_sum<T>(ctx, s, z, bank, y, y_mode == grad_mode::accumulate, kept);
  }
  template <class T>
  static void expand(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                     matrix_view<const T, cpu> bank, const packed_product<T, cpu>& product,
                     const low_rank_product<T, cpu>& more, matrix_view<T, cpu> y, grad_mode y_mode,
                     const dropout_bits<cpu>& kept) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const detail::token_terms<T> terms(ctx, s, z, more.d);
    detail::product_and_sum<T>(ctx, product, terms, {bank, more.w, kept}, y,
                               y_mode == grad_mode::accumulate, {});
  }
  template <class T>
  static void gradient(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> z,
                       matrix_view<const T, cpu> x, std::span<const row_run> runs,
                       matrix_view<T, cpu> dbank) {
    for (const row_run& run : runs) detail::indexed_outer<T>(ctx, s, z, x, run, dbank);
  }
};

}  // namespace talpa::ops
