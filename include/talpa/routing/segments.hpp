// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/ops/segments.hpp>
#include <talpa/routing/routing.hpp>

#include <type_traits>

namespace talpa {

/// A routing in expert-major form: its slots and the gate of each.
template <class T, backend B>
struct segmented_routing {
  segments<B> slots;
  vector_view<T, B> gate_of_slot;  // [S]
};

/// Makes the expert-major form of a routing in ctx.memory with room for `capacity` slots, at least
/// as many as there are: N * max_selected always is.
///
/// Cost: as ops::build_segments; no synchronisation.
/// Throws: shape_error, value_error.
template <class T, class B>
segmented_routing<T, B> make_segmented(context<B>& ctx,
                                       const std::type_identity_t<routing_view<const T, B>>& from,
                                       index capacity) {
  check_at_least("make_segmented", "capacity", capacity, 0, "places for slots");
  segmented_routing<T, B> s;
  s.slots = make_segments(ctx.memory, from.tokens(), from.experts(), capacity);
  s.gate_of_slot = ctx.memory.template take<T>(capacity);
  ops::build_segments(ctx, from.mask, from.gates, s.slots, s.gate_of_slot);
  return s;
}

/// The same with room for exactly the slots there are. Their number comes to the host, so a device
/// backend synchronises.
template <class T, class B>
segmented_routing<T, B> make_segmented(context<B>& ctx,
                                       const std::type_identity_t<routing_view<const T, B>>& from) {
  return make_segmented<T>(ctx, from, ops::count_slots(ctx, from.mask, from.experts()));
}

}  // namespace talpa
