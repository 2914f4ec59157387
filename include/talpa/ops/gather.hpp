// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/half.hpp>
#include <talpa/ops/segments.hpp>

namespace talpa::ops {

template <class B>
struct gather_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::gather has no implementation for this backend here, include "
                "talpa/cpu/gather.hpp for cpu, talpa/cuda/gather.hpp for gpu "
                "(docs/architecture.md)");
};

/// Copies the row of its token into each slot.
///
/// Forward: y[s] = x[token_of_slot[s]] for s < offsets[E].
/// Backward: dx[n] (+)= sum of dy[s] over the slots of token n, which is combine.
/// Shapes: x [N, D], y [S, D] with S the capacity of `s`; rows of y beyond offsets[E] are left as
/// they were.
/// Cost: reads and writes S D elements.
/// Throws: shape_error.
template <class B, class T>
void gather(context<B>& ctx, const segments<B>& s, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::gather", "x", x, s.tokens(), x.cols, "tokens, any width");
  check_shape("ops::gather", "y", y, s.capacity(), x.cols, "places for slots, width of x");
  gather_impl<B>::gather(ctx, s, x, y);
}

/// Lets what adds up over all places for slots add zeros: y[s] = 0 for offsets[E] <= s < S.
///
/// Shapes: y [S, D] with S the capacity of `s`.
/// Edges: where the places end with the last slot, as on the CPU, there is nothing to do.
/// Cost: writes the unused rows.
/// Throws: shape_error.
template <class B, floating T>
void clear_unused(context<B>& ctx, const segments<B>& s, matrix_view<T, B> y) {
  check_shape("ops::clear_unused", "y", y, s.capacity(), y.cols, "places for slots, any width");
  gather_impl<B>::clear_unused(ctx, s, y);
}

/// Adds up the slots of each token.
///
/// Forward: y[n] (+)= sum of x[s] over the slots of token n by ascending expert; `mode` says
/// whether y is overwritten or added to.
/// Backward: dx[s] = dy[token_of_slot[s]], which is gather.
/// Shapes: x [S, D] with S the capacity of `s`, y [N, D].
/// Edges: a token without slots gets zero (overwrite) or keeps what it had (accumulate).
/// Halves are added up in float and rounded once, on a device.
/// Cost: reads S D, writes N D elements; no atomics.
/// Determinism: one fixed order of additions a token; same bits for any number of threads.
/// Throws: shape_error.
template <class B, storage_scalar T>
void combine(context<B>& ctx, const segments<B>& s, input<T, B> x, matrix_view<T, B> y,
             grad_mode mode) {
  check_shape("ops::combine", "x", x, s.capacity(), x.cols, "places for slots, any width");
  check_shape("ops::combine", "y", y, s.tokens(), x.cols, "tokens, width of x");
  if (mode == grad_mode::ignore) return;
  gather_impl<B>::combine(ctx, s, x, y, mode);
}

}  // namespace talpa::ops
