// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/routing_sums.hpp>
#include <talpa/cpu/select.hpp>
#include <talpa/ops/route.hpp>

#include <cstdint>

namespace talpa::ops {

/// The selector's rows first: sums read them from the cache.
template <>
struct route_impl<cpu> {
  template <class T, class Selector>
  static void route(context<cpu>& ctx, const Selector& selector, matrix_view<const T, cpu> logits,
                    vector_view<const std::uint8_t, cpu> padding_mask, matrix_view<T, cpu> gates,
                    matrix_view<std::uint32_t, cpu> mask, const wanted_totals<T, cpu>& totals,
                    const select_inputs<T, cpu>& more) {
    if constexpr (coupled_selector<Selector>) {
      select_impl<cpu>::replay<T>(ctx, selector, logits, padding_mask, mask, gates, more);
    } else {
      select_impl<cpu>::select<T>(ctx, selector, logits, padding_mask, gates, mask, more);
    }
    routing_sums_impl<cpu>::forward<T>(ctx, {logits, gates, mask, padding_mask, totals.group_rows},
                                       totals.out, totals.mode, no_row_term{});
  }
};

}  // namespace talpa::ops
