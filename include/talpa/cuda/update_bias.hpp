// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/update_bias.hpp>

namespace talpa::ops {

template <kernel_backend B>
struct update_bias_impl<B> {
  template <class T>
  static void run(context<B>& ctx, matrix_view<const index, B> counts, double rate,
                  matrix_view<T, B> bias) {
    // So few that each expert adds up all.
    kernels::for_each_element(ctx, 1, counts.cols, [=] TALPA_DEVICE(index, index e) {
      index total = 0;
      for (index i = 0; i < counts.cols; ++i) total += counts(0, i);
      bias(0, e) = detail::moved_bias(bias(0, e), counts(0, e), total, counts.cols, rate);
    });
  }
};

}  // namespace talpa::ops
