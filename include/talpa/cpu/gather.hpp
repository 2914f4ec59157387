// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/gather.hpp>

#include <algorithm>

namespace talpa::ops {

template <>
struct gather_impl<cpu> {
  static constexpr index task_rows = 64;

  template <class T>
  static void gather(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                     matrix_view<T, cpu> y) {
    const index slots = s.offsets[s.experts()];
    detail::parallel_for_blocks(ctx, slots, task_rows, [&](index first, index rows, int) {
      for (index i = first; i < first + rows; ++i) {
        std::copy_n(x.row(s.token_of_slot[i]), x.cols, y.row(i));
      }
    });
  }

  template <class T>
  static void clear_unused(context<cpu>&, const segments<cpu>& s, matrix_view<T, cpu> y) {
    for (index i = s.offsets[s.experts()]; i < y.rows; ++i) std::fill_n(y.row(i), y.cols, T{0});
  }

  template <class T>
  static void combine(context<cpu>& ctx, const segments<cpu>& s, matrix_view<const T, cpu> x,
                      matrix_view<T, cpu> y, grad_mode mode) {
    static_assert(floating<T>, "talpa: ops::combine adds up halves on a device only");
    detail::parallel_for_blocks(ctx, y.rows, task_rows, [&](index first, index rows, int) {
      for (index n = first; n < first + rows; ++n) {
        T* const to = y.row(n);
        if (mode == grad_mode::overwrite) std::fill_n(to, y.cols, T{0});
        for (index i = s.slot_offset_of_token[n]; i < s.slot_offset_of_token[n + 1]; ++i) {
          const T* const from = x.row(s.slot_of_token[i]);
          for (index d = 0; d < y.cols; ++d) to[d] += from[d];
        }
      }
    });
  }
};

}  // namespace talpa::ops
