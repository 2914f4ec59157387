// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/core/mode.hpp>
#include <talpa/core/scalar.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/ops/packed_gemm.hpp>
#include <talpa/ops/segments.hpp>
#include <talpa/ops/select.hpp>

#include <concepts>
#include <cstdint>
#include <string>
#include <type_traits>

// A linear map with a packed weight and its routed low-rank adapter in one pass over the tokens:
// rows of x (of dy) are routed and shrunk by the task that forms their product, when they are in
// the near caches.

namespace talpa {

/// Backends that have the ops of this file.
template <class B>
inline constexpr bool has_routed_linear = std::same_as<B, cpu>;

/// What adapts a linear map D -> O: a linear router and a bank of low-rank experts.
template <class T, class B>
struct routed_adapter {
  matrix_view<const T, B> router;         ///< [E, D]
  matrix_view<const T, B> a;              ///< [E R, D]
  matrix_view<const T, B> b;              ///< [E R, O]
  T scale{1};                             ///< of every gate
  index max_selected = 1;                 ///< most experts of a token, 1..E
  matrix_view<const T, B> router_bias{};  ///< [1, E], or none

  index experts() const { return router.rows; }
  index ranks() const { return a.rows / router.rows; }
};

/// Dropout of what the experts read: a mask that the op draws and writes. None where not active.
template <class B>
struct routed_dropout {
  dropout_mask mask{};
  matrix_view<std::uint32_t, B> words{};  ///< [N, ceil(D / 32)], as those of dropout_bits
};

/// Logits and what a selector makes of them: T is const where they are there already.
template <class T, class B>
struct routed_choice {
  using word = std::conditional_t<std::is_const_v<T>, const std::uint32_t, std::uint32_t>;

  matrix_view<T, B> logits;                         ///< [N, E]
  matrix_view<T, B> gates;                          ///< [N, E]
  matrix_view<word, B> mask;                        ///< [N, ceil(E / 32)]
  select_inputs<std::remove_const_t<T>, B> more{};  ///< what the selector reads beside logits
};

namespace detail {

template <class T, class B, class Choice>
void check_adapter(const char* function, const routed_adapter<T, B>& adapter, const Choice& routed,
                   index tokens) {
  const index experts = adapter.experts();
  check_at_least(function, "experts", experts, 1, "at least one row of the router");
  if (adapter.a.rows % experts != 0) {
    throw_shape(function, "a", shape_text(adapter.a.rows, adapter.a.cols),
                concat("[multiple of ", std::to_string(experts), ", ...]"), "ranks of all experts");
  }
  check_shape(function, "b", adapter.b, adapter.a.rows, adapter.b.cols, "rows of a");
  check_range(function, "max_selected", adapter.max_selected, 1, experts, "experts of a token");
  if (!adapter.router_bias.empty()) {
    check_shape(function, "router_bias", adapter.router_bias, 1, experts,
                "one row, rows of the router");
  }
  check_shape(function, "logits", routed.logits, tokens, experts, "tokens, rows of the router");
  check_shape(function, "gates", routed.gates, tokens, experts, "shape of logits");
  check_shape(function, "mask", routed.mask, tokens, mask_words(experts),
              "tokens, mask words of the experts");
}

/// A packed product a b with rows of a and columns of b as given, and a bias that fits.
template <class T, class B>
void check_product(const char* function, const char* name, const packed_product<T, B>& product,
                   index inputs, index outputs) {
  check_shape(function, name, product.a, product.a.rows, product.b->rows(), "rows of the product");
  if (product.b->rows() != inputs || product.b->cols() != outputs) {
    throw_shape(function, "base", product.b->rows(), product.b->cols(), inputs, outputs,
                "columns of the bank's factors");
  }
  check_product_bias(function, product);
}

}  // namespace detail

}  // namespace talpa

