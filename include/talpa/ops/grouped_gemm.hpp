// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/row_run.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/ops/gemm.hpp>

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

}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct grouped_gemm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::grouped_gemm has no implementation for this backend here, include "
                "talpa/cpu/grouped_gemm.hpp for cpu (docs/architecture.md)");
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

}  // namespace talpa::ops
