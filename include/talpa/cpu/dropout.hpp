// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/loops.hpp>
#include <talpa/ops/dropout.hpp>

#include <cstdint>

namespace talpa::ops {

template <>
struct dropout_impl<cpu> {
  template <class T>
  static void run(context<cpu>& ctx, random_stream stream, float keep_probability,
                  matrix_view<const T, cpu> x, matrix_view<T, cpu> y, grad_mode y_mode) {
    const T factor = T{1} / static_cast<T>(keep_probability);
    // keep(stream, i, p) compares element i with this; here one block serves four elements.
    const std::uint64_t threshold = static_cast<std::uint64_t>(keep_probability * 4294967296.0f);
    detail::with_grad_mode(y_mode, [&](auto put) {
      detail::for_each_row(ctx, y.rows, y.cols, [&](index n) {
        const T* const xn = x.row(n);
        T* const yn = y.row(n);
        const std::uint64_t first = static_cast<std::uint64_t>(n * y.cols);
        philox_block block = random_block(stream, first / 4);
        for (index d = 0; d < y.cols; ++d) {
          const std::uint64_t i = first + static_cast<std::uint64_t>(d);
          if (i % 4 == 0) block = random_block(stream, i / 4);
          put(yn[d], block.word[i % 4] < threshold ? factor * xn[d] : T{0});
        }
      });
    });
  }
};

}  // namespace talpa::ops
