// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/pair_gates.hpp>
#include <talpa/placements/explain.hpp>

#include <string>

namespace talpa::placement {

/// params of a placement with a router.
template <class Router, class T, class B>
struct router_params {
  typename Router::template params<T, B> router;

  template <class F>
  void visit(F f) {
    router.visit(f);
  }
};

/// Adapters behind a router of their own: y = base(x) + sum_j g'_j(x) f_j(x), g' = router(x)
/// (PERFT-R).
///
/// Backward, cost, determinism: as the router's.
/// Shapes: logits and gates [N, M].
/// Throws: value_error of the selector.
/// Source: PERFT (arXiv 2411.08212), as the paper and the code for Mixtral have it. The code for
/// OLMoE multiplies by the base's gates instead, so that the router learns nothing from the task.
template <class Router>
struct routed {
  static constexpr const char* name = "placement::routed";
  /// The gates of a token sum to one, so that the one of a single adapter is constant.
  static constexpr bool unit_mass = decltype(Router::selector)::unit_mass;

  Router router{};

  template <class T, class B>
  using params = router_params<Router, T, B>;
  template <class T, class B>
  struct saved {
    routing_view<const T, B> routing;  // [N, M]
    typename Router::template saved<T, B> router;
    routed_view<T, B> routed;  // what losses and statistics read
  };

  void validate(index adapters, index) const { router.selector.validate(adapters); }
  index max_selected(index adapters, index) const { return router.selector.max_selected(adapters); }

  /// Parameters named `prefix`router.*.
  template <class T, class B>
  params<T, B> init(index inputs, index adapters, generator& random,
                    const std::string& prefix) const {
    return {router.template init<T, B>(inputs, adapters, random, prefix + "router.")};
  }
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, const routing_view<const T, B>&,
                      index adapters, input<T, B> x, mode m, const batch_info<T, B>& batch) const {
    saved<T, B> kept;
    kept.router = router.forward(ctx, p.router, adapters, x, m, batch);
    kept.routed = kept.router.routed;
    kept.routing = kept.routed.routing;
    return kept;
  }
  /// dgates is consumed; dx as dx_mode says.
  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                output<T, B> dgates, output<T, B>, output<T, B> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* from_losses) const {
    router.backward(ctx, p.router, kept.router, x, dgates, dx, dx_mode, from_losses);
  }
};

/// Adapters that a router of their own chooses and the gates of the base weigh: the token's first
/// adapter gets its largest gate, the second the next. What the released code of PERFT-R does for
/// OLMoE; for what the paper says take `routed`.
///
/// Backward: the gradients of the weights go to the base's router; the adapters' router gets those
/// of its losses alone, so that nothing of the task reaches its choice.
/// Shapes: logits and gates [N, M].
/// Edges: as pair_gates. Cost and determinism: as the router and pair_gates.
/// Throws: value_error of the selector, and when a token may choose more adapters than experts,
/// where the original fails.
/// Source: the code of PERFT (arXiv 2411.08212).
template <class Router>
struct base_weighted {
  static constexpr const char* name = "placement::base_weighted";

  Router router{};

  template <class T, class B>
  using params = router_params<Router, T, B>;
  template <class T, class B>
  struct saved {
    routing_view<const T, B> routing;  // [N, M], gates of the base
    typename Router::template saved<T, B> router;
    routed_view<T, B> routed;       // what losses and statistics read: gates of the own router
    routing_view<const T, B> base;  // [N, E]
  };

  void validate(index adapters, index) const { router.selector.validate(adapters); }
  index max_selected(index adapters, index base_selected) const {
    const index own = router.selector.max_selected(adapters);
    check_range(name, "k", own, 1, base_selected, "experts of the base a token");
    return own;
  }

  /// Parameters named `prefix`router.*.
  template <class T, class B>
  params<T, B> init(index inputs, index adapters, generator& random,
                    const std::string& prefix) const {
    return {router.template init<T, B>(inputs, adapters, random, prefix + "router.")};
  }
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, const routing_view<const T, B>& base,
                      index adapters, input<T, B> x, mode m, const batch_info<T, B>& batch) const {
    saved<T, B> kept;
    kept.router = router.forward(ctx, p.router, adapters, x, m, batch);
    kept.routed = kept.router.routed;
    kept.base = base;
    const auto gates = ctx.memory.template take<T>(x.rows, adapters);  // [N, M]
    ops::pair_gates(ctx, kept.routed.logits, kept.routed.routing.mask, kept.base.gates,
                    kept.base.mask, gates);
    kept.routing = kept.routed.routing;
    kept.routing.gates = gates;
    return kept;
  }
  /// dgates is consumed; dx as dx_mode says.
  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                output<T, B> dgates, output<T, B> dbase, output<T, B> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* from_losses) const {
    ops::pair_gates_backward(ctx, kept.routed.logits, kept.routed.routing.mask, kept.base.gates,
                             kept.base.mask, matrix_view<const T, B>(dgates),
                             matrix_view<T, B>(dbase));
    ops::fill(ctx, T{0}, matrix_view<T, B>(dgates));
    router.backward(ctx, p.router, kept.router, x, dgates, dx, dx_mode, from_losses);
  }
};

}  // namespace talpa::placement
