// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa {

/// A dropout mask as a value: the mask itself is drawn anew from the stream wherever it is needed.
struct dropout_mask {
  random_stream stream{};
  float keep = 1.0F;  ///< probability that an element stays
  bool active = false;
};

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct dropout_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::dropout has no implementation for this backend here, include "
                "talpa/cpu/dropout.hpp for cpu, talpa/cuda/dropout.hpp for gpu "
                "(docs/architecture.md)");
};

/// Keeps each element with a probability and divides it by that probability:
/// y[n, d] = x[n, d] / p where keep(stream, n D + d, p), else 0.
///
/// Backward: dx = dy / p in the same places. The mask is not stored: dropout_backward draws it
/// again from the stream, so forward and backward need the same stream and probability.
/// Shapes: x and y [N, D]; they may be the same view.
/// Parameters: stream, a fresh one for each call (generator::next); keep_probability in (0, 1].
/// Edges: 1 copies exactly; what is dropped becomes 0 even if it was NaN.
/// Cost: reads one, writes one, a quarter of a philox block an element.
/// Determinism: element (n, d) depends on the stream and n D + d only, on no thread and no stride.
/// Throws: shape_error when the shapes differ; value_error when the probability is outside its
/// range.
/// Source: Srivastava et al., 2014, Dropout, in the inverted form that leaves inference alone.
template <class B, floating T>
void dropout(context<B>& ctx, random_stream stream, float keep_probability, input<T, B> x,
             matrix_view<T, B> y) {
  check_shape("ops::dropout", "y", y, x.rows, x.cols, "shape of x");
  check_value(keep_probability > 0.0f && keep_probability <= 1.0f, "ops::dropout",
              "keep_probability", static_cast<double>(keep_probability), "a number in (0, 1]");
  dropout_impl<B>::run(ctx, stream, keep_probability, x, y, grad_mode::overwrite);
}

/// Gradient of dropout: dx = dy / p where the mask of this stream keeps, else 0, as dx_mode says.
///
/// Shapes: dy and dx [N, D]; they may be the same view.
/// Throws: as dropout.
template <class B, floating T>
void dropout_backward(context<B>& ctx, random_stream stream, float keep_probability, input<T, B> dy,
                      matrix_view<T, B> dx, grad_mode dx_mode) {
  if (dx_mode == grad_mode::ignore) return;
  check_shape("ops::dropout_backward", "dx", dx, dy.rows, dy.cols, "shape of dy");
  check_value(keep_probability > 0.0f && keep_probability <= 1.0f, "ops::dropout_backward",
              "keep_probability", static_cast<double>(keep_probability), "a number in (0, 1]");
  dropout_impl<B>::run(ctx, stream, keep_probability, dy, dx, dx_mode);
}

}  // namespace talpa::ops
