// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/pack.hpp>
#include <talpa/cpu/context.hpp>
#include <talpa/ops/segments.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

namespace talpa::detail {

/// Word w of a mask row, without the bits beyond expert E - 1.
inline std::uint32_t mask_word(const std::uint32_t* row, index w, index experts) {
  const index inside = experts - w * mask_word_bits;
  return inside < mask_word_bits ? row[w] & ((1u << inside) - 1u) : row[w];
}
/// The bits of the last word of a mask row that stand for experts.
inline std::uint32_t last_word_bits(index experts) {
  const index inside = experts % mask_word_bits;
  return inside == 0 ? ~0u : (1u << inside) - 1u;
}

/// Values of one vector register, 1 where there are none.
template <class T>
inline constexpr int register_values = pack_bytes == 0 ? 1
                                                       : pack_bytes / static_cast<int>(sizeof(T));

/// to[0 .. n) = from[0 .. n), W values at a time, of which the last may overlap those before.
template <int W, class T>
void copy_run(T* to, const T* from, index n) {
  if constexpr (W >= 4) {
    if (n < W) return copy_run<W / 2>(to, from, n);
    typename pack_storage<T, W>::type x;
    const auto move = [&](index i) {
      __builtin_memcpy(&x, from + i, sizeof(x));
      __builtin_memcpy(to + i, &x, sizeof(x));
    };
    for (index i = 0; i < n - W; i += W) move(i);
    move(n - W);
  } else {
    for (index i = 0; i < n; ++i) to[i] = from[i];
  }
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
  /// Fewest tokens for which other threads are called.
  static constexpr index threaded_rows = 2048;

  static index count(context<cpu>& ctx, matrix_view<const std::uint32_t, cpu> mask, index experts) {
    const workspace<cpu>::scope scope(ctx.scratch);
    const auto on = detail::threads_from(ctx, mask.rows, threaded_rows);
    const index blocks = ceil_div(mask.rows, block_rows);
    const vector_view<index, cpu> counts = ctx.scratch.take<index>(blocks);
    detail::parallel_for_blocks(on, mask.rows, block_rows, [&](index first, index rows, int) {
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
    const auto on = detail::threads_from(ctx, mask.rows, threaded_rows);
    const workspace<cpu>::scope scope(ctx.scratch);
    // Slots of expert e among the tokens of block b, then the next free one of them.
    const matrix_view<std::int32_t, cpu> next =
        ctx.scratch.take<std::int32_t>(blocks, experts);  // [blocks, E]
    const vector_view<index, cpu> block_slots = ctx.scratch.take<index>(blocks);
    detail::parallel_for_blocks(on, mask.rows, block_rows, [&](index first, index rows, int) {
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
      detail::throw_size("ops::build_segments", "token_of_slot", s.capacity(), slots,
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

    // Staged for each thread: slots of one block, sorted by expert; and where an expert goes on.
    const index staged_most = std::min(std::min(block_rows, mask.rows) * experts, staged_slots);
    const auto tokens = ctx.scratch.take<std::int32_t>(ctx.threads, staged_most);
    const auto gates_of_tokens = ctx.scratch.take<T>(ctx.threads, staged_most);
    const auto cursors = ctx.scratch.take<std::int32_t>(ctx.threads, 2 * experts);
    detail::parallel_for_blocks(on, mask.rows, block_rows, [&](index first, index rows, int t) {
      const index block = first / block_rows;
      const bool last = block + 1 == blocks;
      const auto begin = [&](index e) { return next(block, e); };
      const auto count = [&](index e) {
        return (last ? s.offsets[e + 1] : index{next(block + 1, e)}) - begin(e);
      };
      const index found = (last ? slots : block_slots[block + 1]) - block_slots[block];
      slot_places<T> to{s.slot_of_token.data, s.slot_offset_of_token.data + first,
                        s.token_of_slot.data, gate_of_slot.data,
                        cursors.row(t),       cursors.row(t) + experts,
                        block_slots[block]};
      if (found < least_run * experts || found > staged_most) {
        for (index e = 0; e < experts; ++e) to.next[e] = begin(e);
        place<false>(mask, gates, first, rows, to);
        return;
      }
      to.token_of_slot = tokens.row(t);
      to.gate_of_slot = gates_of_tokens.row(t);
      std::int32_t staged = 0;
      for (index e = 0; e < experts; ++e) {
        to.next[e] = staged;
        to.shift[e] = begin(e) - staged;
        staged += static_cast<std::int32_t>(count(e));
      }
      place<true>(mask, gates, first, rows, to);
      constexpr int token_width = detail::register_values<std::int32_t>;
      constexpr int gate_width = detail::register_values<T>;
      for (index e = 0, from = 0; e < experts; from += count(e), ++e) {
        detail::copy_run<token_width>(s.token_of_slot.data + begin(e), to.token_of_slot + from,
                                      count(e));
        detail::copy_run<gate_width>(gate_of_slot.data + begin(e), to.gate_of_slot + from,
                                     count(e));
      }
    });
  }

  template <class T>
  static void backward(context<cpu>& ctx, matrix_view<const std::uint32_t, cpu> mask,
                       const segments<cpu>& s, vector_view<const T, cpu> dgate_of_slot,
                       matrix_view<T, cpu> dgates, grad_mode mode) {
    const auto on = detail::threads_from(ctx, mask.rows, threaded_rows);
    detail::parallel_for_blocks(on, mask.rows, block_rows, [&](index first, index rows, int) {
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
  /// Blocks with so many slots for each expert are sorted in memory that stays in the first caches
  /// and copied from there: written in place, the streams of all experts meet in the same few sets
  /// of a cache wherever the number of tokens is a large power of two.
  static constexpr index least_run = 24;
  /// Places for that, 128 KiB of float.
  static constexpr index staged_slots = 16384;

  /// Where the slots of a block go.
  template <class T>
  struct slot_places {
    std::int32_t* slot_of_token;
    index* offset_of_token;       // of the block's first token
    std::int32_t* token_of_slot;  // this and the next staged or not
    T* gate_of_slot;
    std::int32_t* next;   // [E], the next place of each expert
    std::int32_t* shift;  // [E], from a staged place to its slot
    index position;       // the block's first place in the order of tokens
  };

  /// Gives the experts of rows `first` and later, `rows` of them, their slots.
  template <bool Staged, class T>
  static void place(matrix_view<const std::uint32_t, cpu> mask, matrix_view<const T, cpu> gates,
                    index first, index rows, const slot_places<T>& to) {
    const index words = mask_words(gates.cols);
    if (words == 1) return place_words<Staged, 1>(mask, gates, first, rows, to);
    if (words == 2) return place_words<Staged, 2>(mask, gates, first, rows, to);
    return place_words<Staged, 0>(mask, gates, first, rows, to);
  }
  /// The same for rows of `Words` words, 0: of any number. Not inlined: among the variables of its
  /// caller the loop over slots runs out of registers.
  template <bool Staged, int Words, class T>
  [[gnu::noinline]] static void place_words(matrix_view<const std::uint32_t, cpu> mask,
                                            matrix_view<const T, cpu> gates, index first,
                                            index rows, const slot_places<T>& to) {
    // Not through `to`, which the compiler would read anew after every store.
    std::int32_t* const slot_of_token = to.slot_of_token;
    index* offset_of_token = to.offset_of_token;
    std::int32_t* const token_of_slot = to.token_of_slot;
    T* const gate_of_slot = to.gate_of_slot;
    std::int32_t* const next = to.next;
    const std::int32_t* const shift = to.shift;
    index position = to.position;
    const index words = mask_words(gates.cols);
    const std::uint32_t tail = detail::last_word_bits(gates.cols);
    const std::uint32_t* row = mask.row(first);
    const T* gate_of = gates.row(first);
    const auto end = static_cast<std::int32_t>(first + rows);
    for (auto n = static_cast<std::int32_t>(first); n < end; ++n) {
      *offset_of_token++ = position;
      const auto place_bits = [&](std::uint64_t bits, index base) __attribute__((always_inline)) {
        for (; bits != 0; bits &= bits - 1u) {
          const index e = base + static_cast<index>(std::countr_zero(bits));
          const std::int32_t at = next[e];
          next[e] = at + 1;
          slot_of_token[position++] = Staged ? at + shift[e] : at;
          token_of_slot[at] = n;
          gate_of_slot[at] = gate_of[e];
        }
      };
      if constexpr (Words == 1) {
        place_bits(row[0] & tail, 0);
      } else if constexpr (Words == 2) {
        place_bits(row[0] | static_cast<std::uint64_t>(row[1] & tail) << mask_word_bits, 0);
      } else {
        index w = 0;
        for (; w + 2 < words; w += 2) {
          place_bits(row[w] | static_cast<std::uint64_t>(row[w + 1]) << mask_word_bits,
                     w * mask_word_bits);
        }
        if (w + 1 == words) place_bits(row[w] & tail, w * mask_word_bits);
        if (w + 2 == words) {
          place_bits(row[w] | static_cast<std::uint64_t>(row[w + 1] & tail) << mask_word_bits,
                     w * mask_word_bits);
        }
      }
      row += mask.stride;
      gate_of += gates.stride;
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
