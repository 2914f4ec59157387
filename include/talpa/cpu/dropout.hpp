// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/random.hpp>
#include <talpa/core/registers.hpp>
#include <talpa/cpu/kept_lanes.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/dropout.hpp>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace talpa::detail {

/// Blocks of a stream side by side, each word of a block in the lower half of a 64-bit lane; the
/// upper halves hold anything. What random_block computes, for a vector of Bytes at a time.
/// Word is a 64-bit integer, among the parameters since g++ wants vectors of a type that depends on
/// them where their size does.
template <int Bytes, class Word = std::uint64_t>
struct random_lanes {
  static constexpr int lanes = Bytes / 8;
  typedef Word vector __attribute__((vector_size(Bytes)));
  typedef std::conditional_t<Bytes != 0, std::uint32_t, Word> half;
  typedef half halves __attribute__((vector_size(Bytes)));

  vector word[4];

  /// Blocks `first`, `first` + 1, ... of a stream.
  [[gnu::always_inline]] void start(random_stream stream, std::uint64_t first) {
    vector count = {};
    for (int l = 0; l < lanes; ++l) count[l] = static_cast<Word>(l);
    word[0] = count + first;
    word[1] = word[0] >> 32;
    word[2] = vector{} + stream.stream;
    word[3] = word[2] >> 32;
  }
  /// One round of philox.
  [[gnu::always_inline]] void round(philox_key key) {
    const vector p0 = multiply_lower(word[0], vector{} + philox_first);
    const vector p1 = multiply_lower(word[2], vector{} + philox_second);
    word[0] = (p1 >> 32) ^ word[1] ^ key.word[0];
    word[1] = p1;
    word[2] = (p0 >> 32) ^ word[3] ^ key.word[1];
    word[3] = p0;
  }
};

/// Which consecutive elements of a stream a dropout mask keeps.
class dropout_row {
 public:
  dropout_row(random_stream stream, float keep_probability) : stream_(stream) {
    const std::uint64_t threshold = keep_threshold(keep_probability);  // may need 33 bits
    any_ = threshold > 0 ? ~0u : 0u;
    last_ = static_cast<std::uint32_t>(threshold - 1);
  }

  /// Bit i of bits[w]: whether element `first` + 32 w + i stays, for the first `count` of them, and
  /// zero behind. Not inlined: it needs all registers.
  template <int Bytes = product_bytes>
  [[gnu::noinline]] void draw(index first, index count, std::uint32_t* bits) const {
    if (count == 0) return;
    // A group is 32 elements of the stream, eight blocks; so many at a time keep all units busy.
    constexpr index several = Bytes >= 64 ? 4 : 1;
    const index words = mask_words(count), shift = first % mask_word_bits;
    const index group = first / mask_word_bits;
    const index groups = ceil_div(first + count, mask_word_bits) - group;
    const index together = words / several * several;
    for (index g = 0; g < together; g += several) {
      draw_groups<several, Bytes>(group + g, bits + g);
    }
    for (index g = together; g < words; ++g) draw_groups<1, Bytes>(group + g, bits + g);
    if (shift != 0) {
      std::uint32_t last = 0;
      if (groups > words) draw_groups<1, Bytes>(group + words, &last);
      for (index w = 0; w < words; ++w) {
        const std::uint32_t next = w + 1 < words ? bits[w + 1] : last;
        bits[w] = bits[w] >> shift | next << (mask_word_bits - shift);
      }
    }
    const index rest = words * mask_word_bits - count;
    bits[words - 1] &= ~0u >> rest;
  }

