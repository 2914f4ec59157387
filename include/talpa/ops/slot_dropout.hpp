// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>
#include <talpa/ops/segments.hpp>

namespace talpa::ops {

template <class B>
struct slot_dropout_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::slot_dropout has no implementation for this backend here, include "
                "talpa/cpu/slot_dropout.hpp for cpu, talpa/cuda/slot_dropout.hpp for gpu "
                "(docs/architecture.md)");
};

/// Dropout of what belongs to slots, with the mask that `dropout` of [N, E R] draws for the same
/// numbers: y[s, r] = x[s, r] / p where keep(stream, (n E + e) R + r, p), else 0, for the slot s of
/// token n and expert e.
///
/// Backward: the same call with dy in the place of x, from the same stream and probability.
/// Shapes: x and y [S, R] with S the capacity of `s`; they may be the same view. Rows beyond
/// offsets[E] are left as they were.
/// Parameters: stream, a fresh one for each call (generator::next); keep_probability in (0, 1].
/// Edges: as dropout; groups without slots are legal.
/// Cost: reads one, writes one, a quarter of a philox block an element.
/// Determinism: an element depends on the stream, token, expert and r only: on no thread, on no
/// stride and not on which other slots there are.
/// Throws: shape_error; value_error when the probability is outside its range.
template <class B, floating T>
void slot_dropout(context<B>& ctx, const segments<B>& s, random_stream stream,
                  float keep_probability, input<T, B> x, matrix_view<T, B> y) {
  check_shape("ops::slot_dropout", "x", x, s.capacity(), x.cols, "places for slots, any width");
  check_shape("ops::slot_dropout", "y", y, x.rows, x.cols, "shape of x");
  check_value(keep_probability > 0.0f && keep_probability <= 1.0f, "ops::slot_dropout",
              "keep_probability", static_cast<double>(keep_probability), "a number in (0, 1]");
  slot_dropout_impl<B>::run(ctx, s, stream, keep_probability, x, y);
}

}  // namespace talpa::ops
