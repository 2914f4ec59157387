// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/random.hpp>
#include <talpa/cuda/loops.hpp>
#include <talpa/ops/slot_dropout.hpp>

#include <cstdint>

namespace talpa::ops {

template <kernel_backend B>
struct slot_dropout_impl<B> {
  /// Places beyond the slots that are in use are left as they are.
  template <class T>
  static void run(context<B>& ctx, const segments<B>& s, random_stream stream,
                  float keep_probability, matrix_view<const T, B> x, matrix_view<T, B> y) {
    const T factor = T{1} / static_cast<T>(keep_probability);
    const index experts = s.experts(), cols = x.cols;
    const vector_view<index, B> offsets = s.offsets;
    const vector_view<std::int32_t, B> token_of_slot = s.token_of_slot;
    kernels::for_each_element(ctx, x.rows, x.cols, [=] TALPA_DEVICE(index i, index d) {
      if (i >= offsets[experts]) return;
      // The expert of slot i is the first whose segment ends behind it.
      index low = 0, high = experts - 1;
      while (low < high) {
        const index middle = (low + high) / 2;
        if (offsets[middle + 1] > i) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      const auto place = static_cast<std::uint64_t>((token_of_slot[i] * experts + low) * cols + d);
      y(i, d) = keep(stream, place, keep_probability) ? factor * x(i, d) : T{0};
    });
  }
};

}  // namespace talpa::ops
