// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/core/view.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/ops/indexed_gemm.hpp>
#include <talpa/ops/routed_linear.hpp>
#include <talpa/ops/segments.hpp>

#include <concepts>
#include <type_traits>

namespace talpa {

/// Has a name for errors and reports, and `validate()` for its hyperparameters.
template <class X>
concept expert_has_name = requires(const X x) {
  { X::name } -> std::convertible_to<const char*>;
  { x.validate() } -> std::same_as<void>;
};
/// Nested `params<T, B>`: the stacked bank of all experts; `saved<T, B>`: what backward reads.
template <class X>
concept expert_has_params = requires {
  typename X::template params<float, cpu>;
  typename X::template saved<float, cpu>;
}
&&std::is_trivially_destructible_v<typename X::template saved<float, cpu>>;
/// `init(D, O, E, generator, prefix)` makes the bank.
template <class X>
concept expert_has_init = requires(const X x, index n, generator& random, const char* prefix) {
  {
    x.template init<float, cpu>(n, n, n, random, prefix)
    } -> std::same_as<typename X::template params<float, cpu>>;
};
/// `width()`: hidden columns of one expert; `input_dropout()`: share of the input to drop before.
template <class X>
concept expert_has_width = requires(const X x) {
  { x.width() } -> std::same_as<index>;
  { x.input_dropout() } -> std::same_as<double>;
};
/// `forward_grouped` over the slots of segments, gates applied.
template <class X>
concept expert_has_forward = requires(const X x, context<cpu>& ctx,
                                      const typename X::template params<float, cpu>& params,
                                      const segments<cpu>& slots,
                                      vector_view<const float, cpu> gates,
                                      matrix_view<const float, cpu> in,
                                      matrix_view<float, cpu> out) {
  {
    x.forward_grouped(ctx, params, slots, gates, in, out)
    } -> std::same_as<typename X::template saved<float, cpu>>;
};
/// `backward_grouped` of the same.
template <class X>
concept expert_has_backward = requires(const X x, context<cpu>& ctx,
                                       typename X::template params<float, cpu>& params,
                                       const typename X::template saved<float, cpu>& saved,
                                       const segments<cpu>& slots, vector_view<float, cpu> gates,
                                       matrix_view<float, cpu> m) {
  {
    x.backward_grouped(ctx, params, saved, slots, gates, m, m, gates, m, grad_mode::overwrite)
    } -> std::same_as<void>;
};

/// The function behind a gate, over a stacked bank of E experts.
template <class X>
concept expert_policy = expert_has_name<X> && expert_has_params<X> && expert_has_init<X> &&
    expert_has_width<X> && expert_has_forward<X> && expert_has_backward<X>;

/// An expert that is linear in its input and so may be gated in rank space, all experts at once:
/// `forward_masked` adds to y, `backward_masked` is its gradient.
template <class X>
concept rank_space_expert = expert_policy<X> &&
    requires(const X x, context<cpu>& ctx, typename X::template params<float, cpu>& params,
             const typename X::template saved<float, cpu>& saved, matrix_view<float, cpu> m) {
  {
    x.forward_masked(ctx, params, m, m, m)
    } -> std::same_as<typename X::template saved<float, cpu>>;
  {
    x.backward_masked(ctx, params, saved, m, m, m, m, m, grad_mode::overwrite)
    } -> std::same_as<void>;
};

/// An expert that can read and write rows of tokens by index, without copies of them:
/// `forward_indexed` writes or adds to y, `backward_indexed` is its gradient. Either takes a
/// product that it forms on the way, so that y is written once, and the latter a function to call
/// when dgates is there, whose product it adds to dx, and the mask that x has been through, if the
/// backend keeps it.
template <class X>
concept indexed_expert = rank_space_expert<X> &&
    requires(const X x, context<cpu>& ctx, typename X::template params<float, cpu>& params,
             const typename X::template saved<float, cpu>& saved, const segments<cpu>& slots,
             vector_view<float, cpu> gates, matrix_view<float, cpu> m,
             const packed_product<float, cpu>& base, const no_more<float, cpu>& more,
             const dropout_bits<cpu>& dropped) {
  {
    x.forward_indexed(ctx, params, slots, gates, m, m, grad_mode::overwrite, base)
    } -> std::same_as<typename X::template saved<float, cpu>>;
  {
    x.backward_indexed(ctx, params, saved, slots, gates, m, m, gates, m, grad_mode::overwrite, base,
                       more, dropped)
    } -> std::same_as<void>;
};

/// An expert whose share of a layer ops::routed_linear can form: `adapter` names its factors, what
/// it saves is A x over the slots, and `bank_gradients` adds what backward leaves to be done.
template <class X>
concept routed_linear_expert = indexed_expert<X> &&
    requires(const X x, context<cpu>& ctx, typename X::template params<float, cpu>& params,
             const segments<cpu>& slots, vector_view<const float, cpu> gates,
             matrix_view<float, cpu> m) {
  { x.adapter(params, m, index{1}) } -> std::same_as<routed_adapter<float, cpu>>;
  {
    x.bank_gradients(ctx, params, typename X::template saved<float, cpu>{m}, slots, gates, m, m, m)
    } -> std::same_as<void>;
};

/// An expert that looks at rows of slots only as far as offsets say that there are some, `static
/// constexpr bool slots_only = true`: rows behind the last one may hold anything, and a step on a
/// device need not wait for their number.
template <class X>
concept slots_only_expert = requires {
  requires X::slots_only;
};
/// One of them that adds up over all rows of slots as well, `static constexpr bool sums_slots =
/// true`: in backward_grouped rows of x and dy behind the last slot are zero, and it makes those of
/// the other factor so (ops::clear_unused).
template <class X>
concept slot_summing_expert = slots_only_expert<X> && requires {
  requires X::sums_slots;
};

/// An expert that drops part of what lies inside of it: `hidden_dropout()` is the share, and
/// forward takes the mask of the call as its last argument.
template <class X>
concept drops_hidden = expert_policy<X> &&
    requires(const X x, context<cpu>& ctx, typename X::template params<float, cpu>& params,
             const segments<cpu>& slots, vector_view<const float, cpu> gates,
             matrix_view<float, cpu> m, const dropout_mask& mask) {
  { x.hidden_dropout() } -> std::same_as<double>;
  {
    x.forward_grouped(ctx, params, slots, gates, m, m, mask)
    } -> std::same_as<typename X::template saved<float, cpu>>;
};

/// An expert whose bank looks at the map that it adapts: `adapt(base, E, generator, prefix)` makes
/// a bank on a frozen weight [O, D] that somebody else owns.
template <class X>
concept base_adapting_expert = expert_policy<X> &&
    requires(const X x, matrix_view<float, cpu> base, index n, generator& random,
             const char* prefix) {
  {
    x.template adapt<float, cpu>(base, n, random, prefix)
    } -> std::same_as<typename X::template params<float, cpu>>;
};

}  // namespace talpa
