// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/segments.hpp>

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace talpa::kernels {

/// Tokens that one thread counts and places in order.
inline constexpr index segment_chunk_rows = 32;

/// The bits of the experts below `experts` in word w of a mask row.
TALPA_HD inline std::uint32_t bits_below(const std::uint32_t* row, index w, index experts) {
  const index inside = experts - w * mask_word_bits;
  return inside < mask_word_bits ? row[w] & ((1u << inside) - 1u) : row[w];
}
/// How many experts below `experts` a mask row has.
TALPA_HD inline index count_below(const std::uint32_t* row, index experts) {
  index sum = 0;
  for (index w = 0; w < mask_words(experts); ++w) {
    sum += static_cast<index>(std::popcount(bits_below(row, w, experts)));
  }
  return sum;
}
TALPA_HD inline bool mask_bit(const std::uint32_t* row, index e) {
  return ((row[e / mask_word_bits] >> (e % mask_word_bits)) & 1u) != 0;
}

/// Exclusive sums of x[0], ..., x[n - 1] in place by one warp; returns their total, in each lane.
template <class Warp>
TALPA_HD index exclusive_sums(const Warp& warp, index* x, index n) {
  index total = 0;
  for (index first = 0; first < n; first += 32) {
    const index i = first + warp.lane();
    const index mine = i < n ? x[i] : 0;
    index sum = mine;
    for (int distance = 1; distance < 32; distance *= 2) {
      const index other = warp.block.shuffle(sum, (warp.lane() - distance) & 31, whole_warp);
      sum += warp.lane() >= distance ? other : 0;
    }
    if (i < n) x[i] = total + sum - mine;
    total += warp.block.shuffle(sum, 31, whole_warp);
  }
  return total;
}

/// counts(e, b) = slots of expert e among the tokens of chunk b; row E counts all their slots.
template <class B>
struct segment_counts {
  matrix_view<const std::uint32_t, B> mask;
  matrix_view<index, B> counts;  // [E + 1, chunks]

  TALPA_HD void operator()(index b, index e) const {
    const index experts = counts.rows - 1;
    const index first = b * segment_chunk_rows;
    const index last =
        first + segment_chunk_rows < mask.rows ? first + segment_chunk_rows : mask.rows;
    index sum = 0;
    for (index n = first; n < last; ++n) {
      const std::uint32_t* const row = mask.row(n);
      sum += e == experts ? count_below(row, experts) : index{mask_bit(row, e)};
    }
    counts(e, b) = sum;
  }
};

/// Turns each row of the counts into the number of slots in earlier chunks; its sum goes to
/// offsets[e], that of row E to *slots.
template <class B>
struct segment_chunk_offsets {
  matrix_view<index, B> counts;
  vector_view<index, B> offsets;  // [E + 1]
  index* slots;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index e) const {
    const index total = exclusive_sums(warp, counts.row(e), counts.cols);
    if (warp.lane() == 0) *(e + 1 < counts.rows ? &offsets[e] : slots) = total;
  }
};

template <class B>
struct segment_offsets {
  vector_view<index, B> offsets;  // [E + 1]

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index) const {
    const index total = exclusive_sums(warp, offsets.data, offsets.size - 1);
    if (warp.lane() == 0) offsets[offsets.size - 1] = total;
  }
};

/// Places the slots of expert e among the tokens of chunk b. Of more set bits than places the host
/// cannot know without waiting: slots beyond the capacity are not written, only counted.
template <class T, class B>
struct segment_slots {
  matrix_view<const std::uint32_t, B> mask;
  matrix_view<const T, B> gates;
  segments<B> s;
  vector_view<T, B> gate_of_slot;
  matrix_view<index, B> earlier;  // [E + 1, chunks]

  TALPA_HD void operator()(index b, index e) const {
    const index experts = earlier.rows - 1;
    const index first = b * segment_chunk_rows;
    const index last =
        first + segment_chunk_rows < mask.rows ? first + segment_chunk_rows : mask.rows;
    index slot = s.offsets[e] + earlier(e, b);
    index start = earlier(experts, b);  // of the slots of token n among those of all tokens
    for (index n = first; n < last; ++n) {
      const std::uint32_t* const row = mask.row(n);
      if (e == 0) s.slot_offset_of_token[n] = start;
      if (mask_bit(row, e)) {
        const index place = start + count_below(row, e);
        if (slot < s.token_of_slot.size) {
          s.token_of_slot[slot] = static_cast<std::int32_t>(n);
          gate_of_slot[slot] = gates(n, e);
        }
        if (place < s.slot_of_token.size) {
          s.slot_of_token[place] = static_cast<std::int32_t>(slot);
        }
        ++slot;
      }
      start += count_below(row, experts);
    }
  }
};

