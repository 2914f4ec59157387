// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/view.hpp>
#include <talpa/routing/routing.hpp>

#include <concepts>
#include <type_traits>

namespace talpa {

/// Has a name for errors and reports.
template <class S>
concept scorer_has_name = requires {
  { S::name } -> std::convertible_to<const char*>;
};
/// Nested `params<T, B>`: the router's parameters.
template <class S>
concept scorer_has_params = requires {
  typename S::template params<float, cpu>;
};
/// Nested `saved<T, B>`: what backward reads; plain views, trivially destructible.
template <class S>
concept scorer_has_saved = requires {
  typename S::template saved<float, cpu>;
}
&&std::is_trivially_destructible_v<typename S::template saved<float, cpu>>;
/// `init(D, E, generator, prefix)` makes the parameters.
template <class S>
concept scorer_has_init = requires(const S s, index n, generator& random, const char* prefix) {
  {
    s.template init<float, cpu>(n, n, random, prefix)
    } -> std::same_as<typename S::template params<float, cpu>>;
};
/// `forward(ctx, params, x [N, D], logits [N, E], mode, batch)` returns saved.
template <class S>
concept scorer_has_forward = requires(const S s, context<cpu>& ctx,
                                      const typename S::template params<float, cpu>& params,
                                      matrix_view<const float, cpu> x,
                                      matrix_view<float, cpu> logits, mode m,
                                      const batch_info<float, cpu>& batch) {
  {
    s.forward(ctx, params, x, logits, m, batch)
    } -> std::same_as<typename S::template saved<float, cpu>>;
};
/// `backward(ctx, params, saved, x, dlogits, dx, grad_mode)` adds to parameter gradients.
template <class S>
concept scorer_has_backward = requires(const S s, context<cpu>& ctx,
                                       typename S::template params<float, cpu>& params,
                                       const typename S::template saved<float, cpu>& saved,
                                       matrix_view<const float, cpu> x, matrix_view<float, cpu> dx,
                                       grad_mode m) {
  { s.backward(ctx, params, saved, x, x, dx, m) } -> std::same_as<void>;
};

/// Makes scores [N, E] from tokens [N, D].
template <class S>
concept scorer_policy = scorer_has_name<S> && scorer_has_params<S> && scorer_has_saved<S> &&
    scorer_has_init<S> && scorer_has_forward<S> && scorer_has_backward<S>;

/// A scorer that adds noise to its logits and shows it to losses: `noise(saved, logits)` gives the
/// clean logits and the deviation, and backward takes the gradients of losses on them behind its
/// other arguments.
template <class S>
concept noisy_scorer = scorer_policy<S> &&
    requires(const S s, context<cpu>& ctx, typename S::template params<float, cpu>& params,
             const typename S::template saved<float, cpu>& saved, matrix_view<const float, cpu> x,
             matrix_view<float, cpu> dx, grad_mode m,
             const routed_noise_gradient<float, cpu>& dnoise) {
  { s.noise(saved, x) } -> std::same_as<routed_noise<float, cpu>>;
  { s.backward(ctx, params, saved, x, x, dx, m, dnoise) } -> std::same_as<void>;
};

}  // namespace talpa
