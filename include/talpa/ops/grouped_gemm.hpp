// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/row_run.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/ops/gemm.hpp>

#include <concepts>
#include <cstdint>
#include <span>

namespace talpa::detail {

template <class T, class B>
index group_rows(const char* function, const matrix_view<T, B>& bank, index groups) {
  if (groups < 1 || bank.rows % groups != 0) {
    throw_shape(function, "bank", shape_text(bank.rows, bank.cols),
                concat("[P * ", std::to_string(groups), ", Q]"), "rows of all groups");
  }
  return bank.rows / groups;
}

template <class B>
void check_rows_of_slots(const char* function, const vector_view<const std::int32_t, B>& rows,
                         index slots) {
  if (!rows.empty()) check_size(function, "row_of_slot", rows, slots, "one row a slot");
}

}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct grouped_gemm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::grouped_gemm has no implementation for this backend here, include "
                "talpa/cpu/grouped_gemm.hpp for cpu, talpa/cuda/grouped_gemm.hpp for gpu "
                "(docs/architecture.md)");
};

/// Product of each segment of slots with its group's block of a stacked bank.
///
/// Forward, for the slots s of group e, block_e = bank rows [e P, (e + 1) P):
///   transpose::yes: c_s = a_s block_e^T, a [S, Q], c [S, P];
///   transpose::no:  c_s = a_s block_e,   a [S, P], c [S, Q].
/// `c_mode` says whether c is overwritten or added to.
/// Backward of either is the other with c and a exchanged, and grouped_gemm_gradient for the bank.
/// Shapes: offsets [E + 1], ascending from 0 to S; bank [E P, Q].
/// Edges: groups without slots are legal; rows of c beyond offsets[E] are left as they were.
/// Cost: 2 S P Q flop. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void grouped_gemm(context<B>& ctx, vector_input<index, B> offsets, input<T, B> a, input<T, B> bank,
                  transpose tb, matrix_view<T, B> c, grad_mode c_mode = grad_mode::overwrite) {
  if (c_mode == grad_mode::ignore) return;
  const index rows = detail::group_rows("ops::grouped_gemm", bank, offsets.size - 1);
  check_shape("ops::grouped_gemm", "a", a, a.rows, tb == transpose::yes ? bank.cols : rows,
              "slots, inner size of the bank's blocks");
  check_shape("ops::grouped_gemm", "c", c, a.rows, tb == transpose::yes ? rows : bank.cols,
              "slots, outer size of the bank's blocks");
  grouped_gemm_impl<B>::product(ctx, offsets, a, bank, rows, tb, c, c_mode);
}

/// Gradient of a bank: adds a_e^T b_e, the sum over the slots of group e, to rows
/// [e P, (e + 1) P) of the bank's gradient, for the rows in `runs` only.
///
/// Shapes: a [S, P], b [S, Q], dbank [trained rows, Q]; runs cover whole blocks of P rows.
/// Edges: a group without slots adds nothing.
/// Cost: 2 S P Q flop. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void grouped_gemm_gradient(context<B>& ctx, vector_input<index, B> offsets, input<T, B> a,
                           input<T, B> b, std::span<const row_run> runs, matrix_view<T, B> dbank) {
  check_shape("ops::grouped_gemm_gradient", "b", b, a.rows, dbank.cols,
              "slots of a, columns of dbank");
  grouped_gemm_impl<B>::gradient(ctx, offsets, a, b, runs, dbank);
}

/// grouped_gemm of halves on tensor cores, with sums in float and one rounding to C at the end. The
/// rows of a may be those of tokens: slot s is then row row_of_slot[s] of a, and nothing is
/// gathered.
///
/// Forward, for the slots s of group e with a_s = a[s] or a[row_of_slot[s]]: as grouped_gemm.
/// Backward: the other of the two products, mixed_grouped_gemm_gradient for the bank.
/// Shapes: a [S, .] without row_of_slot, else [N, .]; row_of_slot [S] or empty; c [S, .]; C is S or
/// float. Rows that begin at multiples of 16 bytes are read fastest.
/// Edges, cost and determinism as grouped_gemm; the order of a sum depends on the shape.
/// Throws: shape_error.
/// On devices of compute capability 8.0 or more.
template <class B, half_storage S, class C>
requires(std::same_as<C, S> || std::same_as<C, float>) void mixed_grouped_gemm(
    context<B>& ctx, vector_input<index, B> offsets, matrix_view<const S, B> a,
    vector_input<std::int32_t, B> row_of_slot, matrix_view<const S, B> bank, transpose tb,
    matrix_view<C, B> c, grad_mode c_mode = grad_mode::overwrite) {
  if (c_mode == grad_mode::ignore) return;
  const index rows = detail::group_rows("ops::mixed_grouped_gemm", bank, offsets.size - 1);
  detail::check_rows_of_slots("ops::mixed_grouped_gemm", row_of_slot, c.rows);
  check_shape("ops::mixed_grouped_gemm", "a", a, row_of_slot.empty() ? c.rows : a.rows,
              tb == transpose::yes ? bank.cols : rows, "slots, inner size of the bank's blocks");
  check_shape("ops::mixed_grouped_gemm", "c", c, c.rows, tb == transpose::yes ? rows : bank.cols,
              "slots, outer size of the bank's blocks");
  grouped_gemm_impl<B>::mixed(ctx, offsets, a, row_of_slot, bank, rows, tb, c, c_mode);
}

/// Gradient of a bank of halves, in float: adds a_e^T b_e to rows [e P, (e + 1) P) of the bank's
/// gradient, for the rows in `runs` only. Slot s is row s of a, and row s or row_of_slot[s] of b.
///
/// Shapes: a [S, P], b [S, Q] without row_of_slot, else [N, Q], dbank [trained rows, Q]; runs cover
/// whole blocks of P rows.
/// Edges, cost and determinism as grouped_gemm_gradient.
/// Throws: shape_error.
template <class B, half_storage S>
void mixed_grouped_gemm_gradient(context<B>& ctx, vector_input<index, B> offsets,
                                 matrix_view<const S, B> a, matrix_view<const S, B> b,
                                 vector_input<std::int32_t, B> row_of_slot,
                                 std::span<const row_run> runs, matrix_view<float, B> dbank) {
  detail::check_rows_of_slots("ops::mixed_grouped_gemm_gradient", row_of_slot, a.rows);
  check_shape("ops::mixed_grouped_gemm_gradient", "b", b, row_of_slot.empty() ? a.rows : b.rows,
              dbank.cols, "slots of a, columns of dbank");
  grouped_gemm_impl<B>::mixed_gradient(ctx, offsets, a, b, row_of_slot, runs, dbank);
}

}  // namespace talpa::ops
