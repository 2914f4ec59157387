// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/half.hpp>
#include <talpa/ops/routing_sums.hpp>
#include <talpa/ops/select.hpp>

namespace talpa {

/// What mole_route reads and writes.
template <class S, backend B>
struct mole_rows {
  matrix_view<const float, B> u;                    // [N, E R], A x
  matrix_view<const float, B> logits;               // [N, E]
  vector_view<const std::uint8_t, B> padding_mask;  // [N] or empty
  matrix_view<float, B> gates;                      // [N, E]
  matrix_view<std::uint32_t, B> mask;               // [N, ceil(E / 32)]
  matrix_view<S, B> z;                              // [N, >= E R]; what is beyond E R becomes zero
  index rank = 1;                                   // R
  float scale = 1.0f;
};

/// What mole_route_backward reads and writes beside the rows of forward.
template <class S, backend B>
struct mole_rows_gradient {
  matrix_view<const float, B> dz;              // [N, >= E R]
  matrix_view<const float, B> dgates_losses;   // [N, E] or empty, gradients of auxiliary losses
  matrix_view<const float, B> dlogits_losses;  // [N, E] or empty
  matrix_view<float, B> dgates;                // [N, E], scratch
  matrix_view<float, B> dlogits;               // [N, E]
  matrix_view<S, B> du;                        // [N, width + room for E]: [du, 0, dlogits, 0]
  index width = 0;                             // columns of du before those of dlogits, >= E R
};

}  // namespace talpa

namespace talpa::detail {
template <class Selector, class S, class B>
void check_mole_rows(const mole_rows<S, B>& in) {
  const index n = in.logits.rows, e = in.logits.cols;
  static_assert(
      !coupled_selector<Selector> && !controlled_selector<Selector> && !biased_selector<Selector>,
      "talpa: ops::mole_route takes selectors that read the logits of a token alone");
  check_at_least("ops::mole_route", "rank", in.rank, 1, "width of the adapter");
  check_shape("ops::mole_route", "u", in.u, n, e * in.rank, "tokens, experts times rank");
  check_shape("ops::mole_route", "gates", in.gates, n, e, "shape of logits");
  check_shape("ops::mole_route", "mask", in.mask, n, mask_words(e),
              "tokens, mask words of the experts");
  if (!in.padding_mask.empty()) {
    check_size("ops::mole_route", "padding_mask", in.padding_mask, n, "one flag a token");
  }
  if (in.z.rows != n || in.z.cols < in.u.cols) {
    throw_shape("ops::mole_route", "z", in.z.rows, in.z.cols, n, in.u.cols, "shape of u, or wider");
  }
}

template <class B, class Selector, class S>
void check_mole_route(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows) {
  selector.validate(rows.logits.cols);
  check_mole_rows<Selector>(rows);
  if (ctx.checked) {
    ops::select_impl<B>::template check_logits<float>(Selector::name, rows.logits,
                                                      rows.padding_mask);
  }
}
}  // namespace talpa::detail

namespace talpa::ops {

template <class B>
struct mole_route_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::mole_route has no implementation for this backend here, include "
                "talpa/cuda/mole_route.hpp for gpu (docs/architecture.md)");
};

/// Routes tokens and gates their adapters in rank space in one pass: (mask_n, gates_n) =
/// selector(logits_n), z_n = scale g_n * u_n, each gate over the R ranks of its expert.
///
/// Backward: see mole_route_backward.
/// Shapes: as mole_rows says.
/// Edges: padding gets neither gates, mask nor z; NaN gates of a row that cannot be routed make its
/// z NaN on the first max_selected experts.
/// Cost: one launch; reads logits and u, writes gates, mask and z.
/// Determinism: gates and mask have the bits of ops::select on every backend.
/// Throws: shape_error; value_error from the selector's validate.
template <class B, class Selector, storage_scalar S>
void mole_route(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows) {
  detail::check_mole_route(ctx, selector, rows);
  mole_route_impl<B>::forward(ctx, selector, rows);
}

/// The same, and the totals of the routing as ops::route leaves them, in the same launch.
///
/// Shapes: members of totals.out [G] or [G, E] with G = N / totals.group_rows groups.
/// Determinism: totals have the bits of ops::routing_sums on every backend.
/// Throws: also as ops::routing_sums.
template <class B, class Selector, storage_scalar S>
void mole_route(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows,
                const std::type_identity_t<wanted_totals<float, B>>& totals) {
  if (totals.mode == grad_mode::ignore) {
    mole_route(ctx, selector, rows);
    return;
  }
  detail::check_mole_route(ctx, selector, rows);
  detail::check_wanted("ops::mole_route", totals, rows.logits.rows, rows.logits.cols);
  mole_route_impl<B>::forward(ctx, selector, rows, totals);
}

/// Backward of mole_route in one pass: dg_e = scale sum_r dz_er u_er (+ that of losses), dlogits as
/// the selector says (+ that of losses), du_er = scale g_e dz_er.
///
/// Shapes: as mole_rows_gradient says.
/// Throws: shape_error.
template <class B, class Selector, storage_scalar S>
void mole_route_backward(context<B>& ctx, const Selector& selector, const mole_rows<S, B>& rows,
                         const mole_rows_gradient<S, B>& gradient) {
  constexpr const char* function = "ops::mole_route_backward";
  const index n = rows.logits.rows, e = rows.logits.cols;
  detail::check_mole_rows<Selector>(rows);
  if (gradient.dz.rows != n || gradient.dz.cols < rows.u.cols) {
    detail::throw_shape(function, "dz", gradient.dz.rows, gradient.dz.cols, n, rows.u.cols,
                        "shape of u, or wider");
  }
  check_range(function, "width", gradient.width, rows.u.cols, gradient.du.cols - e,
              "columns of u, or more, with room for the experts");
  check_shape(function, "du", gradient.du, n, gradient.du.cols, "one row a token");
  check_shape(function, "dgates", gradient.dgates, n, e, "shape of logits");
  check_shape(function, "dlogits", gradient.dlogits, n, e, "shape of logits");
  if (gradient.dgates_losses.data != nullptr) {
    check_shape(function, "dgates_losses", gradient.dgates_losses, n, e, "shape of logits");
  }
  if (gradient.dlogits_losses.data != nullptr) {
    check_shape(function, "dlogits_losses", gradient.dlogits_losses, n, e, "shape of logits");
  }
  mole_route_impl<B>::backward(ctx, selector, rows, gradient);
}

}  // namespace talpa::ops
