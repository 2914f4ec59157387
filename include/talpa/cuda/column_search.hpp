// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>

// For each expert the token at a place in the order of a key, among the tokens of a sequence that
// ask for it: many blocks count the keys by their next few bits, until all bits are known.

namespace talpa::kernels {

/// Bits that order like the numbers, but descending: the largest has the least. Both zeros are one.
template <class T>
TALPA_HD auto descending_bits(T x) {
  const auto bits = math::detail::to_bits(x == T{0} ? T{0} : x);
  using word = std::remove_const_t<decltype(bits)>;
  const word sign = word{1} << (8 * sizeof(word) - 1);
  return static_cast<word>((bits & sign) != 0 ? bits : (bits | sign) ^ ~word{0});
}

/// The number of some descending_bits.
template <class Word>
TALPA_HD auto from_descending_bits(Word x) {
  const Word sign = Word{1} << (8 * sizeof(Word) - 1);
  return math::detail::from_bits((x & sign) != 0 ? x : static_cast<Word>(~x & ~sign));
}

/// Tokens of a sequence that a block looks at together.
inline constexpr index column_chunk = 256;

/// Sequences of `length` tokens, cut into chunks; part[n] = whether token n takes part.
struct column_tokens {
  const std::uint8_t* part;
  index length, chunks;  // of a sequence

  TALPA_HD index first(index s, index chunk) const { return s * length + chunk * column_chunk; }
  TALPA_HD index end(index s, index chunk) const {
    const index beyond = (chunk + 1) * column_chunk;
    return s * length + (beyond < length ? beyond : length);
  }
};

/// counts[c] = the tokens of chunk c that take part.
struct column_chunk_counts {
  column_tokens of;
  index* counts;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index c) const {
    const index s = c / of.chunks, first = of.first(s, c % of.chunks);
    const index count = warp.template sum<index>(
        of.end(s, c % of.chunks) - first, [&](index i) { return index{of.part[first + i]}; });
    if (warp.lane() == 0) counts[c] = count;
  }
};

/// What is known of the token at the place that is looked for, of each expert and sequence,
/// [sequences, E]: the leading bits of its key, and the how-many-eth it is of the tokens with
/// these, 0: there is none; at the end of those in one chunk.
template <class T>
struct column_search {
  using word = decltype(descending_bits(T{}));
  word* key;
  index* left;
  index* chunk;
};

/// left = limit(the tokens of sequence s that take part), key = 0.
template <class T, class Limit>
struct column_places {
  Limit limit;
  const index* counts;
  index chunks, experts;
  column_search<T> found;

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

inline constexpr int column_threads = 256, column_digit_bits = 4,
                     column_digits = 1 << column_digit_bits;

/// counts[chunk, digit, e] = the tokens of a chunk that agree with what is known of the key and go
/// on with that digit. A lane has one expert and, where these are few, every so many-th token.
template <class T, class Asking>
struct column_count_digits {
  Asking asking;
  column_search<T> found;
  int pass, shift;
  int width;  // experts side by side, a power of two up to 32
  std::uint32_t* counts;

  static constexpr std::size_t shared_bytes() {
    return column_threads * column_digits * sizeof(std::uint32_t);
  }

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int warps = Block::threads() / 32;
    const index experts = asking.experts(), groups = (experts + width - 1) / width;
    const index chunk = block.index() / groups, e0 = block.index() % groups * width;
    const index s = chunk / asking.of.chunks, c = chunk % asking.of.chunks;
    const int lane = block.thread() % 32, warp = block.thread() / 32, apart = 32 / width;
    const index e = e0 + lane % width, end = asking.of.end(s, c);
    // all[(warp * digits + digit) * 32 + lane]
    std::uint32_t* const all = block.template shared<std::uint32_t>();
    std::uint32_t* const own = all + warp * column_digits * 32 + lane;
    for (int d = 0; d < column_digits; ++d) own[d * 32] = 0;
    if (e < experts) {
      const auto known = found.key[s * experts + e];
      for (index n = asking.of.first(s, c) + warp * apart + lane / width; n < end;
           n += warps * apart) {
        // All that a token has is on its way before any of it is looked at. Before the first pass
        // nothing is known of the key.
        const auto key = asking.key(n, e);
        const bool asks = asking.asks(n, e);
        const bool agrees = pass == 0 || key >> (shift + column_digit_bits) == known;
        if (asks && agrees) ++own[static_cast<int>(key >> shift & (column_digits - 1)) * 32];
      }
    }
    block.sync();
    for (int i = block.thread(); i < column_digits * width; i += Block::threads()) {
      const int digit = i / width, col = i % width;
      std::uint32_t sum = 0;
      for (int w = 0; w < warps; ++w) {
        for (int l = col; l < 32; l += width) sum += all[(w * column_digits + digit) * 32 + l];
      }
      if (e0 + col < experts) counts[(chunk * column_digits + digit) * experts + e0 + col] = sum;
    }
  }
};

