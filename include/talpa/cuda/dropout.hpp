// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/random.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/dropout.hpp>

#include <cstdint>

namespace talpa::ops {

template <kernel_backend B>
struct dropout_impl<B> {
  template <class T>
  static void run(context<B>& ctx, random_stream stream, float keep_probability,
                  matrix_view<const T, B> x, matrix_view<T, B> y, grad_mode y_mode) {
    if (y_mode == grad_mode::ignore) return;
    const bool adds = y_mode == grad_mode::accumulate;
    const T factor = T{1} / static_cast<T>(keep_probability);
    const index cols = y.cols;
    kernels::for_each_element(ctx, y.rows, y.cols, [=] TALPA_DEVICE(index n, index d) {
      const auto i = static_cast<std::uint64_t>(n * cols + d);
      const T kept = keep(stream, i, keep_probability) ? factor * x(n, d) : T{0};
      y(n, d) = adds ? y(n, d) + kept : kept;
    });
  }
};

}  // namespace talpa::ops
