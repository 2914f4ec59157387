// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/placements/explain.hpp>

#include <string>

namespace talpa::placement {

/// Adapters behind a router of their own: y = base(x) + sum_j g'_j(x) f_j(x), g' = router(x)
/// (PERFT-R).
///
/// Backward: as the router's.
/// Shapes: logits and gates [N, M].
/// Throws: value_error of the selector.
/// Source: PERFT (arXiv 2411.08212), as the paper and the code for Mixtral have it. The code for
/// OLMoE multiplies by the base's gates instead, so that the router learns nothing from the task.
template <class Router>
struct routed {
  static constexpr const char* name = "placement::routed";

  Router router{};

  template <class T, class B>
  struct params {
    typename Router::template params<T, B> router;

    template <class F>
    void visit(F f) {
      router.visit(f);
    }
  };
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
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, const base_routing<T, B>&,
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

}  // namespace talpa::placement
