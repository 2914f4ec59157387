// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/view.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/cpu/indexed_gemm.hpp>
#include <talpa/cpu/parallel.hpp>
#include <talpa/cpu/rank_gate.hpp>
#include <talpa/cpu/row_products.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/cpu/skinny_product.hpp>
#include <talpa/ops/routed_linear.hpp>

#include <algorithm>
#include <cstdint>

namespace talpa::detail {

/// Rows `width` wide that are routed and shrunk together: they stay in L2 for the products of all
/// experts, and some of each are among them.
template <class T>
index routed_block_rows(index width) {
  return std::max(indexed_task_tokens, indexed_block_bytes / (std::max<index>(width, 1) *
                                                              static_cast<index>(sizeof(T))));
}

/// The experts' shares of a task of routed_linear. What does not depend on the selector, so that it
/// is instantiated once.
template <class T>
struct routed_forward {
  const routed_adapter<T, cpu>& adapter;
  matrix_view<const T, cpu> x;
  const routed_choice<T, cpu>& routed;
  matrix_view<T, cpu> u;  // [N K, R]
  const row_function& select;
  const routed_dropout<cpu>& dropped;

  /// A token of an expert, and its row of u.
  struct place {
    std::int32_t token, row;
  };

  routed_forward(context<cpu>& ctx, const routed_adapter<T, cpu>& adapter_,
                 matrix_view<const T, cpu> x_, const routed_choice<T, cpu>& routed_,
                 matrix_view<T, cpu> u_, const row_function& select_,
                 const routed_dropout<cpu>& dropped_);

  /// Routes rows [first, first + rows) and makes their rows of u and terms.
  void run(index first, index rows, int thread) const;

  token_terms<T> terms;

 private:
  /// What the experts read of rows [first, first + rows).
  matrix_view<const T, cpu> after_dropout(index first, index rows, int thread) const;

