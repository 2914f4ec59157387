// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/limit_experts.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

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

/// Bits that order like the numbers, but descending: the largest has the least. Both zeros are one.
template <class T>
TALPA_HD auto descending_bits(T x) {
  const auto bits = math::detail::to_bits(x == T{0} ? T{0} : x);
  using word = std::remove_const_t<decltype(bits)>;
  const word sign = word{1} << (8 * sizeof(word) - 1);
  return static_cast<word>((bits & sign) != 0 ? bits : (bits | sign) ^ ~word{0});
}

/// Tokens of a sequence that a block looks at together.
inline constexpr index limit_chunk = 256;

/// counts[c] = the tokens of chunk c that take part.
struct limit_chunk_counts {
  const std::uint8_t* part;
  index length, chunks;  // of a sequence
  index* counts;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index c) const {
    const index first = c % chunks * limit_chunk;
    const index tokens = first + limit_chunk < length ? limit_chunk : length - first;
    const std::uint8_t* const from = part + c / chunks * length + first;
    const index count = warp.template sum<index>(tokens, [&](index i) { return index{from[i]}; });
    if (warp.lane() == 0) counts[c] = count;
  }
};

/// What is known of the last token that each expert keeps of each sequence, [sequences, E]: the
/// leading bits of its key, and the how-many-eth it is of the tokens with these, 0: none is kept;
/// at the end of those in one chunk.
template <class T>
struct limit_search {
  using word = decltype(descending_bits(T{}));
  word* key;
  index* left;
  index* chunk;
};

/// left = limit(the tokens of sequence s that take part), key = 0.
template <class T, class Limit>
struct limit_places {
  Limit limit;
  const index* counts;
  index chunks, experts;
  limit_search<T> found;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index s) const {
    const index count =
        warp.template sum<index>(chunks, [&](index c) { return counts[s * chunks + c]; });
    const index places = limit(count);
    for (index e = warp.lane(); e < experts; e += 32) {
      found.key[s * experts + e] = 0;
      found.left[s * experts + e] = places;
    }
  }
};

/// Tokens that ask for an expert, and their keys: the order is that of (key, token).
template <class T, class B>
struct limit_asking {
  matrix_view<const T, B> scores;
  matrix_view<const std::uint32_t, B> mask;
  const std::uint8_t* part;
  index length, chunks;  // of a sequence
  limit_order order;

  using word = decltype(descending_bits(T{}));

  TALPA_HD bool asks(index n, index e) const {
    const bool on = ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
    return (part[n] != 0) & on;
  }
  TALPA_HD word key(index n, index e) const {
    return order == limit_order::score ? descending_bits(scores(n, e)) : word{0};
  }
  TALPA_HD index first(index s, index chunk) const { return s * length + chunk * limit_chunk; }
  TALPA_HD index end(index s, index chunk) const {
    const index beyond = (chunk + 1) * limit_chunk;
    return s * length + (beyond < length ? beyond : length);
  }
};

inline constexpr int limit_threads = 256, limit_digit_bits = 4,
                     limit_digits = 1 << limit_digit_bits;

/// counts[chunk, digit, e] = the tokens of a chunk that agree with what is known of the key and go
/// on with that digit. A lane has one expert and, where these are few, every so many-th token.
template <class T, class B>
struct limit_count_digits {
  limit_asking<T, B> asking;
  limit_search<T> found;
  int pass, shift;
  int width;  // experts side by side, a power of two up to 32
  std::uint32_t* counts;

