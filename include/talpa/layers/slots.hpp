// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/workspace.hpp>
#include <talpa/ops/segments.hpp>
#include <talpa/routing/routing.hpp>

#include <concepts>

namespace talpa {

/// The slots of a routing sorted by expert, with the gate of each.
template <class T, class B>
struct sorted_slots {
  segments<B> slots;
  vector_view<T, B> gates;  // [S]
};

/// Sorts the slots of a routing into ctx.memory. The places for `max_selected` slots a token are
/// taken whatever the routing, so that later steps need no new memory. The arrays over slots end
/// with the last one; but where they need not be `exact`, a device has them as long as there are
/// places, so that the host does not wait for it: rows behind slots.offsets[E] then hold anything.
template <class T, class B>
sorted_slots<T, B> sort_slots(context<B>& ctx, const routing_view<const T, B>& routing,
                              index max_selected, bool exact = true) {
  const index tokens = routing.tokens(), experts = routing.experts();
  const index capacity = tokens * max_selected;
  sorted_slots<T, B> s{make_segments(ctx.memory, tokens, experts, capacity),
                       ctx.memory.template take<T>(capacity)};
  if (exact || std::same_as<B, cpu>) {
    // A selector may break its word and choose more, which build_segments refuses.
    const index used = ops::count_slots(ctx, routing.mask, experts);
    s.slots.token_of_slot.size = s.slots.slot_of_token.size = s.gates.size =
        used < capacity ? used : capacity;
  }
  ops::build_segments(ctx, routing.mask, routing.gates, s.slots, s.gates);
  return s;
}

}  // namespace talpa
