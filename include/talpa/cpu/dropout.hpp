// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/random.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/dropout.hpp>

#include <algorithm>
#include <cstdint>

namespace talpa::detail {

/// The words of `Lanes` blocks of a stream from block `first` on, those of random_block, computed
/// side by side: a round is a few instructions for each vector of blocks.
template <int Lanes>
void random_blocks(random_stream stream, std::uint64_t first, std::uint32_t* words) {
  std::uint32_t c0[Lanes], c1[Lanes], c2[Lanes], c3[Lanes];
  for (int j = 0; j < Lanes; ++j) {
    const std::uint64_t block = first + static_cast<std::uint64_t>(j);
    c0[j] = static_cast<std::uint32_t>(block);
    c1[j] = static_cast<std::uint32_t>(block >> 32);
    c2[j] = static_cast<std::uint32_t>(stream.stream);
    c3[j] = static_cast<std::uint32_t>(stream.stream >> 32);
  }
  philox_key key{
      {static_cast<std::uint32_t>(stream.seed), static_cast<std::uint32_t>(stream.seed >> 32)}};
#pragma GCC unroll 10
  for (int round = 0; round < philox_rounds; ++round) {
    for (int j = 0; j < Lanes; ++j) {
      const philox_block next = philox_round({{c0[j], c1[j], c2[j], c3[j]}}, key);
      c0[j] = next.word[0], c1[j] = next.word[1], c2[j] = next.word[2], c3[j] = next.word[3];
    }
    key = next_key(key);
  }
  for (int j = 0; j < Lanes; ++j) {
    words[4 * j] = c0[j], words[4 * j + 1] = c1[j];
    words[4 * j + 2] = c2[j], words[4 * j + 3] = c3[j];
  }
}

/// Dropout of consecutive elements of a stream.
template <class T>
class dropout_row {
 public:
  dropout_row(random_stream stream, float keep_probability)
      : stream_(stream),
        factor_(T{1} / static_cast<T>(keep_probability)),
        // keep(stream, i, p) compares element i with p 2^32; here one block serves four elements.
        threshold_(static_cast<std::uint64_t>(keep_probability * 4294967296.0f)) {}

  /// Puts x[j], dropped by element `first` + j of the stream, into y[j] for j < count.
  template <class Put>
  void operator()(index first, index count, const T* x, T* y, Put put) const {
    std::uint32_t words[4 * blocks];
    // Elements [first, last) of the stream, a buffer of whole blocks at a time.
    const index last = first + count;
    for (index start = first / 4 * 4; start < last; start += 4 * blocks) {
      const index used = std::min(index{blocks}, ceil_div(last - start, 4));
      const auto block = static_cast<std::uint64_t>(start / 4);
      if (used >= blocks / 2) {
        random_blocks<blocks>(stream_, block, words);
      } else {  // so few take less by themselves
        for (index j = 0; j < used; ++j) {
          const philox_block one = random_block(stream_, block + static_cast<std::uint64_t>(j));
          for (index w = 0; w < 4; ++w) words[4 * j + w] = one.word[w];
        }
      }
      const index from = std::max(start, first), to = std::min(start + 4 * blocks, last);
      for (index i = from; i < to; ++i) {
        const T scaled = factor_ * x[i - first];
        put(y[i - first], words[i - start] < threshold_ ? scaled : T{0});
      }
    }
  }

 private:
  /// Blocks of random words drawn at a time.
  static constexpr int blocks = 32;

  random_stream stream_;
  T factor_;
  std::uint64_t threshold_;
};

}  // namespace talpa::detail

namespace talpa::ops {

template <>
struct dropout_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, random_stream stream, float keep_probability,
                  matrix_view<const T, cpu> x, matrix_view<T, cpu> y, grad_mode y_mode) {
    const detail::dropout_row<T> drop(stream, keep_probability);
    detail::with_grad_mode(y_mode, [&](auto put) {
      detail::for_each_row(ctx, y.rows, y.cols,
                           [&](index n) { drop(n * y.cols, y.cols, x.row(n), y.row(n), put); });
    });
  }
};

}  // namespace talpa::ops
