// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/random.hpp>
#include <talpa/cpu/loops.hpp>
#include <talpa/ops/dropout.hpp>

#include <algorithm>
#include <cstdint>

namespace talpa::detail {

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
      const index used = std::min(blocks, ceil_div(last - start, 4));
      for (index j = 0; j < used; ++j) {
        const philox_block block = random_block(stream_, static_cast<std::uint64_t>(start / 4 + j));
        for (index w = 0; w < 4; ++w) words[4 * j + w] = block.word[w];
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
  static constexpr index blocks = 64;

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
