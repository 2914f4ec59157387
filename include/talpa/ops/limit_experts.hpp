// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/scalar.hpp>

#include <cstdint>

namespace talpa {

/// Which tokens an expert keeps when more ask for it than it may take.
enum class limit_order {
  position,  ///< the earliest
  score,     ///< those with the largest score, ties to the earlier
};

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct limit_experts_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::limit_experts has no implementation for this backend here, include "
                "talpa/cpu/limit_experts.hpp for cpu, talpa/cuda/limit_experts.hpp for gpu "
                "(docs/architecture.md)");
};

/// Takes bits out of a mask until no expert has more tokens of a sequence than it may take.
///
/// Forward: in each sequence every expert keeps the first limit(T) of the tokens whose bit is set,
/// in the given order; T is the number of tokens of the sequence that take part.
/// Backward: none; a mask is a constant.
/// Shapes: scores [N, E], padding_mask [N] or empty, mask [N, ceil(E / 32)], changed in place;
/// sequence_length divides N, 0 for one sequence. `limit` maps index to index and is called on the
/// backend.
/// Edges: padding, and a token with NaN among its scores, take no part: they fill no place and keep
/// their bits. A limit of zero or less keeps nothing.
/// Cost: two passes over mask and scores and a selection in O(T) an expert.
/// Determinism: comparisons only; the same for any number of threads.
/// Throws: shape_error; value_error for sequence_length.
template <class B, class Limit, floating T>
void limit_experts(context<B>& ctx, matrix_view<const T, B> scores,
                   vector_input<std::uint8_t, B> padding_mask, index sequence_length,
                   const Limit& limit, limit_order order, output<std::uint32_t, B> mask) {
  constexpr const char* function = "ops::limit_experts";
  check_shape(function, "mask", mask, scores.rows, mask_words(scores.cols),
              "tokens, mask words of the experts");
  if (!padding_mask.empty()) {
    check_size(function, "padding_mask", padding_mask, scores.rows, "one flag a token");
  }
  check_sequence_length(function, sequence_length, scores.rows);
  if (scores.empty()) return;
  limit_experts_impl<B>::run(ctx, scores, padding_mask,
                             sequence_length == 0 ? scores.rows : sequence_length, limit, order,
                             mask);
}

}  // namespace talpa::ops
