// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/workspace.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>

namespace talpa {

/// Expert-major compressed form of a routing. A slot is one (token, expert) pair whose mask bit is
/// set; slots are numbered expert by expert and, within an expert, by ascending token.
///
/// The slots of expert e are offsets[e] .. offsets[e + 1] - 1; offsets[E] slots exist. The slots of
/// token n, by ascending expert, are slot_of_token[slot_offset_of_token[n] ..
/// slot_offset_of_token[n + 1] - 1]. The arrays over slots may be longer than offsets[E]: a plan
/// that must not wait for the routing gives them N * max_selected places.
template <backend B>
struct segments {
  vector_view<index, B> offsets;               // [E + 1]
  vector_view<std::int32_t, B> token_of_slot;  // [S]
  vector_view<index, B> slot_offset_of_token;  // [N + 1]
  vector_view<std::int32_t, B> slot_of_token;  // [S]

  TALPA_HD index experts() const { return offsets.size - 1; }
  TALPA_HD index tokens() const { return slot_offset_of_token.size - 1; }
  /// Places for slots; offsets[E] of them are in use.
  TALPA_HD index capacity() const { return token_of_slot.size; }
};

/// Bytes that make_segments takes from a workspace.
template <backend B>
constexpr std::size_t segments_bytes(index tokens, index experts, index capacity) {
  const auto bytes = [](index count, std::size_t size) {
    return workspace<B>::rounded(static_cast<std::size_t>(count) * size);
  };
  return bytes(experts + 1, sizeof(index)) + bytes(tokens + 1, sizeof(index)) +
         2 * bytes(capacity, sizeof(std::int32_t));
}

/// Uninitialised segments in `memory`.
template <backend B>
segments<B> make_segments(workspace<B>& memory, index tokens, index experts, index capacity) {
  segments<B> s;
  s.offsets = memory.template take<index>(experts + 1);
  s.token_of_slot = memory.template take<std::int32_t>(capacity);
  s.slot_offset_of_token = memory.template take<index>(tokens + 1);
  s.slot_of_token = memory.template take<std::int32_t>(capacity);
  return s;
}

namespace detail {
template <class B>
void check_segments(const char* function, const segments<B>& s,
                    const matrix_view<const std::uint32_t, B>& mask) {
  constexpr index limit = std::numeric_limits<std::int32_t>::max();
  check_range(function, "tokens", mask.rows, 0, limit, "tokens that fit 32 bits");
  check_range(function, "capacity", s.capacity(), 0, limit, "slots that fit 32 bits");
  check_size(function, "slot_offset_of_token", s.slot_offset_of_token, mask.rows + 1, "tokens + 1");
  check_size(function, "slot_of_token", s.slot_of_token, s.capacity(), "size of token_of_slot");
  if (mask_words(s.experts()) != mask.cols) {
    throw_shape(function, "mask", shape_text(mask.rows, mask.cols),
                shape_text(mask.rows, mask_words(s.experts())),
                "tokens, mask words of the experts");
  }
}
}  // namespace detail

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct segments_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::build_segments has no implementation for this backend here, include "
                "talpa/cpu/segments.hpp for cpu, talpa/cuda/segments.hpp for gpu "
                "(docs/architecture.md)");
};

/// Number of slots of a routing: the set bits of its mask among the first E of each row.
///
/// Shapes: mask [N, ceil(E / 32)].
/// Cost: reads the mask; the result is on the host, so a device backend synchronises. A plan that
/// must not do so bounds it by N * max_selected.
/// Throws: shape_error when the mask's width does not fit E.
template <class B>
index count_slots(context<B>& ctx, std::type_identity_t<matrix_view<const std::uint32_t, B>> mask,
                  index experts) {
  check_shape("ops::count_slots", "mask", mask, mask.rows, mask_words(experts),
              "tokens, mask words of the experts");
  return segments_impl<B>::count(ctx, mask, experts);
}

/// Sorts the slots of a routing by expert, stably, and reads the gate of each.
///
/// Forward: fills `s` as segments says; gate_of_slot[slot of (n, e)] = gates[n, e].
/// Backward: see build_segments_backward; the order is a constant.
/// Shapes: mask [N, ceil(E / 32)], gates [N, E], gate_of_slot [S] with S the capacity of `s`.
/// Edges: N == 0 gives E empty segments; places beyond offsets[E] are left as they were; bits of
/// the last word beyond E are ignored.
/// Cost: two passes over the mask, 24 bytes written a slot at most, no comparison sort.
/// Determinism: integers only; the same for any number of threads.
/// Throws: shape_error when shapes do not fit or the mask has more set bits than there are places;
/// the latter on a device in a checked context only, else what has no place is NaN where it is
/// used.
template <class B, floating T>
void build_segments(context<B>& ctx, input<std::uint32_t, B> mask, input<T, B> gates,
                    const segments<B>& s, vector_view<T, B> gate_of_slot) {
  detail::check_segments<B>("ops::build_segments", s, mask);
  check_shape("ops::build_segments", "gates", gates, mask.rows, s.experts(), "tokens, experts");
  check_size("ops::build_segments", "gate_of_slot", gate_of_slot, s.capacity(),
             "size of token_of_slot");
  segments_impl<B>::build(ctx, mask, gates, s, gate_of_slot);
}

/// Backward of build_segments: dgates[n, e] (+)= dgate_of_slot[slot of (n, e)].
///
/// Shapes: mask [N, ceil(E / 32)], dgate_of_slot [S], dgates [N, E].
/// Edges: overwrite leaves zero where a bit is off; accumulate leaves such elements alone.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error.
template <class B, floating T>
void build_segments_backward(context<B>& ctx, input<std::uint32_t, B> mask, const segments<B>& s,
                             vector_input<T, B> dgate_of_slot, matrix_view<T, B> dgates,
                             grad_mode mode) {
  detail::check_segments<B>("ops::build_segments_backward", s, mask);
  check_size("ops::build_segments_backward", "dgate_of_slot", dgate_of_slot, s.capacity(),
             "size of token_of_slot");
  check_shape("ops::build_segments_backward", "dgates", dgates, mask.rows, s.experts(),
              "tokens, experts");
  if (mode == grad_mode::ignore) return;
  segments_impl<B>::backward(ctx, mask, s, dgate_of_slot, dgates, mode);
}

}  // namespace talpa::ops
