// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/limit_experts.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace talpa::ops {

/// Finds the last token that each expert keeps, then clears the bits behind it row by row.
template <>
struct limit_experts_impl<cpu> {
  static constexpr index block_rows = 256;

  template <class T, class Limit>
  static void run(context<cpu>& ctx, matrix_view<const T, cpu> scores,
                  vector_view<const std::uint8_t, cpu> padding_mask, index length,
                  const Limit& limit, limit_order order, matrix_view<std::uint32_t, cpu> mask) {
    const index tokens = scores.rows, experts = scores.cols, sequences = tokens / length;
    const workspace<cpu>::scope scope(ctx.scratch);
    const auto part = ctx.scratch.take<std::uint8_t>(tokens);
    detail::parallel_for_blocks(ctx, tokens, block_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        bool number = true;
        for (index e = 0; e < experts; ++e) number = number && !std::isnan(scores(n, e));
        part[n] = number && (padding_mask.empty() || padding_mask[n] != 0) ? 1 : 0;
      }
    });

    const auto places = ctx.scratch.take<index>(sequences);
    for (index s = 0; s < sequences; ++s) {
      index count = 0;
      for (index n = s * length; n < (s + 1) * length; ++n) count += part[n];
      places[s] = limit(count);
    }

    // The last token that expert e keeps of sequence s, -1 for none.
    const auto last = ctx.scratch.take<index>(sequences, experts);
    const auto asking = ctx.scratch.take<index>(ctx.threads, length);
    detail::parallel_for(ctx, sequences * experts, [&](index task, int thread) {
      const index s = task / experts, e = task % experts;
      index* const ask = asking.row(thread);
      index count = 0;
      for (index n = s * length; n < (s + 1) * length; ++n) {
        if (part[n] != 0 && on(mask, n, e)) ask[count++] = n;
      }
      const index kept = std::min(count, places[s]);
      if (kept <= 0) {
        last(s, e) = -1;
        return;
      }
      if (order == limit_order::score) {
        std::nth_element(ask, ask + (kept - 1), ask + count,
                         [&](index a, index b) { return before(scores, e, a, b); });
      }
      last(s, e) = ask[kept - 1];
    });

    detail::parallel_for_blocks(ctx, tokens, block_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        if (part[n] == 0) continue;
        for (index e = 0; e < experts; ++e) {
          const index end = last(n / length, e);
          const bool behind =
              order == limit_order::score ? end < 0 || before(scores, e, end, n) : n > end;
          if (behind) mask(n, e / mask_word_bits) &= ~(1u << (e % mask_word_bits));
        }
      }
    });
  }

 private:
  static bool on(matrix_view<std::uint32_t, cpu> mask, index n, index e) {
    return ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
  }
  template <class T>
  static bool before(matrix_view<const T, cpu> scores, index e, index a, index b) {
    return scores(a, e) > scores(b, e) || (scores(a, e) == scores(b, e) && a < b);
  }
};

}  // namespace talpa::ops