  static constexpr std::size_t shared_bytes() {
    return limit_threads * limit_digits * sizeof(std::uint32_t);
  }

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int warps = Block::threads() / 32;
    const index experts = asking.scores.cols, groups = (experts + width - 1) / width;
    const index chunk = block.index() / groups, e0 = block.index() % groups * width;
    const index s = chunk / asking.chunks, c = chunk % asking.chunks;
    const int lane = block.thread() % 32, warp = block.thread() / 32, apart = 32 / width;
    const index e = e0 + lane % width, end = asking.end(s, c);
    // all[(warp * digits + digit) * 32 + lane]
    std::uint32_t* const all = block.template shared<std::uint32_t>();
    std::uint32_t* const own = all + warp * limit_digits * 32 + lane;
    for (int d = 0; d < limit_digits; ++d) own[d * 32] = 0;
    if (e < experts) {
      const auto known = found.key[s * experts + e];
      for (index n = asking.first(s, c) + warp * apart + lane / width; n < end;
           n += warps * apart) {
        // All that a token has is on its way before any of it is looked at. Before the first pass
        // nothing is known of the key.
        const auto key = asking.key(n, e);
        const bool asks = asking.asks(n, e);
        const bool agrees = pass == 0 || key >> (shift + limit_digit_bits) == known;
        if (asks && agrees) ++own[static_cast<int>(key >> shift & (limit_digits - 1)) * 32];
      }
    }
    block.sync();
    for (int i = block.thread(); i < limit_digits * width; i += Block::threads()) {
      const int digit = i / width, col = i % width;
      std::uint32_t sum = 0;
      for (int w = 0; w < warps; ++w) {
        for (int l = col; l < 32; l += width) sum += all[(w * limit_digits + digit) * 32 + l];
      }
      if (e0 + col < experts) counts[(chunk * limit_digits + digit) * experts + e0 + col] = sum;
    }
  }
};

/// Appends to each key the digit of the last token kept; behind the last digit finds its chunk. A
/// block serves 32 experts of a sequence, a lane each.
template <class T>
struct limit_choose_digit {
  const std::uint32_t* counts;
  index chunks, experts;
  limit_search<T> found;
  bool is_first, is_last;

  static constexpr std::size_t shared_bytes() {
    return 32 * (limit_digits + limit_threads / 32 + 2) * sizeof(index);
  }

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    using word = typename limit_search<T>::word;
    constexpr int warps = Block::threads() / 32;
    const index groups = (experts + 31) / 32;
    const index s = block.index() / groups;
    const int lane = block.thread() % 32, warp = block.thread() / 32;
    const index e = block.index() % groups * 32 + lane, at = s * experts + e;
    const bool inside = e < experts;
    index* const sums = block.template shared<index>();  // [digits, 32]
    index* const runs = sums + limit_digits * 32;        // [warps, 32]
    index* const digit_of = runs + warps * 32;           // [32]
    index* const left_of = digit_of + 32;                // [32]
    const auto count = [&](index chunk, index digit) {
      return counts[((s * chunks + chunk) * limit_digits + digit) * experts + e];
    };
    const auto total = [&](index digit, index first, index end) {
      constexpr int at_once = 16;  // reads on their way
      index sum = 0;
      if (!inside) return sum;
      for (; first + at_once <= end; first += at_once) {
        std::uint32_t several[at_once];
        TALPA_UNROLL
        for (int i = 0; i < at_once; ++i) {
          several[i] = count(first + i, digit);
        }
        TALPA_UNROLL
        for (int i = 0; i < at_once; ++i) sum += several[i];
      }
      for (; first < end; ++first) sum += count(first, digit);
      return sum;
    };
    for (int d = warp; d < limit_digits; d += warps) sums[d * 32 + lane] = total(d, 0, chunks);
    block.sync();
    if (warp == 0 && inside) {
      index left = found.left[at];
      if (is_first) {
        index all = 0;
        for (int d = 0; d < limit_digits; ++d) all += sums[d * 32 + lane];
        left = all < left ? all : (left > 0 ? left : 0);
      }
      int digit = 0;
      while (digit < limit_digits - 1 && left > sums[digit * 32 + lane]) {
        left -= sums[digit++ * 32 + lane];
      }
      found.key[at] = static_cast<word>(found.key[at] << limit_digit_bits | word(digit));
      found.left[at] = left;
      digit_of[lane] = digit;
      left_of[lane] = left;
    }
    if (!is_last) return;
    block.sync();
    // Each warp adds up a run of chunks; then the run of the last token is searched.
    const index digit = inside ? digit_of[lane] : 0, run = (chunks + warps - 1) / warps;
    const index first = warp * run, end = first + run < chunks ? first + run : chunks;
    runs[warp * 32 + lane] = total(digit, first, end);
    block.sync();
    if (warp != 0 || !inside) return;
    index left = left_of[lane], chunk = 0;
    for (int w = 0; w < warps - 1 && left > runs[w * 32 + lane]; ++w, chunk += run) {
      left -= runs[w * 32 + lane];
    }
    for (; chunk < chunks - 1; ++chunk) {
      const index here{count(chunk, digit)};
      if (left <= here) break;
      left -= here;
    }
    found.left[at] = left;
    found.chunk[at] = chunk;
  }
};

