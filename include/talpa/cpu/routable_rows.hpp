// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/cpu/context.hpp>

#include <cmath>
#include <cstdint>
#include <limits>

namespace talpa::detail {

/// Flags [N] in ctx.scratch: 1 for a token that is real and can be routed, that is, has no NaN or
/// +inf among its logits and one that is not -inf.
template <class T>
vector_view<std::uint8_t, cpu> routable_rows(context<cpu>& ctx, matrix_view<const T, cpu> logits,
                                             vector_view<const std::uint8_t, cpu> padding_mask) {
  constexpr index block_rows = 256;
  const auto flags = ctx.scratch.take<std::uint8_t>(logits.rows);
  parallel_for_blocks(ctx, logits.rows, block_rows, [&](index first, index rows, int) {
    for (index n = first; n < first + rows; ++n) {
      bool finite = false, fine = true;
      for (index e = 0; e < logits.cols; ++e) {
        const T u = logits(n, e);
        finite = finite || std::isfinite(u);
        fine = fine && u < std::numeric_limits<T>::infinity();
      }
      flags[n] = finite && fine && (padding_mask.empty() || padding_mask[n] != 0) ? 1 : 0;
    }
  });
  return flags;
}

}  // namespace talpa::detail