/// Appends to each key the digit of the token looked for; behind the last digit finds its chunk. A
/// block serves 32 experts of a sequence, a lane each.
template <class T>
struct column_choose_digit {
  const std::uint32_t* counts;
  index chunks, experts;
  column_search<T> found;
  bool is_first, is_last;

  static constexpr std::size_t shared_bytes() {
    return 32 * (column_digits + column_threads / 32 + 2) * sizeof(index);
  }

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    using word = typename column_search<T>::word;
    constexpr int warps = Block::threads() / 32;
    const index groups = (experts + 31) / 32;
    const index s = block.index() / groups;
    const int lane = block.thread() % 32, warp = block.thread() / 32;
    const index e = block.index() % groups * 32 + lane, at = s * experts + e;
    const bool inside = e < experts;
    index* const sums = block.template shared<index>();  // [digits, 32]
    index* const runs = sums + column_digits * 32;       // [warps, 32]
    index* const digit_of = runs + warps * 32;           // [32]
    index* const left_of = digit_of + 32;                // [32]
    const auto count = [&](index chunk, index digit) {
      return counts[((s * chunks + chunk) * column_digits + digit) * experts + e];
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
    for (int d = warp; d < column_digits; d += warps) sums[d * 32 + lane] = total(d, 0, chunks);
    block.sync();
    if (warp == 0 && inside) {
      index left = found.left[at];
      if (is_first) {
        index all = 0;
        for (int d = 0; d < column_digits; ++d) all += sums[d * 32 + lane];
        left = all < left ? all : (left > 0 ? left : 0);
      }
      int digit = 0;
      while (digit < column_digits - 1 && left > sums[digit * 32 + lane]) {
        left -= sums[digit++ * 32 + lane];
      }
      found.key[at] = static_cast<word>(found.key[at] << column_digit_bits | word(digit));
      found.left[at] = left;
      digit_of[lane] = digit;
      left_of[lane] = left;
    }
    if (!is_last) return;
    block.sync();
    // Each warp adds up a run of chunks; then the run of the token is searched.
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

/// Finds for each of `sequences` and experts the token at place limit(tokens that take part) among
/// those that ask, the last of them where fewer ask. Asking has
///
///   of                       column_tokens
///   experts(), passes()      passes over the digits of a key: all of them, or 1 where each is 0
///   asks(n, e), key(n, e)    the order is that of (key, token)
template <class T, class B, class Asking, class Limit>
void search_columns(context<B>& ctx, const Asking& asking, index sequences, const Limit& limit,
                    const column_search<T>& found) {
  const index experts = asking.experts(), all_chunks = sequences * asking.of.chunks;
  const typename workspace<B>::scope scope(ctx.scratch);
  const auto in_chunk = ctx.scratch.template take<index>(all_chunks);
  const auto counts =
      ctx.scratch.template take<std::uint32_t>(all_chunks * column_digits * experts);
  for_each_row(ctx, all_chunks, column_chunk_counts{asking.of, in_chunk.data});
  for_each_row(ctx, sequences,
               column_places<T, Limit>{limit, in_chunk.data, asking.of.chunks, experts, found});
  const int width = experts < 32 ? static_cast<int>(std::bit_ceil(std::uint32_t(experts))) : 32;
  const int passes = asking.passes();
  for (int pass = 0; pass < passes; ++pass) {
    using count = column_count_digits<T, Asking>;
    using choose = column_choose_digit<T>;
    talpa::detail::launch<column_threads>(
        ctx, all_chunks * ceil_div(experts, width), count::shared_bytes(),
        count{asking, found, pass, (passes - 1 - pass) * column_digit_bits, width, counts.data});
    talpa::detail::launch<column_threads>(
        ctx, sequences * ceil_div(experts, 32), choose::shared_bytes(),
        choose{counts.data, asking.of.chunks, experts, found, pass == 0, pass == passes - 1});
  }
}

/// Memory of a search, from ctx.scratch.
template <class T, class B>
column_search<T> take_column_search(context<B>& ctx, index sequences, index experts) {
  using word = typename column_search<T>::word;
  return {ctx.scratch.template take<word>(sequences * experts).data,
          ctx.scratch.template take<index>(sequences * experts).data,
          ctx.scratch.template take<index>(sequences * experts).data};
}

}  // namespace talpa::kernels
