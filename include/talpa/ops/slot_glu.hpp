// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/ops/activation.hpp>
#include <talpa/ops/segments.hpp>

namespace talpa::ops {

template <class B>
struct slot_glu_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::slot_glu has no implementation for this backend here, include "
                "talpa/cuda/slot_glu.hpp for gpu (docs/architecture.md)");
};

/// Gated linear unit of each slot with its gate: z_s = g_s f(a_s) b_s, SwiGLU's with f = silu, in
/// float and rounded once.
///
/// Backward: see slot_glu_backward.
/// Shapes: ab [S, 2 H] = [a, b], gates [S], z [S, H], S the capacity of `s`.
/// Edges: places beyond offsets[E] are neither read nor written.
/// Cost: reads 2 S H, writes S H numbers.
/// Determinism: the same bits on every run.
/// Throws: shape_error.
template <activation_function F, class B, storage_scalar S>
void slot_glu(context<B>& ctx, const F& f, const segments<B>& s, matrix_view<const S, B> ab,
              vector_input<float, B> gates, matrix_view<S, B> z) {
  check_shape("ops::slot_glu", "ab", ab, s.capacity(), 2 * z.cols,
              "places for slots, a and b of the width of z");
  check_size("ops::slot_glu", "gates", gates, s.capacity(), "places for slots");
  check_shape("ops::slot_glu", "z", z, s.capacity(), z.cols, "places for slots, any width");
  slot_glu_impl<B>::forward(ctx, f, s, ab, gates, z);
}

/// Gradient of slot_glu, with h = f(a) b: overwrites dgates_s = <dz_s, h_s>, da = g dz b f'(a) and
/// db = g dz f(a); z once more takes the place of dz if `recompute`.
///
/// Shapes: ab and dab [S, 2 H], gates and dgates [S], dz [S, H]; dab may be the same view as ab.
/// Edges: places beyond offsets[E] are neither read nor written.
/// Cost: one launch; reads 3 S H, writes 2 S H numbers, 3 S H with z.
/// Determinism: the same bits on every run; a sum of H terms has a fixed order.
/// Throws: shape_error.
template <activation_function F, class B, storage_scalar S>
void slot_glu_backward(context<B>& ctx, const F& f, const segments<B>& s,
                       matrix_view<const S, B> ab, vector_input<float, B> gates,
                       matrix_view<S, B> dz, bool recompute, vector_view<float, B> dgates,
                       matrix_view<S, B> dab) {
  check_shape("ops::slot_glu_backward", "ab", ab, s.capacity(), 2 * dz.cols,
              "places for slots, a and b of the width of dz");
  check_size("ops::slot_glu_backward", "gates", gates, s.capacity(), "places for slots");
  check_shape("ops::slot_glu_backward", "dz", dz, s.capacity(), dz.cols,
              "places for slots, any width");
  check_size("ops::slot_glu_backward", "dgates", dgates, s.capacity(), "places for slots");
  check_shape("ops::slot_glu_backward", "dab", dab, ab.rows, ab.cols, "shape of ab");
  slot_glu_impl<B>::backward(ctx, f, s, ab, gates, dz, recompute, dgates, dab);
}

}  // namespace talpa::ops
