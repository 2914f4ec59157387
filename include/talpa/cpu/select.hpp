// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/cpu/token_pack.hpp>
#include <talpa/ops/select.hpp>

#include <algorithm>
#include <cstdint>

namespace talpa::detail {

/// Tokens that run side by side: one vector register of values, 1 where there are none.
template <class T>
inline constexpr int packed_tokens = pack_bytes == 0 ? 1 : pack_bytes / static_cast<int>(sizeof(T));

/// Up to this many experts tokens are packed; beyond, the arrays of a pack leave the first cache.
inline constexpr index packed_experts = 256;

/// Groups that run rows in any thread of a context: packs of tokens, or each token by itself. Their
/// memory is scratch of whoever makes them.
template <class T>
class row_groups {
 public:
  static constexpr int width = packed_tokens<T>;

  /// A row begins by reading the rows `read` [N, E] and ends by writing the rows `written` [N, E];
  /// views without data where it does not.
  row_groups(context<cpu>& ctx, matrix_view<const T, cpu> read, matrix_view<T, cpu> written)
      : read_(read),
        written_(written),
        packed_(width > 1 && read.cols <= packed_experts),
        bytes_(lane_scratch::bytes_for(read.cols, packed_ ? width : 1)),
        scratch_(ctx.scratch.take<std::byte>(static_cast<index>(bytes_) * ctx.threads).data) {}

  /// row(group, n, count) for rows n, ..., n + count - 1 of [first, first + rows), on `thread`.
  template <class Row>
  void run(index first, index rows, int thread, Row row) const {
    lane_scratch lanes(scratch_ + static_cast<std::size_t>(thread) * bytes_, bytes_);
    if constexpr (width > 1) {
      for (index r = 0; packed_ && r < rows; r += width) {
        lanes.reset();
        const int valid = static_cast<int>(rows - r < width ? rows - r : width);
        const index n = first + r;
        row(token_pack<width>(read_.cols, valid, &lanes, upcoming_rows::of<width>(read_, n + width),
                              upcoming_rows::of<width>(written_, n)),
            n, valid);
      }
    }
    for (index r = 0; !packed_ && r < rows; ++r) {
      lanes.reset();
      row(serial(read_.cols, &lanes), first + r, 1);
    }
  }

 private:
  matrix_view<const T, cpu> read_;
  matrix_view<T, cpu> written_;
  bool packed_;
  std::size_t bytes_;
  std::byte* scratch_;
};

/// Rows of one task.
template <class T>
inline constexpr index selected_task_rows = 64 * packed_tokens<T>;

/// Calls row(group, first, count) for every row or pack of rows, on the group that suits E. `read`
/// and `written` as for row_groups.
template <class T, class Row>
void for_each_selected_row(context<cpu>& ctx, matrix_view<const T, cpu> read,
                           matrix_view<T, cpu> written, Row row) {
  const workspace<cpu>::scope scope(ctx.scratch);
  const row_groups<T> groups(ctx, read, written);
  parallel_for_blocks(
      ctx, read.rows, selected_task_rows<T>,
      [&](index first, index rows, int thread) { groups.run(first, rows, thread, row); });
}
template <class T, class Row>
void for_each_selected_row(context<cpu>& ctx, index tokens, index experts, Row row) {
  for_each_selected_row<T>(ctx, {nullptr, tokens, experts, 0}, {nullptr, tokens, experts, 0}, row);
}

template <class T>
row_pointer<T> row_at(matrix_view<T, cpu> view, index row) {
  return {view.row(row), view.stride};
}
/// The number of a token in a column [N, 1]; no data where there is no column.
template <class T>
row_scalar<T> scalar_at(matrix_view<T, cpu> column, index row) {
  return {column.data == nullptr ? nullptr : column.row(row), column.stride};
}

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct select_impl<cpu> {
  template <class T, class Selector>
  static void select(context<cpu>& ctx, const Selector& selector, matrix_view<const T, cpu> logits,
                     vector_view<const std::uint8_t, cpu> padding_mask, matrix_view<T, cpu> gates,
                     matrix_view<std::uint32_t, cpu> mask, const select_inputs<T, cpu>& more) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const detail::row_groups<T> groups(ctx, logits, gates);
    detail::parallel_for_blocks(ctx, logits.rows, detail::selected_task_rows<T>,
                                [&](index first, index rows, int thread) {
                                  select_rows<T>(groups, selector, logits, padding_mask, gates,
                                                 mask, more, first, rows, thread);
                                });
  }
  /// The same for some rows on one thread. Not inlined: rows of selectors are instantiated once.
  template <class T, class Selector>
  [[gnu::noinline]] static void select_rows(
      const detail::row_groups<T>& groups, const Selector& selector,
      matrix_view<const T, cpu> logits, vector_view<const std::uint8_t, cpu> padding_mask,
      matrix_view<T, cpu> gates, matrix_view<std::uint32_t, cpu> mask,
      const select_inputs<T, cpu>& more, index first_row, index count, int thread) {
    groups.run(first_row, count, thread, [&](const auto& group, index first, int rows) {
      selector.select(group, row_of<T>(logits, gates, mask, more, first));
      clear_padding(padding_mask, first, rows, gates, mask);
    });
  }

