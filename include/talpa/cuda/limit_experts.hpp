// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/column_search.hpp>
#include <talpa/ops/limit_experts.hpp>

#include <algorithm>
#include <bit>
#include <cstdint>

namespace talpa::kernels {

/// part[n] = whether token n is real and has no NaN among its scores.
template <class T, class B>
struct limit_part {
  matrix_view<const T, B> scores;
  vector_view<const std::uint8_t, B> padding_mask;
  std::uint8_t* part;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    const int nans = warp.template sum<int>(
        scores.cols, [&](index e) { return scores(n, e) != scores(n, e) ? 1 : 0; });
    const bool real = padding_mask.empty() || padding_mask[n] != 0;
    if (warp.lane() == 0) part[n] = real && nans == 0 ? 1 : 0;
  }
};

/// Tokens that ask for an expert, and their keys.
template <class T, class B>
struct limit_asking {
  matrix_view<const T, B> scores;
  matrix_view<const std::uint32_t, B> mask;
  column_tokens of;
  limit_order order;

  using word = decltype(descending_bits(T{}));

  TALPA_HD index experts() const { return scores.cols; }
  int passes() const {
    return order == limit_order::score ? static_cast<int>(8 * sizeof(word)) / column_digit_bits : 1;
  }
  TALPA_HD bool asks(index n, index e) const {
    const bool on = ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
    return (of.part[n] != 0) & on;
  }
  TALPA_HD word key(index n, index e) const {
    return order == limit_order::score ? descending_bits(scores(n, e)) : word{0};
  }
};

/// last(s, e) = the last token that expert e keeps of sequence s, -1 for none; a warp each.
template <class T, class B>
struct limit_locate {
  limit_asking<T, B> asking;
  column_search<T> found;
  index sequences;
  index* last;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr index warps = Block::threads() / 32;
    const index experts = asking.experts();
    const index at = block.index() * warps + block.thread() / 32;
    if (at >= sequences * experts) return;
    const index s = at / experts, e = at % experts, lane = block.thread() % 32;
    const index end = asking.of.end(s, found.chunk[at]);
    index left = found.left[at], result = -1;
    const auto key = found.key[at];
    for (index first = asking.of.first(s, found.chunk[at]); left > 0 && first < end; first += 32) {
      const index n = first + lane;
      const bool fits = n < end && asking.asks(n, e) && asking.key(n, e) == key;
      std::uint32_t those = block.ballot(fits, whole_warp);
      const index count = std::popcount(those);
      if (count < left) {
        left -= count;
        continue;
      }
      while (--left > 0) those &= those - 1;
      result = first + std::popcount((those & (0u - those)) - 1u);
    }
    if (lane == 0) last[at] = result;
  }
};

/// Clears the bits of what stands behind the last token kept: a warp a token, a lane an expert.
template <class T, class B>
struct limit_clear {
  limit_asking<T, B> asking;
  column_search<T> found;
  const index* last;
  matrix_view<std::uint32_t, B> mask;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr index warps = Block::threads() / 32;
    const index experts = asking.experts(), lane = block.thread() % 32;
    for (index n = block.index() * warps + block.thread() / 32; n < mask.rows;
         n += block.count() * warps) {
      if (asking.of.part[n] == 0) continue;
      for (index w = 0; w < mask.cols; ++w) {
        const index e = w * mask_word_bits + lane, at = n / asking.of.length * experts + e;
        bool keeps = false;
        if (e < experts && (mask(n, w) >> lane & 1u) != 0) {
          const index end = last[at];
          const auto key = asking.key(n, e);
          keeps = end >= 0 && (key < found.key[at] || (key == found.key[at] && n <= end));
        }
        const std::uint32_t word = block.ballot(keeps, whole_warp);
        if (lane == 0) mask(n, w) = word;
      }
    }
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct limit_experts_impl<B> {
  template <class T, class Limit>
  static void run(context<B>& ctx, matrix_view<const T, B> scores,
                  vector_view<const std::uint8_t, B> padding_mask, index length, const Limit& limit,
                  limit_order order, matrix_view<std::uint32_t, B> mask) {
    using namespace kernels;
    const index tokens = scores.rows, experts = scores.cols, sequences = tokens / length;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto part = ctx.scratch.template take<std::uint8_t>(tokens);
    const auto last = ctx.scratch.template take<index>(sequences * experts);
    const auto found = take_column_search<T>(ctx, sequences, experts);
    const limit_asking<T, B> asking{
        scores, mask, {part.data, length, ceil_div(length, column_chunk)}, order};
    for_each_row(ctx, tokens, limit_part<T, B>{scores, padding_mask, part.data});
    search_columns<T>(ctx, asking, sequences, limit, found);
    constexpr index warps = column_threads / 32;
    talpa::detail::launch<column_threads>(ctx, ceil_div(sequences * experts, warps), 0,
                                          limit_locate<T, B>{asking, found, sequences, last.data});
    talpa::detail::launch<column_threads>(ctx, std::min(ceil_div(tokens, warps), loop_blocks), 0,
                                          limit_clear<T, B>{asking, found, last.data, mask});
  }
};

}  // namespace talpa::ops
