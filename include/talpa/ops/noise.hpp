// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

namespace talpa::ops {

template <class B>
struct noise_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::add_noise, add_learned_noise and jitter have no implementation for "
                "this backend here, include "
                "talpa/cpu/noise.hpp for cpu, talpa/cuda/noise.hpp for gpu "
                "(docs/architecture.md)");
};

/// Adds normal noise of one deviation: y[n, d] = x[n, d] + deviation z,
/// z = normal(stream, n D + d).
///
/// Backward: dx = dy.
/// Shapes: x and y [N, D]; they may be the same view.
/// Parameters: stream, a fresh one for each call; deviation >= 0.
/// Cost: draws one normal number an element.
/// Determinism: element (n, d) depends on the stream and n D + d only, on no thread and no stride.
/// Throws: shape_error; value_error for a negative deviation or NaN.
template <class B, floating T>
void add_noise(context<B>& ctx, random_stream stream, double deviation, input<T, B> x,
               matrix_view<T, B> y) {
  check_shape("ops::add_noise", "y", y, x.rows, x.cols, "shape of x");
  check_value(deviation >= 0.0, "ops::add_noise", "deviation", deviation, ">= 0");
  noise_impl<B>::constant(ctx, stream, static_cast<T>(deviation), x, y);
}

/// Adds normal noise whose deviation is learned for each element:
/// deviation = softplus(raw) + floor, y = x + deviation z, z = normal(stream, n D + d).
///
/// Shapes: x, raw, deviation and y [N, D]; y may be the same view as x, deviation as raw, but then
/// backward has lost raw.
/// Parameters: stream, a fresh one for each call; floor >= 0, the least deviation.
/// Cost: draws one normal number an element, forward and backward.
/// Determinism: as add_noise.
/// Throws: shape_error; value_error for a negative floor or NaN.
template <class B, floating T>
void add_learned_noise(context<B>& ctx, random_stream stream, double floor, input<T, B> x,
                       input<T, B> raw, output<T, B> deviation, matrix_view<T, B> y) {
  check_shape("ops::add_learned_noise", "y", y, x.rows, x.cols, "shape of x");
  check_shape("ops::add_learned_noise", "raw", raw, x.rows, x.cols, "shape of x");
  check_shape("ops::add_learned_noise", "deviation", deviation, x.rows, x.cols, "shape of x");
  check_value(floor >= 0.0, "ops::add_learned_noise", "floor", floor, ">= 0");
  noise_impl<B>::learned(ctx, stream, static_cast<T>(floor), x, raw, deviation, y);
}

/// Gradient of add_learned_noise with respect to raw: draw = (dy z + ddeviation) sigmoid(raw), with
/// z drawn again from the stream; dx is dy itself. ddeviation, the gradient of what reads the
/// deviation itself, may be empty.
///
/// Shapes: raw, dy, ddeviation and draw [N, D]; draw may be the same view as dy or raw.
/// Throws: shape_error.
template <class B, floating T>
void add_learned_noise_backward(context<B>& ctx, random_stream stream, input<T, B> raw,
                                input<T, B> dy, input<T, B> ddeviation, matrix_view<T, B> draw) {
  check_shape("ops::add_learned_noise_backward", "dy", dy, raw.rows, raw.cols, "shape of raw");
  if (!ddeviation.empty()) {
    check_shape("ops::add_learned_noise_backward", "ddeviation", ddeviation, raw.rows, raw.cols,
                "shape of raw");
  }
  check_shape("ops::add_learned_noise_backward", "draw", draw, raw.rows, raw.cols, "shape of raw");
  noise_impl<B>::learned_backward(ctx, stream, raw, dy, ddeviation, draw);
}

/// Multiplies each element by a number from [1 - width, 1 + width):
/// y[n, d] = x[n, d] (1 + width (2 uniform(stream, n D + d) - 1)).
///
/// Backward: jitter_backward multiplies dy by the same numbers, drawn again.
/// Shapes: x and y [N, D]; they may be the same view.
/// Parameters: stream, a fresh one for each call; width in [0, 1).
/// Cost: draws one uniform number an element, forward and backward.
/// Determinism: as add_noise.
/// Throws: shape_error; value_error for a width out of range.
template <class B, floating T>
void jitter(context<B>& ctx, random_stream stream, double width, input<T, B> x,
            matrix_view<T, B> y) {
  check_shape("ops::jitter", "y", y, x.rows, x.cols, "shape of x");
  check_value(width >= 0.0 && width < 1.0, "ops::jitter", "width", width, "a number in [0, 1)");
  noise_impl<B>::jitter(ctx, stream, static_cast<T>(width), x, y, grad_mode::overwrite);
}

/// Gradient of jitter, dx = dy times the same numbers, as dx_mode says.
template <class B, floating T>
void jitter_backward(context<B>& ctx, random_stream stream, double width, input<T, B> dy,
                     matrix_view<T, B> dx, grad_mode dx_mode) {
  if (dx_mode == grad_mode::ignore) return;
  check_shape("ops::jitter_backward", "dx", dx, dy.rows, dy.cols, "shape of dy");
  check_value(width >= 0.0 && width < 1.0, "ops::jitter_backward", "width", width,
              "a number in [0, 1)");
  noise_impl<B>::jitter(ctx, stream, static_cast<T>(width), dy, dx, dx_mode);
}

}  // namespace talpa::ops
