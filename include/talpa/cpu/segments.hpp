// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/segments.hpp>

#include <algorithm>
#include <bit>

namespace talpa::detail {

/// Word w of a mask row, without the bits beyond expert E - 1.
inline std::uint32_t mask_word(const std::uint32_t* row, index w, index experts) {
  const index inside = experts - w * mask_word_bits;
  return inside < mask_word_bits ? row[w] & ((1u << inside) - 1u) : row[w];
}

/// Calls f(e) for each expert of a mask row, ascending.
template <class F>
[[gnu::always_inline]] inline void for_each_expert(const std::uint32_t* row, index experts, F f) {
  for (index w = 0; w < mask_words(experts); ++w) {
    for (std::uint32_t bits = mask_word(row, w, experts); bits != 0; bits &= bits - 1u) {
      f(w * mask_word_bits + static_cast<index>(std::countr_zero(bits)));
    }
  }
}

}  // namespace talpa::detail

namespace talpa::ops {

/// Counting sort over fixed blocks of tokens: count by block and expert, scan expert-major, place.
template <>
struct segments_impl<cpu> {
  static constexpr index block_rows = 256;

  static index count(context<cpu>& ctx, matrix_view<const std::uint32_t, cpu> mask, index experts) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const index blocks = ceil_div(mask.rows, block_rows);
    const vector_view<index, cpu> counts = ctx.scratch.take<index>(blocks);
    detail::parallel_for_blocks(ctx.threads, mask.rows, block_rows,
                                [&](index first, index rows, int) {
                                  index sum = 0;
                                  for (index n = first; n < first + rows; ++n)
                                    sum += count_row(mask.row(n), experts);
                                  counts[first / block_rows] = sum;
                                });
    index total = 0;
    for (index b = 0; b < blocks; ++b) total += counts[b];
    return total;
  }

  template <class T>
  static void build(context<cpu>& ctx, matrix_view<const std::uint32_t, cpu> mask,
                    matrix_view<const T, cpu> gates, const segments<cpu>& s,
                    vector_view<T, cpu> gate_of_slot) {
    const index experts = s.experts(), blocks = ceil_div(mask.rows, block_rows);
    const workspace<cpu>::scope scope(ctx.scratch);
    // Slots of expert e among the tokens of block b, then the next free one of them.
    const matrix_view<index, cpu> next = ctx.scratch.take<index>(blocks, experts);  // [blocks, E]
    const vector_view<index, cpu> block_slots = ctx.scratch.take<index>(blocks);
    detail::parallel_for_blocks(
        ctx.threads, mask.rows, block_rows, [&](index first, index rows, int) {
          const index block = first / block_rows;
          index* const counts = next.row(block);
          std::fill_n(counts, experts, index{0});
          for (index n = first; n < first + rows; ++n) {
            detail::for_each_expert(mask.row(n), experts, [&](index e) { ++counts[e]; });
          }
          index sum = 0;
          for (index e = 0; e < experts; ++e) sum += counts[e];
          block_slots[block] = sum;
        });

    index slot = 0;
    for (index e = 0; e < experts; ++e) {
      s.offsets[e] = slot;
      for (index b = 0; b < blocks; ++b) {
        const index count = next(b, e);
        next(b, e) = slot;
        slot += count;
      }
    }
    s.offsets[experts] = slot;
    if (slot > s.capacity()) {
      detail::throw_shape("ops::build_segments", "token_of_slot",
                          detail::concat("[", std::to_string(s.capacity()), "]"),
                          detail::concat("[", std::to_string(slot), "]"),
                          "set bits of mask, or more");
    }
    index offset = 0;
    for (index b = 0; b < blocks; ++b) {
      const index count = block_slots[b];
      block_slots[b] = offset;
      offset += count;
    }
    s.slot_offset_of_token[mask.rows] = offset;

    detail::parallel_for_blocks(ctx.threads, mask.rows, block_rows,
                                [&](index first, index rows, int) {
                                  const index block = first / block_rows;
                                  index* const free = next.row(block);
                                  index place = block_slots[block];
                                  for (index n = first; n < first + rows; ++n) {
                                    s.slot_offset_of_token[n] = place;
                                    detail::for_each_expert(mask.row(n), experts, [&](index e) {
                                      const index taken = free[e]++;
                                      s.token_of_slot[taken] = static_cast<std::int32_t>(n);
                                      s.slot_of_token[place++] = static_cast<std::int32_t>(taken);
                                      gate_of_slot[taken] = gates(n, e);
                                    });
                                  }
                                });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const std::uint32_t, cpu> mask,
                       const segments<cpu>& s, vector_view<const T, cpu> dgate_of_slot,
                       matrix_view<T, cpu> dgates, grad_mode mode) {
    detail::parallel_for_blocks(ctx.threads, mask.rows, block_rows,
                                [&](index first, index rows, int) {
                                  for (index n = first; n < first + rows; ++n) {
                                    T* const out = dgates.row(n);
                                    if (mode == grad_mode::overwrite)
                                      std::fill_n(out, dgates.cols, T{0});
                                    index place = s.slot_offset_of_token[n];
                                    detail::for_each_expert(mask.row(n), dgates.cols, [&](index e) {
                                      out[e] += dgate_of_slot[s.slot_of_token[place++]];
                                    });
                                  }
                                });
  }

 private:
  static index count_row(const std::uint32_t* row, index experts) {
    index sum = 0;
    for (index w = 0; w < mask_words(experts); ++w) {
      sum += std::popcount(detail::mask_word(row, w, experts));
    }
    return sum;
  }
};

}  // namespace talpa::ops
