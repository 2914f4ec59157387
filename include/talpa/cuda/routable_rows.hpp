// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/workspace.hpp>
#include <talpa/cuda/loops.hpp>

#include <cstdint>
#include <limits>

namespace talpa::kernels {

/// flags[n] = 1 for a token that is real and can be routed: no NaN or +inf among its logits, and
/// one that is not -inf.
template <class T, class B>
struct routable_row {
  matrix_view<const T, B> logits;
  vector_view<const std::uint8_t, B> padding_mask;
  std::uint8_t* flags;

  template <class Warp>
  TALPA_HD void operator()(const Warp& warp, index n) const {
    // A logit that forbids counts more than all that allow.
    const index experts = logits.cols;
    const index votes = warp.template sum<index>(experts, [&](index e) {
      const T u = logits(n, e);
      if (!(u < std::numeric_limits<T>::infinity())) return experts + 1;
      return u >= std::numeric_limits<T>::lowest() ? index{1} : index{0};
    });
    const bool real = padding_mask.empty() || padding_mask[n] != 0;
    if (warp.lane() == 0) flags[n] = real && votes > 0 && votes <= experts ? 1 : 0;
  }
};

/// Those flags [N] in ctx.scratch.
template <class T, class B>
vector_view<std::uint8_t, B> routable_rows(context<B>& ctx, matrix_view<const T, B> logits,
                                           vector_view<const std::uint8_t, B> padding_mask) {
  const auto flags = ctx.scratch.template take<std::uint8_t>(logits.rows);
  for_each_row(ctx, logits.rows, routable_row<T, B>{logits, padding_mask, flags.data});
  return flags;
}

}  // namespace talpa::kernels
