// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/lanes.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

namespace talpa {

/// One row (a pack of rows for token_pack) as a selector's `select` and `replay` see it. `select`
/// writes mask and gates; `replay` reads mask and writes gates.
template <class T>
struct select_row {
  row_pointer<const T> logits;      // [E]
  row_pointer<T> gates;             // [E]
  row_pointer<std::uint32_t> mask;  // [ceil(E / 32)]
  row_pointer<const T> bias{};      // [E], for a selector with has_bias; the same for every row
  row_scalar<const T> control{};    // one number, for a selector with a control

  /// The mask for reading.
  TALPA_HD row_pointer<const std::uint32_t> recorded() const { return {mask.data, mask.stride}; }
};

/// One row as a selector's `select_backward` sees it; it writes dlogits, and dcontrol where the
/// selector has a control.
template <class T>
struct select_gradient_row {
  row_pointer<const T> logits;            // [E]
  row_pointer<const T> gates;             // [E]
  row_pointer<const std::uint32_t> mask;  // [ceil(E / 32)]
  row_pointer<const T> dgates;            // [E]
  row_pointer<T> dlogits;                 // [E]
  row_pointer<const T> bias{};            // [E], as in select_row
  row_scalar<const T> control{};          // as in select_row
  row_scalar<T> dcontrol{};
};

/// What some selectors look at beside the logits of a token.
template <class T, backend B>
struct select_inputs {
  matrix_view<const T, B> control{};  ///< [N, 1], a number a token: a learned threshold, a lambda
  matrix_view<const T, B> bias{};     ///< [1, E], a number an expert, for the choice alone
  index sequence_length = 0;          ///< tokens a sequence, a divisor of N; 0: one sequence
};

/// A batch as the `assign` of a selector that couples rows sees it.
template <class T, backend B>
struct assign_batch {
  matrix_view<const T, B> logits;                   // [N, E]
  vector_view<const std::uint8_t, B> padding_mask;  // [N] or empty
  select_inputs<T, B> more;

  /// Tokens of one sequence.
  TALPA_HD index sequence() const {
    return more.sequence_length > 0 ? more.sequence_length : logits.rows;
  }
};

namespace detail {

/// The scorer that makes a selector's number a token: its own, or that of the selector it wraps.
template <class S>
TALPA_HD const auto& control_member(const S& selector) {
  if constexpr (requires { selector.control; }) {
    return selector.control;
  } else if constexpr (requires { selector.inner; }) {
    return control_member(selector.inner);
  } else {
    return selector;  // it has none
  }
}

}  // namespace detail

/// A selector that reads a number a token, which a scorer of its own makes from the token.
template <class S>
concept controlled_selector = requires(const S s) {
  typename S::control_scorer;
  requires !std::is_void_v<typename S::control_scorer>;
  { detail::control_member(s) } -> std::convertible_to<const typename S::control_scorer&>;
};
/// A selector that reads a number an expert, `static constexpr bool has_bias = true`.
template <class S>
concept biased_selector = requires {
  requires S::has_bias;
};
/// A selector whose choice for one token depends on the others, `static constexpr bool couples_rows
/// = true`.
template <class S>
concept coupled_selector = requires {
  requires S::couples_rows;
};
/// A selector that says how many registers its `select` needs of a device's threads, `static
/// constexpr int thread_registers`, 64..255: the fewer, the more rows are kept going.
template <class S>
concept tuned_selector = requires {
  { S::thread_registers } -> std::convertible_to<int>;
};
/// A selector that behaves differently in training and at inference: `at(mode)` is the one to use.
template <class S>
concept modal_selector = requires(const S s, mode m) {
  { s.at(m) } -> std::same_as<S>;
};

/// The selector as it is in mode m.
template <class S>
TALPA_HD S selector_at(const S& selector, mode m) {
  if constexpr (modal_selector<S>) {
    return selector.at(m);
  } else {
    return selector;
  }
}

namespace detail {

template <class Selector, class T, class B>
void check_select_inputs(const select_inputs<T, B>& more, index tokens, index experts) {
  if constexpr (controlled_selector<Selector>) {
    check_shape(Selector::name, "control", more.control, tokens, 1, "one number a token");
  }
  if constexpr (biased_selector<Selector>) {
    check_shape(Selector::name, "bias", more.bias, 1, experts, "one number an expert");
  }
  check_sequence_length(Selector::name, more.sequence_length, tokens);
}

/// Throws value_error at the first real token whose logits cannot be normalised.
template <class T>
void check_logit_rows(const char* function, matrix_view<const T, cpu> logits,
                      vector_view<const std::uint8_t, cpu> padding_mask) {
  for (index n = 0; n < logits.rows; ++n) {
    if (!padding_mask.empty() && padding_mask[n] == 0) continue;
    bool finite = false;
    for (index e = 0; e < logits.cols; ++e) {
      const T x = logits(n, e);
      if (std::isnan(x) || x == std::numeric_limits<T>::infinity()) {
        throw_value(function, "logits",
                    concat(std::isnan(x) ? "nan" : "inf", " at ", shape_text(n, e)),
                    "finite values, or -inf = expert masked for this token");
      }
      finite = finite || std::isfinite(x);
    }
    if (!finite) {
      throw_value(function, "logits", concat("-inf in all of row ", std::to_string(n)),
                  "at least one finite value = an expert to choose");
    }
  }
}

}  // namespace detail

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct select_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::select has no implementation for this backend here, include "
                "talpa/cpu/select.hpp for cpu, talpa/cuda/select.hpp for gpu "
                "(docs/architecture.md)");
};

}  // namespace talpa::ops

