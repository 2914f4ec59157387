// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/math.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/limit_experts.hpp>

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

/// places[s] = limit(the tokens of sequence s that take part).
template <class Limit>
struct limit_places {
  Limit limit;
  const std::uint8_t* part;
  index length;
  index* places;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index s) const {
    const index count =
        warp.template sum<index>(length, [&](index i) { return index{part[s * length + i]}; });
    if (warp.lane() == 0) places[s] = limit(count);
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

/// last(s, e) = the last token that expert e keeps of sequence s, -1 for none. A block serves 32
/// neighbouring experts of a sequence, a lane each, and every warp a run of its tokens. The bits of
/// the key of the last one are found four at a time, from the top, by counting those of the tokens
/// that agree so far; of the tokens with that key it is then the earliest that completes the
/// number.
template <class T, class B>
struct limit_last {
  static constexpr int digit_bits = 4;
  static constexpr int digits = 1 << digit_bits;

  matrix_view<const T, B> scores;
  matrix_view<const std::uint32_t, B> mask;
  const std::uint8_t* part;
  const index* places;
  index length;
  limit_order order;
  matrix_view<index, B> last;  // [sequences, E]

  using word = decltype(descending_bits(T{}));

  /// What the warps share about each of the 32 experts.
  struct search {
    word key[32];
    index left[32];  // how many of the tokens with this key are kept, 0: none
  };
  static constexpr std::size_t shared_bytes(int threads) {
    return sizeof(search) + static_cast<std::size_t>(threads) * digits * sizeof(std::uint32_t);
  }

  template <class Block>
  TALPA_HD void operator()(Block& block) const {
    constexpr int warps = Block::threads() / 32;
    const int lane = block.thread() % 32, warp = block.thread() / 32;
    const index groups = (scores.cols + 31) / 32;
    const index s = block.index() / groups, e = block.index() % groups * 32 + lane;
    search& found = *block.template shared<search>();
    // counts[(warp * digits + digit) * 32 + lane]
    std::uint32_t* const counts = reinterpret_cast<std::uint32_t*>(&found + 1);
    std::uint32_t* const own = counts + warp * digits * 32 + lane;
    const index run = (length + warps - 1) / warps;
    const index first = s * length + (warp * run < length ? warp * run : length);
    const index end = s * length + ((warp + 1) * run < length ? (warp + 1) * run : length);
    const bool inside = e < scores.cols;
    const int passes =
        order == limit_order::score ? static_cast<int>(8 * sizeof(word)) / digit_bits : 1;

    if (warp == 0) {
      found.key[lane] = 0;
      found.left[lane] = places[s];
    }
    block.sync();
    word key = 0;
    for (int pass = 0; pass < passes; ++pass) {
      const int shift = (passes - 1 - pass) * digit_bits;
      for (int d = 0; d < digits; ++d) own[d * 32] = 0;
      if (inside) {
        for (index n = first; n < end; ++n) {
          if (!asks(n, e)) continue;
          const word k = key_of(n, e);
          if (pass == 0 || k >> (shift + digit_bits) == key)
            ++own[(k >> shift & (digits - 1)) * 32];
        }
      }
      block.sync();
      if (warp == 0) choose_digit<warps>(found, counts + lane, lane, pass);
      block.sync();
      key = found.key[lane];
    }
    const index left = found.left[lane];
    if (!inside) return;
    if (left <= 0) {
      if (warp == 0) last(s, e) = -1;
      return;
    }
    const int digit = static_cast<int>(key & (digits - 1));
    index before = 0;
    for (int w = 0; w < warp; ++w) before += counts[(w * digits + digit) * 32 + lane];
    if (before >= left || before + own[digit * 32] < left) return;
    for (index n = first; n < end; ++n) {
      if (!asks(n, e) || key_of(n, e) != key) continue;
      ++before;
      if (before == left) last(s, e) = n;
    }
  }

 private:
  /// Appends to the key of an expert the digit of the last token it keeps.
  template <int Warps>
  TALPA_HD static void choose_digit(search& found, const std::uint32_t* counts, int lane,
                                    int pass) {
    const auto count = [&](int d) {
      index sum = 0;
      for (int w = 0; w < Warps; ++w) sum += counts[(w * digits + d) * 32];
      return sum;
    };
    if (pass == 0) {
      index all = 0;
      for (int d = 0; d < digits; ++d) all += count(d);
      if (all < found.left[lane]) found.left[lane] = all;
      if (found.left[lane] < 0) found.left[lane] = 0;
    }
    index left = found.left[lane];
    int digit = 0;
    while (digit < digits - 1 && left > count(digit)) left -= count(digit++);
    found.key[lane] = found.key[lane] << digit_bits | static_cast<word>(digit);
    found.left[lane] = left;
  }
  TALPA_HD bool asks(index n, index e) const {
    return part[n] != 0 && ((mask(n, e / mask_word_bits) >> (e % mask_word_bits)) & 1u) != 0;
  }
  TALPA_HD word key_of(index n, index e) const {
    return order == limit_order::score ? descending_bits(scores(n, e)) : word{0};
  }
};

/// Clears the bits of a word that stand behind the last token kept.
template <class T, class B>
struct limit_clear {
  matrix_view<const T, B> scores;
  const std::uint8_t* part;
  index length;
  limit_order order;
  matrix_view<const index, B> last;
  matrix_view<std::uint32_t, B> mask;

  TALPA_HD void operator()(index n, index w) const {
    if (part[n] == 0) return;
    std::uint32_t word = mask(n, w);
    const index s = n / length;
    for (int bit = 0; bit < mask_word_bits; ++bit) {
      const index e = w * mask_word_bits + bit;
      if (e >= scores.cols || (word >> bit & 1u) == 0) continue;
      const index end = last(s, e);
      const bool behind = order == limit_order::score ? end < 0 || before(e, end, n) : n > end;
      if (behind) word &= ~(1u << bit);
    }
    mask(n, w) = word;
  }
  TALPA_HD bool before(index e, index a, index b) const {
    return scores(a, e) > scores(b, e) || (scores(a, e) == scores(b, e) && a < b);
  }
};

}  // namespace talpa::kernels

namespace talpa::ops {

template <kernel_backend B>
struct limit_experts_impl<B> {
  static constexpr int threads = 256;

  template <class T, class Limit>
  static void run(context<B>& ctx, matrix_view<const T, B> scores,
                  vector_view<const std::uint8_t, B> padding_mask, index length, const Limit& limit,
                  limit_order order, matrix_view<std::uint32_t, B> mask) {
    const index tokens = scores.rows, experts = scores.cols, sequences = tokens / length;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto part = ctx.scratch.template take<std::uint8_t>(tokens);
    const auto places = ctx.scratch.template take<index>(sequences);
    const auto last = ctx.scratch.template take<index>(sequences, experts);
    kernels::for_each_row(ctx, tokens, kernels::limit_part<T, B>{scores, padding_mask, part.data});
    kernels::for_each_row(ctx, sequences,
                          kernels::limit_places<Limit>{limit, part.data, length, places.data});
    talpa::detail::launch<threads>(
        ctx, sequences * ceil_div(experts, 32), kernels::limit_last<T, B>::shared_bytes(threads),
        kernels::limit_last<T, B>{scores, mask, part.data, places.data, length, order, last});
    kernels::for_each_element(
        ctx, tokens, mask.cols,
        kernels::limit_clear<T, B>{scores, part.data, length, order, last, mask});
  }
};

}  // namespace talpa::ops
