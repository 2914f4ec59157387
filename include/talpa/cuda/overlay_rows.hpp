// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cuda/loops.hpp>
#include <talpa/ops/overlay_rows.hpp>

#include <cstdint>

namespace talpa::ops {

/// A sequence is walked in order, sequences side by side.
template <kernel_backend B>
struct overlay_rows_impl<B> {
  static void run(context<B>& ctx, matrix_view<const std::uint32_t, B> overlay, index length,
                  index most, matrix_view<std::uint32_t, B> mask) {
    if (overlay.rows == 0) return;
    kernels::for_each_element(
        ctx, overlay.rows / length, 1, [=] TALPA_DEVICE(index sequence, index) {
          index left = most;
          for (index n = sequence * length; n < (sequence + 1) * length && left > 0; ++n) {
            std::uint32_t some = 0;
            for (index w = 0; w < overlay.cols; ++w) some |= overlay(n, w);
            if (some == 0) continue;
            for (index w = 0; w < overlay.cols; ++w) mask(n, w) = overlay(n, w);
            --left;
          }
        });
  }
};

}  // namespace talpa::ops