 private:
  template <int Groups, int Bytes>
  [[gnu::always_inline]] void draw_groups(index group, std::uint32_t* bits) const {
    using lanes = random_lanes<Bytes>;
    using vector = typename lanes::vector;
    using halves = typename lanes::halves;
    constexpr int width = lanes::lanes, parts = 8 / width;  // vectors of a group
    philox_key key{
        {static_cast<std::uint32_t>(stream_.seed), static_cast<std::uint32_t>(stream_.seed >> 32)}};
    std::uint64_t block = static_cast<std::uint64_t>(group) * 8;
    lanes drawn[Groups * parts];
#pragma GCC unroll 16
    for (lanes& some : drawn) {
      some.start(stream_, block);
      block += width;
    }
#pragma GCC unroll 1
    for (int round = 0; round < philox_rounds; ++round) {
#pragma GCC unroll 16
      for (lanes& some : drawn) some.round(key);
      key = next_key(key);
    }
#pragma GCC unroll 4
    for (int g = 0; g < Groups; ++g) {
      vector all = {};
#pragma GCC unroll 16
      for (int i = 0; i < 4 * parts; ++i) {
        vector bit = {};
        for (int l = 0; l < width; ++l) {
          bit[l] = std::uint64_t{1} << ((i / 4 * width + l) * 4 + i % 4);
        }
        const auto words = reinterpret_cast<halves>(drawn[g * parts + i / 4].word[i % 4]);
        all |= reinterpret_cast<vector>(words <= halves{} + last_) & bit;
      }
      std::uint64_t one = 0;
      for (int l = 0; l < width; ++l) one |= all[l];
      bits[g] = static_cast<std::uint32_t>(one) & any_;
    }
  }

  random_stream stream_;
  std::uint32_t last_;  // an element stays whose bits are at most this
  std::uint32_t any_;   // all ones, or zero where none stays
};

/// put(y[d], bit d is set ? factor x[d] : 0) for d < count; y may be x.
template <class T, index Bytes = register_bytes, class Put>
void put_kept(const std::uint32_t* bits, T factor, index count, const T* x, T* y, Put put) {
  using kept = kept_lanes<T, Bytes>;
  constexpr index lanes = kept::lanes;
  typename kept::vector some;
  index d = 0;
  for (; d + lanes <= count; d += lanes) {
    __builtin_memcpy(&some, x + d, sizeof(some));
    some = kept::of(some * factor, bits[d / mask_word_bits] >> d % mask_word_bits);
    typename kept::vector to;
    __builtin_memcpy(&to, y + d, sizeof(to));
    put(to, some);
    __builtin_memcpy(y + d, &to, sizeof(to));
  }
  for (; d < count; ++d) {
    const T scaled = factor * x[d];
    put(y[d], (bits[d / mask_word_bits] >> d % mask_word_bits & 1u) != 0 ? scaled : T{0});
  }
}

/// By what dropout multiplies what stays.
template <class T>
T dropout_factor(float keep_probability) {
  return T{1} / static_cast<T>(keep_probability);
}

/// Dropout of `count` elements by elements of a stream from `first` on.
template <class T, class Put>
void drop_elements(const dropout_row& mask, T factor, index first, index count, const T* x, T* y,
                   Put put) {
  constexpr index some = 32 * mask_word_bits;
  std::uint32_t bits[some / mask_word_bits];
  for (index d = 0; d < count; d += some) {
    const index cols = std::min(some, count - d);
    mask.draw(first + d, cols, bits);
    put_kept<T>(bits, factor, cols, x + d, y + d, put);
  }
}

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct dropout_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, random_stream stream, float keep_probability,
                  matrix_view<const T, cpu> x, matrix_view<T, cpu> y, grad_mode y_mode) {
    const detail::dropout_row mask(stream, keep_probability);
    const T factor = detail::dropout_factor<T>(keep_probability);
    detail::with_grad_mode(y_mode, [&](auto put) {
      detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
        detail::drop_elements<T>(mask, factor, n * y.cols, y.cols, x.row(n), y.row(n), put);
      });
    });
  }
};

template <>
struct dropout_bits_impl<cpu> {
  static void draw(context<cpu>& ctx, random_stream stream, index cols,
                   const dropout_bits<cpu>& bits) {
    const detail::dropout_row mask(stream, bits.keep);
    detail::for_each_row(ctx, bits.words.rows, cols,
                         [&](index n) { mask.draw(n * cols, cols, bits.words.row(n)); });
  }
  template <class T>
  static void apply(context<cpu>& ctx, const dropout_bits<cpu>& bits, matrix_view<const T, cpu> x,
                    matrix_view<T, cpu> y, grad_mode y_mode) {
    const T factor = detail::dropout_factor<T>(bits.keep);
    detail::with_grad_mode(y_mode, [&](auto put) {
      detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
        detail::put_kept<T>(bits.words.row(n), factor, y.cols, x.row(n), y.row(n), put);
      });
    });
  }
};

}  // namespace talpa::ops
