// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "device.hpp"
#include "support/random.hpp"

#include <talpa/core/transfer.hpp>
#include <talpa/cpu/segments.hpp>
#include <talpa/cuda/segments.hpp>

#include <algorithm>
#include <cstdint>

namespace talpa::support {

/// Segments of random tokens, each with 0 to 3 experts, on both backends; four places too many.
struct both_segments {
  segments<cpu> host;
  segments<device> on;

  both_segments(context<cpu>& host_ctx, context<device>& ctx, index tokens, index experts) {
    test_random random(11);
    matrix<std::uint32_t, cpu> mask(tokens, mask_words(experts));
    for (index n = 0; n < tokens; ++n) {
      for (index k = random.below(4); k > 0; --k) {
        const index e = random.below(experts);
        mask(n, e / mask_word_bits) |= 1u << (e % mask_word_bits);
      }
    }
    const matrix<float, cpu> gates(tokens, experts);
    const index places = ops::count_slots(host_ctx, mask, experts) + 4;
    host = make_segments(host_ctx.memory, tokens, experts, places);
    std::fill_n(host.token_of_slot.data, places, -1000000);
    std::fill_n(host.slot_of_token.data, places, -1000000);
    ops::build_segments(host_ctx, mask, gates, host, host_ctx.memory.take<float>(places));
    on = {copy_to(ctx, host.offsets), copy_to(ctx, host.token_of_slot),
          copy_to(ctx, host.slot_offset_of_token), copy_to(ctx, host.slot_of_token)};
  }

 private:
  template <class T>
  static vector_view<T, device> copy_to(context<device>& ctx, vector_view<T, cpu> from) {
    const vector_view<T, device> to = ctx.memory.take<T>(from.size);
    to_device<T, device>(as_column(from), as_column(to));
    return to;
  }
};

/// Three tokens with both of two experts, but places for four slots: expert 0 has 0, 1, 2, and of
/// the other only token 0 has its own.
inline segments<device> crowded_segments(context<device>& ctx,
                                         matrix_view<const std::uint32_t, device> mask) {
  const matrix<float, device> gates(3, 2);
  const segments<device> s = make_segments(ctx.memory, 3, 2, 4);
  ops::build_segments(ctx, mask, gates.view(), s, ctx.memory.take<float>(4));
  return s;
}
inline matrix<std::uint32_t, device> crowded_mask() {
  matrix<std::uint32_t, cpu> mask(3, 1);
  for (index n = 0; n < 3; ++n) mask(n, 0) = 3u;
  return to_device<device>(mask.view());
}

}  // namespace talpa::support