template <class T, class B, class Put>
struct segment_gradient {
  matrix_view<const std::uint32_t, B> mask;
  segments<B> s;
  vector_view<const T, B> dgate_of_slot;
  matrix_view<T, B> dgates;

  TALPA_HD void operator()(index n, index e) const {
    const std::uint32_t* const row = mask.row(n);
    // A sum from +0 where nothing is kept, as on the host: no -0.
    if (std::is_same_v<Put, put_overwrite>) dgates(n, e) = T{0};
    if (!mask_bit(row, e)) return;
    // Beyond the places that there are, see segment_slots, nothing can be known.
    const index place = s.slot_offset_of_token[n] + count_below(row, e);
    const index slot = place < s.slot_of_token.size ? s.slot_of_token[place] : dgate_of_slot.size;
    dgates(n, e) +=
        slot < dgate_of_slot.size ? dgate_of_slot[slot] : std::numeric_limits<T>::quiet_NaN();
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

/// Counting sort over fixed chunks of tokens: count by chunk and expert, scan expert-major, place.
template <kernel_backend B>
struct segments_impl<B> {
  static index count(context<B>& ctx, matrix_view<const std::uint32_t, B> mask, index experts) {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto counts = ctx.scratch.template take<index>(1, mask.cols);  // of each mask word
    kernels::sum_columns(
        ctx, mask.rows, mask.cols, index{0}, counts.data, [=] TALPA_DEVICE(index n, index w) {
          return static_cast<index>(std::popcount(kernels::bits_below(mask.row(n), w, experts)));
        });
    ctx.synchronise();
    const matrix<index, cpu> found = to_host(counts);
    index total = 0;
    for (index w = 0; w < mask.cols; ++w) total += found(0, w);
    return total;
  }

  /// In a checked context it waits and throws shape_error for more set bits than places.
  template <class T>
  static void build(context<B>& ctx, matrix_view<const std::uint32_t, B> mask,
                    matrix_view<const T, B> gates, const segments<B>& s,
                    vector_view<T, B> gate_of_slot) {
    const index experts = s.experts(), chunks = ceil_div(mask.rows, kernels::segment_chunk_rows);
    {
      const typename workspace<B>::scope scope(ctx.scratch);
      const auto counts = ctx.scratch.template take<index>(experts + 1, chunks);
      kernels::for_each_element(ctx, chunks, experts + 1, kernels::segment_counts<B>{mask, counts});
      kernels::for_each_row(ctx, experts + 1,
                            kernels::segment_chunk_offsets<B>{
                                counts, s.offsets, s.slot_offset_of_token.data + mask.rows});
      kernels::for_each_row(ctx, 1, kernels::segment_offsets<B>{s.offsets});
      kernels::for_each_element(ctx, chunks, experts,
                                kernels::segment_slots<T, B>{mask, gates, s, gate_of_slot, counts});
    }
    if (ctx.checked) check_capacity(ctx, s);
  }

  template <class T>
  static void backward(context<B>& ctx, matrix_view<const std::uint32_t, B> mask,
                       const segments<B>& s, vector_view<const T, B> dgate_of_slot,
                       matrix_view<T, B> dgates, grad_mode mode) {
    kernels::with_put(mode, [&](auto put) {
      kernels::for_each_element(
          ctx, dgates.rows, dgates.cols,
          kernels::segment_gradient<T, B, decltype(put)>{mask, s, dgate_of_slot, dgates});
    });
  }

 private:
  static void check_capacity(context<B>& ctx, const segments<B>& s) {
    ctx.synchronise();
    const index slots = to_host(matrix_view<index, B>(&s.offsets[s.experts()], 1, 1))(0, 0);
    if (slots <= s.capacity()) return;
    detail::throw_size("ops::build_segments", "token_of_slot", s.capacity(), slots,
                       "set bits of mask, or more");
  }
};

}  // namespace talpa::ops
