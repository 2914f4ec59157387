// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/row_run.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/ops/packed_gemm.hpp>
#include <talpa/ops/segments.hpp>

#include <span>
#include <string>
#include <type_traits>

// Products of slots with the block of their expert in a stacked bank, in which rows of tokens are
// read and written where they lie, by index: no copies of rows, no [N, E P].

namespace talpa {

/// The product d w of rows [N, P] and few rows [P, Q] that somebody will form; none without rows.
template <class T, class B>
struct low_rank_product {
  matrix_view<const T, B> d;
  matrix_view<const T, B> w;
};

/// A function that returns none.
template <class T, class B>
struct no_more {
  low_rank_product<T, B> operator()() const { return {}; }
};

namespace detail {

/// Shapes of u [S, P] over slots and a bank [E P, Q].
template <class T, class B>
void check_indexed(const char* function, const segments<B>& s, const char* name,
                   const matrix_view<const T, B>& u, const matrix_view<const T, B>& bank) {
  check_shape(function, name, u, s.capacity(), u.cols, "places for slots, ranks of an expert");
  if (bank.rows != s.experts() * u.cols) {
    throw_shape(function, "bank", shape_text(bank.rows, bank.cols),
                concat("[", std::to_string(s.experts() * u.cols), ", ...]"),
                "ranks of all experts");
  }
}

/// Those of indexed_expand.
template <class T, class B>
void check_expand(const segments<B>& s, const matrix_view<const T, B>& z,
                  const matrix_view<const T, B>& bank, const matrix_view<T, B>& y) {
  check_indexed<T, B>("ops::indexed_expand", s, "z", z, bank);
  check_shape("ops::indexed_expand", "y", y, s.tokens(), bank.cols, "tokens, columns of bank");
}

}  // namespace detail

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct indexed_gemm_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::indexed_shrink, indexed_expand and indexed_gradient have no "
                "implementation for this backend here, include talpa/cpu/indexed_gemm.hpp for cpu, "
                "talpa/cuda/indexed_gemm.hpp for gpu (docs/architecture.md)");
};

/// From width to ranks: u[s, r] = <x[n], bank[e P + r]> for each slot s of token n and expert e.
///
/// Backward: indexed_expand of du with the same bank for x, indexed_gradient of du and x for the
/// bank.
/// Shapes: x [N, Q], bank [E P, Q], u [S, P] with S the capacity of `slots`; views may be strided.
/// Edges: experts without slots; rows of u beyond offsets[E] are left as they were.
/// Cost: 2 P Q flop a slot.
/// Determinism: the same bits for any number of threads; a row of u depends on its own row of x
/// and block of the bank only.
/// Throws: shape_error.
/// Source: "shrink" of Punica (arXiv 2310.18547).
template <class B, floating T>
void indexed_shrink(context<B>& ctx, const segments<B>& slots, input<T, B> x, input<T, B> bank,
                    matrix_view<T, B> u) {
  detail::check_indexed<T, B>("ops::indexed_shrink", slots, "u", u, bank);
  check_shape("ops::indexed_shrink", "x", x, slots.tokens(), bank.cols, "tokens, columns of bank");
  indexed_gemm_impl<B>::shrink(ctx, slots, x, bank, u);
}

/// From ranks to width: y[n] (+)= the sum over the slots s of token n, by ascending expert e, of
/// sum_r z[s, r] bank[e P + r].
///
/// Backward: indexed_shrink of dy with the same bank for z, indexed_gradient of z and dy for the
/// bank.
/// Shapes: z [S, P] with S the capacity of `slots`, bank [E P, Q], y [N, Q]; views may be strided.
/// Edges: a token without slots gets zero or, when y_mode adds, nothing. On a device a token with
/// slots beyond the capacity gets NaN: the host cannot know without waiting.
/// Cost: 2 P Q flop a slot, one pass over y; with many slots a copy of the bank in scratch.
/// Determinism: the same bits for any number of threads; a row of y depends on its own slots only.
/// Throws: shape_error.
/// Source: "expand" of Punica (arXiv 2310.18547).
template <class B, floating T>
void indexed_expand(context<B>& ctx, const segments<B>& slots, input<T, B> z, input<T, B> bank,
                    matrix_view<T, B> y, grad_mode y_mode) {
  if (y_mode == grad_mode::ignore) return;
  detail::check_expand<T, B>(slots, z, bank, y);
  indexed_gemm_impl<B>::expand(ctx, slots, z, bank, y, y_mode);
}
/// The same sums, of which `kept`, a mask of y, leaves a part.
template <class B, floating T>
requires has_dropout_bits<B>
void indexed_expand(context<B>& ctx, const segments<B>& slots, input<T, B> z, input<T, B> bank,
                    matrix_view<T, B> y, grad_mode y_mode, const dropout_bits<B>& kept) {
  if (y_mode == grad_mode::ignore) return;
  detail::check_expand<T, B>(slots, z, bank, y);
  detail::check_kept("ops::indexed_expand", kept, y.rows, y.cols);
  indexed_gemm_impl<B>::expand(ctx, slots, z, bank, y, y_mode, kept);
}