/// last(s, e) = the last token that expert e keeps of sequence s, -1 for none; a warp each.
template <class T, class B>
struct limit_locate {
  limit_asking<T, B> asking;
  limit_search<T> found;
  index sequences;
  index* last;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr index warps = Block::threads() / 32;
    const index experts = asking.scores.cols;
    const index at = block.index() * warps + block.thread() / 32;
    if (at >= sequences * experts) return;
    const index s = at / experts, e = at % experts, lane = block.thread() % 32;
    const index end = asking.end(s, found.chunk[at]);
    index left = found.left[at], result = -1;
    const auto key = found.key[at];
    for (index first = asking.first(s, found.chunk[at]); left > 0 && first < end; first += 32) {
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
  limit_search<T> found;
  const index* last;
  matrix_view<std::uint32_t, B> mask;

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr index warps = Block::threads() / 32;
    const index experts = asking.scores.cols, lane = block.thread() % 32;
    for (index n = block.index() * warps + block.thread() / 32; n < mask.rows;
         n += block.count() * warps) {
      if (asking.part[n] == 0) continue;
      for (index w = 0; w < mask.cols; ++w) {
        const index e = w * mask_word_bits + lane, at = n / asking.length * experts + e;
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
    const index chunks = ceil_div(length, limit_chunk), all_chunks = sequences * chunks;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto part = ctx.scratch.template take<std::uint8_t>(tokens);
    const auto in_chunk = ctx.scratch.template take<index>(all_chunks);
    const auto counts =
        ctx.scratch.template take<std::uint32_t>(all_chunks * limit_digits * experts);
    const auto last = ctx.scratch.template take<index>(sequences * experts);
    using word = typename limit_search<T>::word;
    const limit_search<T> found{ctx.scratch.template take<word>(sequences * experts).data,
                                ctx.scratch.template take<index>(sequences * experts).data,
                                ctx.scratch.template take<index>(sequences * experts).data};
    const limit_asking<T, B> asking{scores, mask, part.data, length, chunks, order};
    for_each_row(ctx, tokens, limit_part<T, B>{scores, padding_mask, part.data});
    for_each_row(ctx, all_chunks, limit_chunk_counts{part.data, length, chunks, in_chunk.data});
    for_each_row(ctx, sequences,
                 limit_places<T, Limit>{limit, in_chunk.data, chunks, experts, found});
    const int width = experts < 32 ? static_cast<int>(std::bit_ceil(std::uint32_t(experts))) : 32;
    const int passes =
        order == limit_order::score ? static_cast<int>(8 * sizeof(word)) / limit_digit_bits : 1;
    for (int pass = 0; pass < passes; ++pass) {
      using count = limit_count_digits<T, B>;
      using choose = limit_choose_digit<T>;
      talpa::detail::launch<limit_threads>(
          ctx, all_chunks * ceil_div(experts, width), count::shared_bytes(),
          count{asking, found, pass, (passes - 1 - pass) * limit_digit_bits, width, counts.data});
      talpa::detail::launch<limit_threads>(
          ctx, sequences * ceil_div(experts, 32), choose::shared_bytes(),
          choose{counts.data, chunks, experts, found, pass == 0, pass == passes - 1});
    }
    constexpr index warps = limit_threads / 32;
    talpa::detail::launch<limit_threads>(ctx, ceil_div(sequences * experts, warps), 0,
                                         limit_locate<T, B>{asking, found, sequences, last.data});
    talpa::detail::launch<limit_threads>(ctx, std::min(ceil_div(tokens, warps), loop_blocks), 0,
                                         limit_clear<T, B>{asking, found, last.data, mask});
  }
};

}  // namespace talpa::ops
