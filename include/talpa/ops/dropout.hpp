// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/core/view.hpp>

#include <concepts>
#include <cstdint>

namespace talpa {

/// A dropout mask as a value: the mask itself is drawn anew from the stream wherever it is needed.
struct dropout_mask {
  random_stream stream{};
  float keep = 1.0F;  ///< probability that an element stays
  bool active = false;
};

/// A dropout mask as it was drawn; without rows everything stays as it is.
template <class B>
struct dropout_bits {
  /// [N, ceil(D / 32)]: bit d % 32 of word d / 32 of row n says whether element (n, d) stays; those
  /// from D on are zero.
  matrix_view<std::uint32_t, B> words;
  float keep = 1.0F;  ///< probability that an element stays

  bool active() const { return words.rows != 0; }
};

/// Backends where reading bits takes less time than drawing them again.
template <class B>
inline constexpr bool has_dropout_bits = std::same_as<B, cpu>;

namespace detail {

inline void check_keep(const char* function, float keep_probability) {
  check_value(keep_probability > 0.0f && keep_probability <= 1.0f, function, "keep_probability",
              static_cast<double>(keep_probability), "a number in (0, 1]");
}

/// Bits for x [N, D].
template <class B>
void check_bits(const char* function, const dropout_bits<B>& bits, index rows, index cols) {
  check_shape(function, "words", bits.words, rows, mask_words(cols), "rows, words of the columns");
  check_keep(function, bits.keep);
}
/// The same, if there are some.
template <class B>
void check_kept(const char* function, const dropout_bits<B>& kept, index rows, index cols) {
  if (kept.active()) check_bits(function, kept, rows, cols);
}

}  // namespace detail

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct dropout_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::dropout has no implementation for this backend here, include "
                "talpa/cpu/dropout.hpp for cpu, talpa/cuda/dropout.hpp for gpu "
                "(docs/architecture.md)");
};
template <class B>
struct dropout_bits_impl {
  static_assert(detail::always_false<B>,
                "talpa: masks are kept as bits on the CPU, include talpa/cpu/dropout.hpp for them "
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
  detail::check_keep("ops::dropout", keep_probability);
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
  detail::check_keep("ops::dropout_backward", keep_probability);
  dropout_impl<B>::run(ctx, stream, keep_probability, dy, dx, dx_mode);
}

/// Draws a mask for x [N, D]: element (n, d) stays where keep(stream, n D + d, bits.keep).
///
/// Shapes: bits.words [N, ceil(D / 32)], D = `cols`.
/// Cost: a quarter of a philox block an element.
/// Determinism: as dropout.
/// Throws: as dropout.
template <class B>
void draw_dropout(context<B>& ctx, random_stream stream, index cols, const dropout_bits<B>& bits) {
  detail::check_bits("ops::draw_dropout", bits, bits.words.rows, cols);
  dropout_bits_impl<B>::draw(ctx, stream, cols, bits);
}

/// dropout, or its backward, by a mask that has been drawn: y[n, d] (+)= x[n, d] / p where the mask
/// keeps, else 0, p = bits.keep. The bits of dropout with the mask's stream.
///
/// Shapes: x and y [N, D]; they may be the same view. bits.words [N, ceil(D / 32)].
/// Cost: reads one, writes one.
/// Throws: as dropout.
template <class B, floating T>
void apply_dropout(context<B>& ctx, const dropout_bits<B>& bits, input<T, B> x, matrix_view<T, B> y,
                   grad_mode y_mode) {
  if (y_mode == grad_mode::ignore) return;
  check_shape("ops::apply_dropout", "y", y, x.rows, x.cols, "shape of x");
  detail::check_bits("ops::apply_dropout", bits, x.rows, x.cols);
  dropout_bits_impl<B>::apply(ctx, bits, x, y, y_mode);
}

}  // namespace talpa::ops