  index block_;                          // rows that are routed and shrunk together
  matrix_view<T, cpu> z_;                // [N K, R]
  matrix_view<place, cpu> places_;       // [threads, rows K]
  matrix_view<std::int32_t, cpu> next_;  // [threads, E]
  matrix_view<T, cpu> kept_;             // [threads rows, D], what dropout leaves of some rows
};

template <class T>
routed_forward<T>::routed_forward(context<cpu>& ctx, const routed_adapter<T, cpu>& adapter_,
                                  matrix_view<const T, cpu> x_,
                                  const routed_choice<T, cpu>& routed_, matrix_view<T, cpu> u_,
                                  const row_function& select_, const routed_dropout<cpu>& dropped_)
    : adapter(adapter_),
      x(x_),
      routed(routed_),
      u(u_),
      select(select_),
      dropped(dropped_),
      terms(ctx, x_.rows, adapter_.max_selected),
      block_(routed_block_rows<T>(dropped_.mask.active ? 2 * x_.cols : x_.cols)),
      z_(ctx.scratch.take<T>(u_.rows, u_.cols)),
      places_(ctx.scratch.take<place>(ctx.threads, block_ * adapter_.max_selected)),
      next_(ctx.scratch.take<std::int32_t>(ctx.threads, adapter_.experts())) {
  if (dropped.mask.active) kept_ = ctx.scratch.take<T>(ctx.threads * block_, x.cols);
}

template <class T>
matrix_view<const T, cpu> routed_forward<T>::after_dropout(index first, index rows,
                                                           int thread) const {
  if (!dropped.mask.active) return x.row_range(first, rows);
  const matrix_view<T, cpu> kept = kept_.row_range(thread * block_, rows);
  const dropout_row mask(dropped.mask.stream, dropped.mask.keep);
  const T factor = dropout_factor<T>(dropped.mask.keep);
  for (index i = 0; i < rows; ++i) {
    std::uint32_t* const bits = dropped.words.row(first + i);
    mask.draw((first + i) * x.cols, x.cols, bits);
    put_kept<T>(bits, factor, x.cols, x.row(first + i), kept.row(i),
                [](auto& to, const auto& value) { to = value; });
  }
  return kept;
}

template <class T>
void routed_forward<T>::run(index first, index rows, int thread) const {
  const index experts = adapter.experts(), ranks = adapter.ranks(), most = adapter.max_selected;
  const index block = block_, end = first + rows;
  const T* const bias = adapter.router_bias.empty() ? nullptr : adapter.router_bias.data;
  place* const places = places_.row(thread);
  std::int32_t* const next = next_.row(thread);
  for (; first < end; first += block) {
    const index some = std::min(block, end - first);
    inner_products<T>(
        some, x.cols, [&](index i) { return x.row(first + i); }, adapter.router,
        [&](index i, index e, T sum) {
          routed.logits(first + i, e) = bias != nullptr ? sum + bias[e] : sum;
        });
    select(first, some, thread);
    const matrix_view<const T, cpu> of_experts = after_dropout(first, some, thread);
    // f(n, e, row of u) for each slot; a selector may break its word and choose more than `most`.
    const auto for_each_slot = [&](const auto& f) {
      for (index n = first; n < first + some; ++n) {
        index row = n * most;
        for_each_expert(routed.mask.row(n), experts, [&](index e) {
          if (row < (n + 1) * most) f(n, e, row++);
        });
      }
    };
    std::fill_n(next, experts, 0);
    for_each_slot([&](index, index e, index) { ++next[e]; });
    for (index e = 0, at = 0; e < experts; ++e) {
      const std::int32_t count = next[e];
      next[e] = static_cast<std::int32_t>(at);
      at += count;
    }
    for (index n = first; n < first + some; ++n) terms.clear(n);
    for_each_slot([&](index n, index e, index row) {
      places[next[e]++] = {static_cast<std::int32_t>(n), static_cast<std::int32_t>(row)};
      terms.add(n, {z_.row(row), e * ranks, ranks});
    });
    for (index e = 0, at = 0; e < experts; at = next[e++]) {
      const place* const of = places + at;
      const index count = next[e] - at;
      inner_products<T>(
          count, x.cols, [&](index i) { return of_experts.row(of[i].token - first); },
          adapter.a.row_range(e * ranks, ranks),
          [&](index i, index r, T sum) { u(of[i].row, r) = sum; });
      for (index i = 0; i < count; ++i) {
        const T factor = adapter.scale * routed.gates(of[i].token, e);
        const T* const from = u.row(of[i].row);
        T* const to = z_.row(of[i].row);
        for (index r = 0; r < ranks; ++r) to[r] = factor * from[r];
      }
    }
  }
}

/// What routed_linear_backward does for the rows of a task before their product.
template <class T>
struct routed_backward {
  const routed_adapter<T, cpu>& adapter;
  matrix_view<const T, cpu> dy;
  const ops::routed_slots<T, cpu>& kept;
  matrix_view<const T, cpu> dlogits_of_losses, dgates_of_losses;
  matrix_view<T, cpu> dgates, dlogits, du;
  const row_function& select;

