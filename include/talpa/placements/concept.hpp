// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/mode.hpp>
#include <talpa/core/random.hpp>
#include <talpa/routing/routing.hpp>

#include <concepts>
#include <type_traits>

namespace talpa {

namespace placement {

/// params of a placement that learns nothing.
struct no_params {
  template <class F>
  void visit(F) {}
};

}  // namespace placement

/// Has a name for errors, and `validate(adapters, base_experts)`.
template <class P>
concept placement_has_name = requires(const P p, index n) {
  { P::name } -> std::convertible_to<const char*>;
  { p.validate(n, n) } -> std::same_as<void>;
};
/// Nested `params<T, B>` with `visit`, and `saved<T, B>` with `routing`: the adapters' gates.
template <class P>
concept placement_has_params = requires(typename P::template params<float, cpu> params,
                                        const typename P::template saved<float, cpu> saved) {
  { saved.routing } -> std::convertible_to<routing_view<const float, cpu>>;
}
&&std::is_trivially_destructible_v<typename P::template saved<float, cpu>>;
/// `max_selected(adapters, base's max_selected)`: most adapters of a token.
template <class P>
concept placement_has_max_selected = requires(const P p, index n) {
  { p.max_selected(n, n) } -> std::same_as<index>;
};
/// `init(D, adapters, generator, prefix)`, `forward` and `backward`.
template <class P>
concept placement_runs = requires(const P p, context<cpu>& ctx, index n, generator& random,
                                  typename P::template params<float, cpu>& params,
                                  const typename P::template saved<float, cpu>& saved,
                                  const routing_view<const float, cpu>& base,
                                  matrix_view<float, cpu> m, const batch_info<float, cpu>& batch,
                                  const routed_gradient<float, cpu>* losses) {
  {
    p.template init<float, cpu>(n, n, random, "")
    } -> std::same_as<typename P::template params<float, cpu>>;
  {
    p.forward(ctx, params, base, n, m, mode::training, batch)
    } -> std::same_as<typename P::template saved<float, cpu>>;
  {
    p.backward(ctx, params, saved, m, m, m, m, grad_mode::overwrite, losses)
    } -> std::same_as<void>;
};

/// Where adapters sit round a base mixture: who makes the gates of the adapters.
template <class P>
concept placement_policy = placement_has_name<P> && placement_has_params<P> &&
    placement_has_max_selected<P> && placement_runs<P>;

}  // namespace talpa