  template <class T, class Selector>
  static void replay(context<cpu>& ctx, const Selector& selector, matrix_view<const T, cpu> logits,
                     vector_view<const std::uint8_t, cpu> padding_mask,
                     matrix_view<std::uint32_t, cpu> mask, matrix_view<T, cpu> gates,
                     const select_inputs<T, cpu>& more) {
    detail::for_each_selected_row<T>(
        ctx, logits, gates, [&](const auto& group, index first, int rows) {
          selector.replay(group, row_of<T>(logits, gates, mask, more, first));
          clear_padding(padding_mask, first, rows, gates, mask);
        });
  }

  template <class T, class Selector>
  static void select_backward(context<cpu>& ctx, const Selector& selector,
                              matrix_view<const T, cpu> logits, matrix_view<const T, cpu> gates,
                              matrix_view<const std::uint32_t, cpu> mask,
                              matrix_view<const T, cpu> dgates, matrix_view<T, cpu> dlogits,
                              const select_inputs<T, cpu>& more, matrix_view<T, cpu> dcontrol) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const detail::row_groups<T> groups(ctx, logits, dlogits);
    detail::parallel_for_blocks(
        ctx, logits.rows, detail::selected_task_rows<T>, [&](index first, index rows, int thread) {
          select_backward_rows<T>(groups, selector, logits, gates, mask, dgates, dlogits, more,
                                  dcontrol, first, rows, thread);
        });
  }
  /// As select_rows is to select.
  template <class T, class Selector>
  [[gnu::noinline]] static void select_backward_rows(
      const detail::row_groups<T>& groups, const Selector& selector,
      matrix_view<const T, cpu> logits, matrix_view<const T, cpu> gates,
      matrix_view<const std::uint32_t, cpu> mask, matrix_view<const T, cpu> dgates,
      matrix_view<T, cpu> dlogits, const select_inputs<T, cpu>& more, matrix_view<T, cpu> dcontrol,
      index first_row, index count, int thread) {
    groups.run(first_row, count, thread, [&](const auto& group, index first, int rows) {
      selector.select_backward(
          group, select_gradient_row<T>{detail::row_at(logits, first), detail::row_at(gates, first),
                                        detail::row_at(mask, first), detail::row_at(dgates, first),
                                        detail::row_at(dlogits, first), bias_of(more),
                                        detail::scalar_at(more.control, first),
                                        detail::scalar_at(dcontrol, first)});
      for (index n = first; n < first + rows; ++n) {
        if (any_bit(mask.row(n), mask.cols)) continue;
        std::fill_n(dlogits.row(n), dlogits.cols, T{});
        if (!dcontrol.empty()) dcontrol(n, 0) = T{};
      }
    });
  }

  template <class T>
  static void check_logits(const char* function, matrix_view<const T, cpu> logits,
                           vector_view<const std::uint8_t, cpu> padding_mask) {
    detail::check_logit_rows<T>(function, logits, padding_mask);
  }

 private:
  template <class T>
  static select_row<T> row_of(matrix_view<const T, cpu> logits, matrix_view<T, cpu> gates,
                              matrix_view<std::uint32_t, cpu> mask,
                              const select_inputs<T, cpu>& more, index first) {
    return {detail::row_at(logits, first), detail::row_at(gates, first),
            detail::row_at(mask, first), bias_of(more), detail::scalar_at(more.control, first)};
  }
  /// Stride 0: every token of a pack reads the same row.
  template <class T>
  static row_pointer<const T> bias_of(const select_inputs<T, cpu>& more) {
    return {more.bias.data, 0};
  }
  static bool any_bit(const std::uint32_t* words, index count) {
    std::uint32_t any = 0;
    for (index w = 0; w < count; ++w) any |= words[w];
    return any != 0;
  }
  template <class T>
  static void clear_padding(vector_view<const std::uint8_t, cpu> padding_mask, index first,
                            int rows, matrix_view<T, cpu> gates,
                            matrix_view<std::uint32_t, cpu> mask) {
    if (padding_mask.empty()) return;
    for (index n = first; n < first + rows; ++n) {
      if (padding_mask[n] != 0) continue;
      std::fill_n(gates.row(n), gates.cols, T{});
      std::fill_n(mask.row(n), mask.cols, 0u);
    }
  }
};

}  // namespace talpa::ops
