// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/ops/routing_sums.hpp>
#include <talpa/ops/select.hpp>

#include <cstdint>
#include <type_traits>

namespace talpa::ops {

template <class B>
struct route_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::route has no implementation for this backend here, include "
                "talpa/cpu/route.hpp for cpu, talpa/cuda/route.hpp for gpu "
                "(docs/architecture.md)");
};

/// Runs a selector over rows of logits and adds up what statistics and balance losses are made of:
/// select and routing_sums in one.
///
/// Forward: (mask_n, gates_n) = selector(logits_n) as in select; then totals.out as in routing_sums
/// without a row term, over groups of totals.group_rows tokens, overwritten or added to.
/// Shapes: logits, gates [N, E], mask [N, ceil(E / 32)], padding_mask [N] or empty; members of
/// totals.out [G] or [G, E] with G = N / totals.group_rows groups; `more` as in select.
/// Edges: those of select and routing_sums; grad_mode::ignore selects only.
/// Cost: one pass over the logits, on a device one launch behind the assignment of a selector that
/// couples rows; N E exponentials beside the selector's when a quantity of the logits is wanted.
/// Determinism: the bits of select and of routing_sums, on every backend.
/// Throws: as select and routing_sums.
template <class B, class Selector, floating T>
void route(context<B>& ctx, const Selector& selector, input<T, B> logits,
           vector_input<std::uint8_t, B> padding_mask, matrix_view<T, B> gates,
           output<std::uint32_t, B> mask, const std::type_identity_t<wanted_totals<T, B>>& totals,
           const std::type_identity_t<select_inputs<T, B>>& more = {}) {
  if (totals.mode == grad_mode::ignore) {
    ops::select(ctx, selector, logits, padding_mask, gates, mask, more);
    return;
  }
  detail::check_selection<T>(ctx, selector, logits, padding_mask, gates, mask, more);
  detail::check_wanted(Selector::name, totals, logits.rows, logits.cols);
  if constexpr (coupled_selector<Selector>) {
    selector.assign(ctx, assign_batch<T, B>{logits, padding_mask, more}, mask);
  }
  route_impl<B>::template route<T>(ctx, selector, logits, padding_mask, gates, mask, totals, more);
}

}  // namespace talpa::ops
