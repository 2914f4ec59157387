// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>

#include <cstdint>

namespace talpa::ops {

template <class B>
struct assign_balanced_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::assign_balanced has no implementation for this backend here, include "
                "talpa/cpu/assign_balanced.hpp for cpu, talpa/cuda/assign_balanced.hpp for gpu "
                "(docs/architecture.md)");
};

/// Gives every token one expert so that no expert has more than its share and the scores add up to
/// the most that this allows.
///
/// Forward: among the assignments with at most ceil(T / E) tokens an expert, T the tokens that take
/// part, first as many tokens as possible get an expert, then the sum of scores[n, expert of n] is
/// largest. When E divides T and no score is -inf, every expert has exactly T / E.
/// Backward: none; the assignment is a constant.
/// Shapes: scores [N, E], padding_mask [N] or empty, mask [N, ceil(E / 32)]: the rows of tokens
/// that take part are overwritten.
/// Edges: padding and rows with NaN, +inf, or -inf everywhere take no part; their rows of the mask
/// stay as they are. A score of -inf is never chosen: a token whose experts have to be left to
/// others gets none.
/// Cost: one shortest path over the experts a token, by successive augmentation: O(N (N E + E^2))
/// at worst, O(N E) while places are free; on one thread.
/// Determinism: a fixed order of operations. Among assignments of equal sum the one that this order
/// finds; sums are formed in double, and are exact up to its rounding.
/// Throws: shape_error.
/// Source: successive shortest paths with potentials (Edmonds and Karp 1972; Jonker and Volgenant
/// 1987), with experts of more than one place.
template <class B, floating T>
void assign_balanced(context<B>& ctx, matrix_view<const T, B> scores,
                     vector_input<std::uint8_t, B> padding_mask, output<std::uint32_t, B> mask) {
  constexpr const char* function = "ops::assign_balanced";
  check_shape(function, "mask", mask, scores.rows, mask_words(scores.cols),
              "tokens, mask words of the experts");
  if (!padding_mask.empty()) {
    check_size(function, "padding_mask", padding_mask, scores.rows, "one flag a token");
  }
  if (scores.empty()) return;
  assign_balanced_impl<B>::template run<T>(ctx, scores, padding_mask, mask);
}

}  // namespace talpa::ops
