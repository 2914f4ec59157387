// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>
#include <talpa/ops/overlay_rows.hpp>

#include <algorithm>

namespace talpa::ops {

/// A sequence is walked in order, sequences side by side.
template <>
struct overlay_rows_impl<cpu> {
  static void run(context<cpu>& ctx, matrix_view<const std::uint32_t, cpu> overlay, index length,
                  index most, matrix_view<std::uint32_t, cpu> mask) {
    detail::parallel_for(ctx, overlay.rows / length, [&](index sequence, int) {
      index left = most;
      for (index n = sequence * length; n < (sequence + 1) * length && left > 0; ++n) {
        const std::uint32_t* const row = overlay.row(n);
        const bool some =
            std::any_of(row, row + overlay.cols, [](std::uint32_t word) { return word != 0; });
        if (!some) continue;
        std::copy_n(row, overlay.cols, mask.row(n));
        --left;
      }
    });
  }
};

}  // namespace talpa::ops
