// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/pack.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/ops/segments.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

namespace talpa::detail {

/// Word w of a mask row, without the bits beyond expert E - 1.
inline std::uint32_t mask_word(const std::uint32_t* row, index w, index experts) {
  const index inside = experts - w * mask_word_bits;
  return inside < mask_word_bits ? row[w] & ((1u << inside) - 1u) : row[w];
}

/// Calls f(e) for each expert of a mask row, ascending. Two words at a time: where all tokens have
/// as many experts, the number of rounds is then the same for each up to E = 64.
template <class F>
[[gnu::always_inline]] inline void for_each_expert(const std::uint32_t* row, index experts, F f) {
  const index words = mask_words(experts);
  for (index w = 0; w < words; w += 2) {
    std::uint64_t bits = mask_word(row, w, experts);
    if (w + 1 < words) {
      bits |= static_cast<std::uint64_t>(mask_word(row, w + 1, experts)) << mask_word_bits;
    }
    for (; bits != 0; bits &= bits - 1u) {
      f(w * mask_word_bits + static_cast<index>(std::countr_zero(bits)));
    }
  }
}

/// counts[i] = in how many of the words bit i is set, for the lowest B bits.
template <int B>
void count_bits(const std::uint32_t* words, index stride, index rows, std::int32_t (&counts)[B]) {
  constexpr int lanes = pack_bytes / static_cast<int>(sizeof(std::int32_t));
  constexpr int width = lanes < B ? lanes : B;
  if constexpr (width > 1) {
    using values = typename pack_storage<std::int32_t, width>::type;
    constexpr int parts = B / width;
    values sums[parts] = {}, bits[parts] = {};
    for (int i = 0; i < B; ++i) bits[i / width][i % width] = static_cast<std::int32_t>(1u << i);
    for (index n = 0; n < rows; ++n) {
      const auto word = static_cast<std::int32_t>(words[n * stride]);
#pragma GCC unroll 8
      for (int p = 0; p < parts; ++p) sums[p] -= (bits[p] & word) == bits[p];
    }
    for (int i = 0; i < B; ++i) counts[i] = sums[i / width][i % width];
  } else {
    for (int i = 0; i < B; ++i) counts[i] = 0;
    for (index n = 0; n < rows; ++n) {
      for (int i = 0; i < B; ++i) {
        counts[i] += static_cast<std::int32_t>((words[n * stride] >> i) & 1u);
      }
    }
  }
}

/// Adds to counts[e] how many of the rows have expert e, without a branch for any of them.
template <class Count>
void count_experts(const std::uint32_t* words, index stride, index rows, index experts,
                   Count* counts) {
  for (index first = 0; first < experts; first += mask_word_bits) {
    const std::uint32_t* const column = words + first / mask_word_bits;
    const index inside = std::min(experts - first, mask_word_bits);
    const auto count = [&](auto bits) {
      std::int32_t found[bits.value];
      count_bits(column, stride, rows, found);
      for (index i = 0; i < inside; ++i) counts[first + i] += found[i];
    };
    if (inside <= 8) {
      count(std::integral_constant<int, 8>{});
    } else if (inside <= 16) {
      count(std::integral_constant<int, 16>{});
    } else {
      count(std::integral_constant<int, 32>{});
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
    detail::parallel_for_blocks(ctx, mask.rows, block_rows, [&](index first, index rows, int) {
      index sum = 0;
      for (index n = first; n < first + rows; ++n) sum += count_row(mask.row(n), experts);
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
    const matrix_view<std::int32_t, cpu> next =
        ctx.scratch.take<std::int32_t>(blocks, experts);  // [blocks, E]
    const vector_view<index, cpu> block_slots = ctx.scratch.take<index>(blocks);
    detail::parallel_for_blocks(ctx, mask.rows, block_rows, [&](index first, index rows, int) {
      const index block = first / block_rows;
      std::int32_t* const counts = next.row(block);
      std::fill_n(counts, experts, 0);
      detail::count_experts(mask.row(first), mask.stride, rows, experts, counts);
      index sum = 0;
      for (index e = 0; e < experts; ++e) sum += counts[e];
      block_slots[block] = sum;
    });

    index slots = 0;
    for (index b = 0; b < blocks; ++b) {
      const index count = block_slots[b];
      block_slots[b] = slots;
      slots += count;
    }
    if (slots > s.capacity()) {
      detail::throw_shape("ops::build_segments", "token_of_slot",
                          detail::concat("[", std::to_string(s.capacity()), "]"),
                          detail::concat("[", std::to_string(slots), "]"),
                          "set bits of mask, or more");
    }
    std::int32_t slot = 0;
    for (index e = 0; e < experts; ++e) {
      s.offsets[e] = slot;
      for (index b = 0; b < blocks; ++b) {
        const std::int32_t count = next(b, e);
        next(b, e) = slot;
        slot += count;
      }
    }
    s.offsets[experts] = slot;
    s.slot_offset_of_token[mask.rows] = slots;

    detail::parallel_for_blocks(ctx, mask.rows, block_rows, [&](index first, index rows, int) {
      const index block = first / block_rows;
      place(mask, gates, s, gate_of_slot, first, rows, next.row(block), block_slots[block]);
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const std::uint32_t, cpu> mask,
                       const segments<cpu>& s, vector_view<const T, cpu> dgate_of_slot,
                       matrix_view<T, cpu> dgates, grad_mode mode) {
    detail::parallel_for_blocks(ctx, mask.rows, block_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        T* const out = dgates.row(n);
        if (mode == grad_mode::overwrite) std::fill_n(out, dgates.cols, T{0});
        index place = s.slot_offset_of_token[n];
        detail::for_each_expert(mask.row(n), dgates.cols, [&](index e) {
          out[e] += dgate_of_slot[s.slot_of_token[place++]];
        });
      }
    });
  }

 private:
  /// Gives the experts of rows `first` and later, `rows` of them, their slots: `free[e]` is the
  /// next one of expert e, `position` the first in the order of tokens. Not inlined: among the
  /// variables of its caller the loop over slots runs out of registers.
  template <class T>
  [[gnu::noinline]] static void place(matrix_view<const std::uint32_t, cpu> mask,
                                      matrix_view<const T, cpu> gates, const segments<cpu>& s,
                                      vector_view<T, cpu> gate_of_slot, index first, index rows,
                                      std::int32_t* free, index position) {
    // Not through s, which the compiler would read anew after every store.
    std::int32_t* const token_of_slot = s.token_of_slot.data;
    std::int32_t* const slot_of_token = s.slot_of_token.data;
    index* const offset_of_token = s.slot_offset_of_token.data;
    T* const gate_to = gate_of_slot.data;
    const index experts = gates.cols;
    for (index n = first; n < first + rows; ++n) {
      offset_of_token[n] = position;
      const T* const gate_of = gates.row(n);
      detail::for_each_expert(mask.row(n), experts, [&](index e) {
        const std::int32_t slot = free[e]++;
        slot_of_token[position++] = slot;
        token_of_slot[slot] = static_cast<std::int32_t>(n);
        gate_to[slot] = gate_of[e];
      });
    }
  }

  static index count_row(const std::uint32_t* row, index experts) {
    index sum = 0;
    for (index w = 0; w < mask_words(experts); ++w) {
      sum += std::popcount(detail::mask_word(row, w, experts));
    }
    return sum;
  }
};

}  // namespace talpa::ops