/// From ranks to width on top of a packed product, on the CPU: y[n] (+)= a[n] b + bias + what
/// `kept` leaves of the sum over the slots s of token n, by ascending expert e, of
/// sum_r z[s, r] bank[e P + r], + d[n] w of `more`.
///
/// Without more the same bits as gemm of a and b into y, add_bias and then indexed_expand with
/// grad_mode::accumulate, but rows of y are not written to memory in between.
/// Shapes: a [N, K], b [K, Q], bias [1, Q] or none, z [S, P] with S the capacity of `slots`, bank
/// [E P, Q], d [N, L], w [L, Q] with a small L, y [N, Q]; views may be strided. y overlaps none of
/// them.
/// Edges: a token without slots gets its row of a b + bias + d w.
/// Cost: 2 N (K + L) Q flop and 2 P Q a slot; a copy of bank and w in scratch.
/// Determinism: the same bits for any number of threads; a row of y depends on its own rows of a
/// and d and its slots only.
/// Throws: shape_error.
template <class B, floating T>
void indexed_expand(context<B>& ctx, const segments<B>& slots, input<T, B> z, input<T, B> bank,
                    const std::type_identity_t<packed_product<T, B>>& product, matrix_view<T, B> y,
                    grad_mode y_mode, const std::type_identity_t<low_rank_product<T, B>>& more = {},
                    const dropout_bits<B>& kept = {}) {
  if (y_mode == grad_mode::ignore) return;
  const char* const name = "ops::indexed_expand";
  detail::check_expand<T, B>(slots, z, bank, y);
  const packed_matrix<T, B>& b = *product.b;
  check_shape(name, "a", product.a, slots.tokens(), b.rows(), "tokens, rows of b");
  if (b.cols() != bank.cols) {
    detail::throw_shape(name, "b", detail::shape_text(b.rows(), b.cols()),
                        detail::concat("[..., ", std::to_string(bank.cols), "]"),
                        "columns of bank");
  }
  detail::check_product_bias(name, product);
  if (more.w.rows != 0) {
    check_shape(name, "d", more.d, slots.tokens(), more.w.rows, "tokens, rows of w");
    check_shape(name, "w", more.w, more.w.rows, bank.cols, "columns of d, columns of bank");
  }
  detail::check_kept(name, kept, y.rows, y.cols);
  indexed_gemm_impl<B>::expand(ctx, slots, z, bank, product, more, y, y_mode, kept);
}

/// Gradient of a bank: adds to row e P + r the sum over the slots s of expert e, in ascending order
/// of their tokens n, of z[s, r] x[n], for the rows in `runs` only.
///
/// Shapes: z [S, P] with S the capacity of `slots`, x [N, Q], dbank [trained rows, Q]; runs cover
/// whole blocks of P rows.
/// Edges: an expert without slots adds nothing.
/// Cost: 2 P Q flop a slot.
/// Determinism: the same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void indexed_gradient(context<B>& ctx, const segments<B>& slots, input<T, B> z, input<T, B> x,
                      std::span<const row_run> runs, matrix_view<T, B> dbank) {
  check_shape("ops::indexed_gradient", "z", z, slots.capacity(), z.cols,
              "places for slots, ranks of an expert");
  check_shape("ops::indexed_gradient", "x", x, slots.tokens(), dbank.cols,
              "tokens, columns of dbank");
  indexed_gemm_impl<B>::gradient(ctx, slots, z, x, runs, dbank);
}

}  // namespace talpa::ops