namespace talpa::ops {

template <class B>
struct routed_linear_impl {
  static_assert(detail::always_false<B>,
                "talpa: ops::routed_linear has no implementation for this backend here, include "
                "talpa/cpu/routed_linear.hpp for cpu (docs/architecture.md)");
};

/// Whether the ops of this file are the faster way for N tokens, a packed weight [K, Q] and E
/// experts, for any number of threads. They do not look at logits for a checked context.
template <class B, floating T>
bool routed_linear_pays(const context<B>& ctx, const packed_matrix<T, B>& base, index tokens,
                        index experts) {
  return routed_linear_impl<B>::template pays<T>(ctx, base, tokens, experts);
}

/// A linear map and its routed adapter: logits = x router^T (+ router_bias),
/// (gates, mask) = selector(logits), y = x W^T (+ bias) + sum_e s g_e B_e^T A_e dropout(x) over the
/// experts of each token.
///
/// What gemm, add_bias, select, dropout, indexed_shrink, rank_gate and indexed_expand on top of the
/// base do one after the other, the same terms in the same order, in one pass over x and one over
/// y.
/// Backward: routed_linear_backward.
/// Shapes: `base` x [N, D], W^T packed and bias [1, O] or none; `routed` is written but for its
/// `more`; u [N K, R] with K = max_selected: row n K + j is A_e x of token n's j-th expert in
/// ascending order; y [N, O]; what `dropped` has been given to write is there afterwards.
/// Edges: padding gets the base alone; rows of u beyond a token's experts are left as they were.
/// Cost: 2 N D (O + E) flop and 2 R (D + O) a slot; in scratch a copy of b, the terms of N K
/// slots and, for dropout, some rows of x for each thread.
/// Determinism: the same bits for any number of threads.
/// Throws: shape_error; value_error from the selector's validate and of dropout.
template <class B, class Selector, floating T>
requires(!coupled_selector<Selector>) void routed_linear(
    context<B>& ctx, const Selector& selector, const routed_adapter<T, B>& adapter,
    const std::type_identity_t<packed_product<T, B>>& base,
    vector_input<std::uint8_t, B> padding_mask,
    const std::type_identity_t<routed_choice<T, B>>& routed, output<T, B> u, output<T, B> y,
    const routed_dropout<B>& dropped = {}) {
  const char* const name = "ops::routed_linear";
  const index tokens = base.a.rows, experts = adapter.experts();
  detail::check_adapter<T, B>(name, adapter, routed, tokens);
  detail::check_product<T, B>(name, "x", base, adapter.a.cols, adapter.b.cols);
  check_shape(name, "router", adapter.router, experts, adapter.a.cols, "experts, columns of a");
  check_shape(name, "u", u, tokens * adapter.max_selected, adapter.ranks(),
              "max_selected places a token, ranks of an expert");
  check_shape(name, "y", y, tokens, adapter.b.cols, "tokens, columns of b");
  detail::check_selection_shapes<T>(selector, matrix_view<const T, B>(routed.logits), padding_mask,
                                    routed.gates, routed.mask, routed.more);
  if (dropped.mask.active) {
    detail::check_bits<B>(name, {dropped.words, dropped.mask.keep}, tokens, base.a.cols);
  }
  routed_linear_impl<B>::template forward<T>(ctx, selector, adapter, base, padding_mask, routed, u,
                                             y, dropped);
}

/// Rows of slots in the order of `slots` from those of routed_linear: out[s] = u[n K + j] for each
/// slot s, which is the j-th of its token n.
///
/// Shapes: u [N K, R], out [S, R] with S the capacity of `slots`.
/// Throws: shape_error.
template <class B, floating T>
void rows_of_slots(context<B>& ctx, const segments<B>& slots, index most, input<T, B> u,
                   matrix_view<T, B> out) {
  check_shape("ops::rows_of_slots", "u", u, slots.tokens() * most, u.cols, "places of the tokens");
  check_shape("ops::rows_of_slots", "out", out, slots.capacity(), u.cols,
              "places for slots, columns of u");
  routed_linear_impl<B>::template rows_of_slots<T>(ctx, slots, most, u, out);
}

/// What backward of a routed linear map reads beside `routed`.
template <class T, class B>
struct routed_slots {
  segments<B> slots;
  vector_view<const T, B> gates;  ///< [S]
  matrix_view<const T, B> u;      ///< [S, R], A_e dropout(x)
  dropout_bits<B> dropout{};      ///< of x
};

/// Backward of routed_linear but for the parameters: with dz = dy B_e^T for each slot,
/// dgates = s <dz, u> + those of losses, dlogits = selector's + those of losses, du = s g dz,
/// dx (+)= dy W + what dropout leaves of sum_e du A_e + dlogits router.
///
/// What indexed_shrink, rank_gate_backward, build_segments_backward, select_backward and
/// indexed_expand do one after the other, in one pass over dy and one over dx. The gradients of
/// router, a and b are outer_products of dlogits, du and z = s g u with x, dropout(x) and dy; those
/// of the biases sums of rows of dlogits and dy.
/// Shapes: `base` dy [N, O] and W packed; `from_losses` logits and gates [N, E] each or empty, read
/// only; dgates, dlogits [N, E] and du [S, R] are overwritten; dx [N, D].
/// Throws: shape_error.
template <class B, class Selector, floating T>
requires(!coupled_selector<Selector>) void routed_linear_backward(
    context<B>& ctx, const Selector& selector, const routed_adapter<T, B>& adapter,
    const std::type_identity_t<packed_product<T, B>>& base,
    const std::type_identity_t<routed_choice<const T, B>>& routed,
    const std::type_identity_t<routed_slots<T, B>>& kept, input<T, B> dlogits_of_losses,
    input<T, B> dgates_of_losses, output<T, B> dgates, output<T, B> dlogits, output<T, B> du,
    output<T, B> dx, grad_mode dx_mode) {
  const char* const name = "ops::routed_linear_backward";
  const index tokens = base.a.rows, experts = adapter.experts();
  detail::check_adapter<T, B>(name, adapter, routed, tokens);
  detail::check_product<T, B>(name, "dy", base, adapter.b.cols, adapter.a.cols);
  check_shape(name, "u", kept.u, kept.slots.capacity(), adapter.ranks(),
              "places for slots, ranks of an expert");
  check_size(name, "gates", kept.gates, kept.slots.capacity(), "places for slots");
  check_shape(name, "du", du, kept.u.rows, kept.u.cols, "shape of u");
  check_shape(name, "dgates", dgates, tokens, experts, "shape of logits");
  check_shape(name, "dlogits", dlogits, tokens, experts, "shape of logits");
  check_shape(name, "dx", dx, tokens, adapter.a.cols, "tokens, columns of a");
  detail::check_kept(name, kept.dropout, tokens, adapter.a.cols);
  if (!dlogits_of_losses.empty()) {
    check_shape(name, "dlogits of losses", dlogits_of_losses, tokens, experts, "shape of logits");
  }
  if (!dgates_of_losses.empty()) {
    check_shape(name, "dgates of losses", dgates_of_losses, tokens, experts, "shape of logits");
  }
  routed_linear_impl<B>::template backward<T>(ctx, selector, adapter, base, routed, kept,
                                              dlogits_of_losses, dgates_of_losses, dgates, dlogits,
                                              du, dx, dx_mode);
}

}  // namespace talpa::ops
