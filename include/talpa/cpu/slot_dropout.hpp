// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/cpu/dropout.hpp>
#include <talpa/ops/slot_dropout.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct slot_dropout_impl<cpu> {
  static constexpr index task_rows = 64;

  template <class T>
  static void run(context<cpu>& ctx, const segments<cpu>& s, random_stream stream,
                  float keep_probability, matrix_view<const T, cpu> x, matrix_view<T, cpu> y) {
    const detail::dropout_row mask(stream, keep_probability);
    const T factor = detail::dropout_factor<T>(keep_probability);
    const index experts = s.experts(), slots = s.offsets[experts];
    detail::parallel_for_blocks(ctx, slots, task_rows, [&](index first, index rows, int) {
      // The expert of slot i is the first whose segment ends behind it.
      const index* const ends = s.offsets.data + 1;
      index e = std::upper_bound(ends, ends + experts, first) - ends;
      for (index i = first; i < first + rows; ++i) {
        while (ends[e] <= i) ++e;
        const index row = s.token_of_slot[i] * experts + e;
        detail::drop_elements<T>(mask, factor, row * x.cols, x.cols, x.row(i), y.row(i),
                                 [](auto& to, const auto& value) { to = value; });
      }
    });
  }
};

}  // namespace talpa::ops
