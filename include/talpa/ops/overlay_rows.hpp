// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>

#include <cstdint>

namespace talpa::ops {

template <class B>
struct overlay_rows_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::overlay_rows has no implementation for this backend here, include "
                "talpa/cpu/overlay_rows.hpp for cpu, talpa/cuda/overlay_rows.hpp for gpu "
                "(docs/architecture.md)");
};

/// Replaces rows of a mask by those of another that have a bit.
///
/// Forward: in each sequence the first `most` rows of `overlay` with a set bit are copied to mask;
/// the other rows of mask stay.
/// Backward: none; a mask is a constant.
/// Shapes: overlay, mask [N, words]; sequence_length divides N, 0 for one sequence.
/// Edges: most = 0 changes nothing; N = 0 is legal.
/// Cost: one pass over both masks.
/// Determinism: integers only; the same for any number of threads.
/// Throws: shape_error; value_error for sequence_length and a negative `most`.
template <class B>
void overlay_rows(context<B>& ctx, input<std::uint32_t, B> overlay, index sequence_length,
                  index most, output<std::uint32_t, B> mask) {
  constexpr const char* function = "ops::overlay_rows";
  check_shape(function, "mask", mask, overlay.rows, overlay.cols, "shape of overlay");
  check_sequence_length(function, sequence_length, overlay.rows);
  check_at_least(function, "most", most, 0, "rows of a sequence");
  if (overlay.empty()) return;
  overlay_rows_impl<B>::run(ctx, overlay, sequence_length == 0 ? overlay.rows : sequence_length,
                            most, mask);
}

}  // namespace talpa::ops
