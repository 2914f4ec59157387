// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/row_run.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/ops/gemm.hpp>

#include <span>

namespace talpa::ops {

template <class B>
struct ragged_gemm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::ragged_gemm has no implementation for this backend here, include "
                "talpa/cpu/ragged_gemm.hpp for cpu, talpa/cuda/ragged_gemm.hpp for gpu "
                "(docs/architecture.md)");
};

/// grouped_gemm of a bank whose blocks have different numbers of rows.
///
/// Forward, for the slots s of group e and the P_e bank rows [blocks[e], blocks[e + 1]), block_e:
///   transpose::yes: c_s[0, P_e) = a_s block_e^T, a [S, Q], c [S, P];
///   transpose::no:  c_s = a_s[0, P_e) block_e,   a [S, P], c [S, Q].
/// `c_mode` says whether c is overwritten or added to.
/// Shapes: offsets and blocks [E + 1], ascending from 0 to S and to the rows of the bank; P at
/// least the largest P_e. What lies beyond P_e in a row is neither read nor written.
/// Edges: groups without slots are legal. Cost: 2 Q sum over slots of P_e flop.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void ragged_gemm(context<B>& ctx, vector_input<index, B> offsets, vector_input<index, B> blocks,
                 input<T, B> a, input<T, B> bank, transpose tb, matrix_view<T, B> c,
                 grad_mode c_mode = grad_mode::overwrite) {
  if (c_mode == grad_mode::ignore) return;
  check_size("ops::ragged_gemm", "blocks", blocks, offsets.size, "size of offsets");
  check_shape("ops::ragged_gemm", "a", a, a.rows, tb == transpose::yes ? bank.cols : a.cols,
              "slots, inner size of the bank's blocks");
  check_shape("ops::ragged_gemm", "c", c, a.rows, tb == transpose::yes ? c.cols : bank.cols,
              "slots, outer size of the bank's blocks");
  ragged_gemm_impl<B>::product(ctx, offsets, blocks, a, bank, tb, c, c_mode);
}

/// Gradient of the bank: adds a_e[0, P_e)^T b_e, the sum over the slots of group e, to the rows of
/// its block, for the rows in `runs` only, which may be any.
///
/// Shapes: a [S, P], b [S, Q], dbank [trained rows, Q].
/// Edges: a group without slots adds nothing. Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void ragged_gemm_gradient(context<B>& ctx, vector_input<index, B> offsets,
                          vector_input<index, B> blocks, input<T, B> a, input<T, B> b,
                          std::span<const row_run> runs, matrix_view<T, B> dbank) {
  check_size("ops::ragged_gemm_gradient", "blocks", blocks, offsets.size, "size of offsets");
  check_shape("ops::ragged_gemm_gradient", "b", b, a.rows, dbank.cols,
              "slots of a, columns of dbank");
  ragged_gemm_impl<B>::gradient(ctx, offsets, blocks, a, b, runs, dbank);
}

}  // namespace talpa::ops
