// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/index.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <cstdint>

namespace talpa::ops {

template <class B>
struct pair_gates_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::pair_gates has no implementation for this backend here, include "
                "talpa/cpu/pair_gates.hpp for cpu, talpa/cuda/pair_gates.hpp for gpu "
                "(docs/architecture.md)");
};

/// Gives what one routing chose the gates of another, rank by rank: the first choice of a token
/// gets the largest gate, the second the next.
///
/// Forward: with j_r the experts of mask in the order (logit descending, index ascending) and g_r
/// the gates where from_mask is set in the order (gate descending, index ascending): gates[n, j_r]
/// = g_r, and 0 for what is off or has no partner.
/// Backward: pair_gates_backward.
/// Shapes: logits, gates [N, M], mask [N, ceil(M / 32)], from [N, E], from_mask [N, ceil(E / 32)].
/// Edges: NaN gates are the last in order.
/// Cost: K (M + E) comparisons a token with K choices.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void pair_gates(context<B>& ctx, input<T, B> logits,
                std::type_identity_t<matrix_view<const std::uint32_t, B>> mask, input<T, B> from,
                std::type_identity_t<matrix_view<const std::uint32_t, B>> from_mask,
                matrix_view<T, B> gates) {
  check_shape("ops::pair_gates", "logits", logits, gates.rows, gates.cols, "shape of gates");
  check_shape("ops::pair_gates", "mask", mask, gates.rows, mask_words(gates.cols),
              "tokens, mask words of the choices");
  check_shape("ops::pair_gates", "from", from, gates.rows, from.cols, "tokens of gates");
  check_shape("ops::pair_gates", "from_mask", from_mask, from.rows, mask_words(from.cols),
              "tokens, mask words of the gates");
  pair_gates_impl<B>::forward(ctx, logits, mask, from, from_mask, gates);
}

/// Backward of pair_gates: dfrom at the partner of j_r += dgates[n, j_r]. Choices are constants.
///
/// Shapes: as pair_gates; dgates [N, M], dfrom [N, E] is added to.
/// Throws: shape_error.
template <class B, floating T>
void pair_gates_backward(context<B>& ctx, input<T, B> logits,
                         std::type_identity_t<matrix_view<const std::uint32_t, B>> mask,
                         input<T, B> from,
                         std::type_identity_t<matrix_view<const std::uint32_t, B>> from_mask,
                         input<T, B> dgates, matrix_view<T, B> dfrom) {
  check_shape("ops::pair_gates_backward", "dgates", dgates, logits.rows, logits.cols,
              "shape of logits");
  check_shape("ops::pair_gates_backward", "dfrom", dfrom, from.rows, from.cols, "shape of from");
  pair_gates_impl<B>::backward(ctx, logits, mask, from, from_mask, dgates, dfrom);
}

}  // namespace talpa::ops