namespace talpa::detail {

/// The front door of what makes gates by a selector, but for the values of the logits.
template <class T, class B, class Selector>
void check_selection_shapes(const Selector& selector, matrix_view<const T, B> logits,
                            vector_view<const std::uint8_t, B> padding_mask,
                            matrix_view<T, B> gates, matrix_view<std::uint32_t, B> mask,
                            const select_inputs<T, B>& more) {
  selector.validate(logits.cols);
  check_shape(Selector::name, "gates", gates, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "mask", mask, logits.rows, mask_words(logits.cols),
              "tokens, mask words of the experts");
  if (!padding_mask.empty()) {
    check_size(Selector::name, "padding_mask", padding_mask, logits.rows, "one flag a token");
  }
  check_select_inputs<Selector, T, B>(more, logits.rows, logits.cols);
}

/// The front door of what makes gates by a selector.
template <class T, class B, class Selector>
void check_selection(context<B>& ctx, const Selector& selector, matrix_view<const T, B> logits,
                     vector_view<const std::uint8_t, B> padding_mask, matrix_view<T, B> gates,
                     matrix_view<std::uint32_t, B> mask, const select_inputs<T, B>& more) {
  check_selection_shapes<T>(selector, logits, padding_mask, gates, mask, more);
  if (ctx.checked) {
    ops::select_impl<B>::template check_logits<T>(Selector::name, logits, padding_mask);
  }
}

}  // namespace talpa::detail

namespace talpa::ops {

/// Runs a selector over rows of logits.
///
/// Forward: (mask_n, gates_n) = selector(logits_n) for each real token n; padding gets neither. A
/// selector that couples rows assigns the masks of all tokens, then weighs each row by its mask.
/// Shapes: logits [N, E], padding_mask [N] or empty, gates [N, E], mask [N, ceil(E / 32)]; `more`
/// as select_inputs says, for selectors that read it.
/// Edges: -inf is an expert masked for that token; a row with NaN, +inf, or -inf everywhere gets
/// NaN gates on its first max_selected experts.
/// Cost: one pass over the logits.
/// Determinism: same bits on every backend, group and number of threads.
/// Throws: shape_error; value_error from the selector's validate, and in a checked context for
/// logits that would make NaN gates.
template <class B, class Selector, floating T>
void select(context<B>& ctx, const Selector& selector, input<T, B> logits,
            vector_input<std::uint8_t, B> padding_mask, matrix_view<T, B> gates,
            output<std::uint32_t, B> mask,
            const std::type_identity_t<select_inputs<T, B>>& more = {}) {
  detail::check_selection<T>(ctx, selector, logits, padding_mask, gates, mask, more);
  if constexpr (coupled_selector<Selector>) {
    selector.assign(ctx, assign_batch<T, B>{logits, padding_mask, more}, mask);
    select_impl<B>::template replay<T>(ctx, selector, logits, padding_mask, mask, gates, more);
  } else {
    select_impl<B>::template select<T>(ctx, selector, logits, padding_mask, gates, mask, more);
  }
}

/// Computes the gates of a recorded mask: the selector's weights for the current logits over the
/// experts that the mask names, with gradient as if it had selected them.
///
/// Shapes and padding as in select; mask is read.
/// Throws: as select.
template <class B, class Selector, floating T>
void replay(context<B>& ctx, const Selector& selector, input<T, B> logits,
            vector_input<std::uint8_t, B> padding_mask, output<std::uint32_t, B> mask,
            matrix_view<T, B> gates, const std::type_identity_t<select_inputs<T, B>>& more = {}) {
  detail::check_selection<T>(ctx, selector, logits, padding_mask, gates, mask, more);
  select_impl<B>::template replay<T>(ctx, selector, logits, padding_mask, mask, gates, more);
}

/// Gradient of gates with respect to logits, and to the control where the selector has one; the
/// mask is a constant.
///
/// Shapes: dgates [N, E]; dlogits [N, E], dcontrol [N, 1] (overwritten); the others as forward left
/// them. Tokens without a set bit, padding among them, get zero.
/// Throws: shape_error.
template <class B, class Selector, floating T>
void select_backward(context<B>& ctx, const Selector& selector, input<T, B> logits,
                     input<T, B> gates, input<std::uint32_t, B> mask, input<T, B> dgates,
                     matrix_view<T, B> dlogits,
                     const std::type_identity_t<select_inputs<T, B>>& more = {},
                     output<T, B> dcontrol = {}) {
  check_shape(Selector::name, "dgates", dgates, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "dlogits", dlogits, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "gates", gates, logits.rows, logits.cols, "shape of logits");
  check_shape(Selector::name, "mask", mask, logits.rows, mask_words(logits.cols),
              "tokens, mask words of the experts");
  detail::check_select_inputs<Selector, T, B>(more, logits.rows, logits.cols);
  if constexpr (controlled_selector<Selector>) {
    check_shape(Selector::name, "dcontrol", dcontrol, logits.rows, 1, "one number a token");
  }
  select_impl<B>::template select_backward<T>(ctx, selector, logits, gates, mask, dgates, dlogits,
                                              more, dcontrol);
}

}  // namespace talpa::ops