  void run(index first, index rows, int thread) const;
};

template <class T>
void routed_backward<T>::run(index first, index rows, int thread) const {
  const index experts = adapter.experts(), ranks = adapter.ranks();
  const index block = routed_block_rows<T>(dy.cols), end = first + rows;
  const segments<cpu>& s = kept.slots;
  const auto add = [&](matrix_view<const T, cpu> from, matrix_view<T, cpu> to, index n) {
    if (from.empty()) return;
    for (index e = 0; e < experts; ++e) to(n, e) += from(n, e);
  };
  for (; first < end; first += block) {
    const index last = std::min(first + block, end);
    for (index n = first; n < last; ++n) std::fill_n(dgates.row(n), experts, T{0});
    for (index e = 0; e < experts; ++e) {
      const slot_range slots = inner_of_expert<T>(s, e, first, last, dy, adapter.b, du);
      for (index slot = slots.first; slot < slots.last; ++slot) {
        dgates(s.token_of_slot[slot], e) = gate_backward<T>(adapter.scale, kept.gates[slot],
                                                            kept.u.row(slot), ranks, du.row(slot));
      }
    }
    for (index n = first; n < last; ++n) add(dgates_of_losses, dgates, n);
    select(first, last - first, thread);
    for (index n = first; n < last; ++n) add(dlogits_of_losses, dlogits, n);
  }
}

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct routed_linear_impl<cpu> {
  template <class T>
  static bool pays(const context<cpu>& ctx, const packed_matrix<T, cpu>& base, index tokens,
                   index experts) {
    return !ctx.checked && base.cols() > 0 && detail::inner_pays(tokens, experts, base.rows());
  }

  template <class T, class Selector>
  static void forward(context<cpu>& ctx, const Selector& selector,
                      const routed_adapter<T, cpu>& adapter, const packed_product<T, cpu>& base,
                      vector_view<const std::uint8_t, cpu> padding_mask,
                      const routed_choice<T, cpu>& routed, matrix_view<T, cpu> u,
                      matrix_view<T, cpu> y, const routed_dropout<cpu>& dropped) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const detail::row_groups<T> groups(ctx, matrix_view<const T, cpu>(routed.logits), routed.gates);
    const auto select = [&](index first, index rows, int thread) {
      select_impl<cpu>::select_rows<T>(groups, selector, routed.logits, padding_mask, routed.gates,
                                       routed.mask, routed.more, first, rows, thread);
    };
    const detail::row_function rows_select(select);
    const detail::routed_forward<T> task(ctx, adapter, base.a, routed, u, rows_select, dropped);
    const auto run = [&](index first, index rows, int thread) { task.run(first, rows, thread); };
    detail::product_and_sum<T>(ctx, base, task.terms, {adapter.b}, y, false,
                               detail::row_function(run));
  }

  template <class T>
  static void rows_of_slots(context<cpu>& ctx, const segments<cpu>& s, index most,
                            matrix_view<const T, cpu> u, matrix_view<T, cpu> out) {
    const auto threads = detail::threads_from(ctx, s.tokens(), detail::terms_threaded_rows);
    detail::parallel_for_blocks(threads, s.tokens(), 256, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        const index begin = s.slot_offset_of_token[n];
        for (index i = begin; i < s.slot_offset_of_token[n + 1]; ++i) {
          std::copy_n(u.row(n * most + i - begin), u.cols, out.row(s.slot_of_token[i]));
        }
      }
    });
  }

  template <class T, class Selector>
  static void backward(context<cpu>& ctx, const Selector& selector,
                       const routed_adapter<T, cpu>& adapter, const packed_product<T, cpu>& base,
                       const routed_choice<const T, cpu>& routed, const routed_slots<T, cpu>& kept,
                       matrix_view<const T, cpu> dlogits_of_losses,
                       matrix_view<const T, cpu> dgates_of_losses, matrix_view<T, cpu> dgates,
                       matrix_view<T, cpu> dlogits, matrix_view<T, cpu> du, matrix_view<T, cpu> dx,
                       grad_mode dx_mode) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const detail::row_groups<T> groups(ctx, routed.logits, dlogits);
    const auto select = [&](index first, index rows, int thread) {
      select_impl<cpu>::select_backward_rows<T>(groups, selector, routed.logits, routed.gates,
                                                routed.mask, dgates, dlogits, routed.more, {},
                                                first, rows, thread);
    };
    const detail::row_function rows_select(select);
    const detail::routed_backward<T> task{adapter,          base.a, kept,    dlogits_of_losses,
                                          dgates_of_losses, dgates, dlogits, du,
                                          rows_select};
    const auto run = [&](index first, index rows, int thread) { task.run(first, rows, thread); };
    const detail::token_terms<T> terms(ctx, kept.slots, du, dlogits);
    detail::product_and_sum<T>(ctx, base, terms, {adapter.a, adapter.router, kept.dropout}, dx,
                               dx_mode == grad_mode::accumulate, detail::row_function(run));
  }
};

}  // namespace talpa::ops
