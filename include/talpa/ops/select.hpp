// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/lanes.hpp>
#include <talpa/core/scalar.hpp>

#include <cstdint>

namespace talpa {

/// One row (a pack of rows for token_pack) as a selector's `select` and `replay` see it. `select`
/// writes mask and gates; `replay` reads mask and writes gates.
template <class T>
struct select_row {
  row_pointer<const T> logits;      // [E]
  row_pointer<T> gates;             // [E]
  row_pointer<std::uint32_t> mask;  // [ceil(E / 32)]

  /// The mask for reading.
  TALPA_HD row_pointer<const std::uint32_t> recorded() const { return {mask.data, mask.stride}; }
};

/// One row as a selector's `select_backward` sees it; it writes dlogits.
template <class T>
struct select_gradient_row {
  row_pointer<const T> logits;            // [E]
  row_pointer<const T> gates;             // [E]
  row_pointer<const std::uint32_t> mask;  // [ceil(E / 32)]
  row_pointer<const T> dgates;            // [E]
  row_pointer<T> dlogits;                 // [E]
};

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct select_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::select has no implementation for this backend here, include "
                "talpa/cpu/select.hpp for cpu (docs/architecture.md)");
};

/// Runs a selector over rows of logits.
///
/// Forward: (mask_n, gates_n) = selector(logits_n) for each real token n; padding gets neither.
/// Shapes: logits [N, E], padding_mask [N] or empty, gates [N, E], mask [N, ceil(E / 32)].
/// Edges: -inf is an expert masked for that token; a row with NaN, +inf, or -inf everywhere gets
/// NaN gates on its first max_selected experts.
/// Cost: one pass over the logits.
/// Determinism: same bits on every backend, group and number of threads.
/// Throws: shape_error; value_error from the selector's validate, and in a checked context for
/// logits that would make NaN gates.
template <class B, class Selector, floating T>
void select(context<B>& ctx, const Selector& selector, input<T, B> logits,
            vector_input<std::uint8_t, B> padding_mask, matrix_view<T, B> gates,
            output<std::uint32_t, B> mask) {
  selector.validate(logits.cols);
  check_shape(Selector::name, "gates", gates, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "mask", mask, logits.rows, mask_words(logits.cols),
              "tokens, mask words of the experts");
  if (!padding_mask.empty()) {
    check_size(Selector::name, "padding_mask", padding_mask, logits.rows, "one flag a token");
  }
  if (ctx.checked) select_impl<B>::template check_logits<T>(Selector::name, logits, padding_mask);
  select_impl<B>::template select<T>(ctx, selector, logits, padding_mask, gates, mask);
}

/// Computes the gates of a recorded mask: the selector's weights for the current logits over the
/// experts that the mask names, with gradient as if it had selected them.
///
/// Shapes and padding as in select; mask is read.
/// Throws: as select.
template <class B, class Selector, floating T>
void replay(context<B>& ctx, const Selector& selector, input<T, B> logits,
            vector_input<std::uint8_t, B> padding_mask, output<std::uint32_t, B> mask,
            matrix_view<T, B> gates) {
  selector.validate(logits.cols);
  check_shape(Selector::name, "gates", gates, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "mask", mask, logits.rows, mask_words(logits.cols),
              "tokens, mask words of the experts");
  if (!padding_mask.empty()) {
    check_size(Selector::name, "padding_mask", padding_mask, logits.rows, "one flag a token");
  }
  if (ctx.checked) select_impl<B>::template check_logits<T>(Selector::name, logits, padding_mask);
  select_impl<B>::template replay<T>(ctx, selector, logits, padding_mask, mask, gates);
}

/// Gradient of gates with respect to logits; the mask is a constant.
///
/// Shapes: dgates [N, E], dlogits [N, E] (overwritten); the others as forward left them. Tokens
/// without a set bit, padding among them, get zero.
/// Throws: shape_error.
template <class B, class Selector, floating T>
void select_backward(context<B>& ctx, const Selector& selector, input<T, B> logits,
                     input<T, B> gates, input<std::uint32_t, B> mask, input<T, B> dgates,
                     matrix_view<T, B> dlogits) {
  check_shape(Selector::name, "dgates", dgates, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "dlogits", dlogits, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "gates", gates, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "mask", mask, logits.rows, mask_words(logits.cols),
              "tokens, mask words of the experts");
  select_impl<B>::template select_backward<T>(ctx, selector, logits, gates, mask, dgates, dlogits);
}

}  // namespace talpa::ops
