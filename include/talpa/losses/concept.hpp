// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/view.hpp>
#include <talpa/routing/routing.hpp>

#include <concepts>
#include <span>
#include <type_traits>

namespace talpa {

/// Has a name for errors and reports.
template <class L>
concept loss_has_name = requires {
  { L::name } -> std::convertible_to<const char*>;
};
/// Nested `saved<T, B>`: what backward reads; plain views, trivially destructible.
template <class L>
concept loss_has_saved = requires {
  typename L::template saved<float, cpu>;
}
&&std::is_trivially_destructible_v<typename L::template saved<float, cpu>>;
/// `saved.value`: the loss, [1, 1] in memory of the backend.
template <class L>
concept loss_has_value = requires(const typename L::template saved<float, cpu>& saved) {
  { saved.value } -> std::convertible_to<matrix_view<const float, cpu>>;
};
/// `forward(ctx, layers)` returns saved.
template <class L>
concept loss_has_forward = requires(const L l, context<cpu>& ctx,
                                    std::span<const routed_view<float, cpu>> layers) {
  { l.forward(ctx, layers) } -> std::same_as<typename L::template saved<float, cpu>>;
};
/// `backward(ctx, layers, saved, dvalue, out, grad_mode)` writes or adds to dlogits and dgates.
template <class L>
concept loss_has_backward = requires(const L l, context<cpu>& ctx,
                                     std::span<const routed_view<float, cpu>> layers,
                                     const typename L::template saved<float, cpu>& saved,
                                     matrix_view<const float, cpu> dvalue,
                                     std::span<const routed_gradient<float, cpu>> out,
                                     grad_mode m) {
  { l.backward(ctx, layers, saved, dvalue, out, m) } -> std::same_as<void>;
};

/// Auxiliary objective on what the routers of one or more layers did: a value, and its gradient
/// with respect to their logits and gates. Its weight in the total is dvalue, chosen by the caller.
template <class L>
concept loss_policy = loss_has_name<L> && loss_has_saved<L> && loss_has_value<L> &&
    loss_has_forward<L> && loss_has_backward<L>;

}  // namespace talpa
