// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/explain.hpp>
#include <talpa/layers/mixture.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/placements/explain.hpp>

#include <string>
#include <type_traits>
#include <utility>

namespace talpa {

/// Layer that puts adapters beside or inside a mixture: y = base(x) + sum_j c_j f_j(dropout(x)),
/// the coefficients c as the placement says (PERFT-R, -E, -D, -S). Both read the same x.
///
/// Backward: dx = base's + sum_j c_j (df_j/dx)^T dy + placement's; adapters, placement and base get
/// theirs where they train.
/// Shapes: x and y [N, D]; saved: base's, placement's, and what the adapters keep of [N, M R] or
/// [S, R].
/// Edges: as of base, placement and adapters; M = K' = 1 routed with gate 1 equals single.
/// Cost: base's, plus what strategy.hpp counts for the adapters.
/// Determinism: same bits for any number of threads; strategies differ by rounding.
/// Throws: shape_error, value_error before any work.
/// Source: PERFT (arXiv 2411.08212).
template <class Base, class Placement, class Adapter>
struct perft_block {
  static_assert(detail::explain_placement<Placement>() && detail::explain_expert<Adapter>());

  static constexpr const char* name = "perft_block";

  Base base{};
  Placement placement{};
  Adapter adapter{};
  index adapters = 1;  ///< M, >= 1
  strategy execution = strategy::automatic;

  template <class T, class B>
  struct params {
    typename Base::template params<T, B> base;
    typename Placement::template params<T, B> placement;
    typename Adapter::template params<T, B> adapter;

    /// Every parameter in a fixed order: base, placement, adapters.
    template <class F>
    void visit(F f) {
      base.visit(f);
      placement.visit(f);
      adapter.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    typename Base::template saved<T, B> base;            // base.routed: for losses of its router
    typename Placement::template saved<T, B> placement;  // placement.routed, of a routed one
    typename mixture<Adapter>::template saved<T, B> mixed;
  };

  /// Adapters on `base`, which keeps its trainability: freeze it first for adapter tuning.
  /// Parameters are named `prefix`placement.*, `prefix`adapter.*.
  template <class T, class B>
  params<T, B> init(typename Base::template params<T, B> base_params, generator& random,
                    const std::string& prefix = "") const {
    validate<B>();
    const index features = base.output_width(base_params);
    params<T, B> p;
    p.base = std::move(base_params);
    p.placement = placement.template init<T, B>(features, adapters, random,
                                                detail::concat(prefix, "placement."));
    p.adapter = adapter.template init<T, B>(features, features, adapters, random,
                                            detail::concat(prefix, "adapter."));
    return p;
  }

  template <class B = cpu>
  void validate() const {
    check_at_least(name, "adapters", adapters, 1, "at least one adapter");
    base.validate();
    placement.validate(adapters, base.experts);
    mixed().template validate<B>(name);
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return base.output_width(p.base);
  }

  /// Writes y; keeps what backward reads in ctx.memory.
  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, mode m,
                      const std::type_identity_t<batch_info<T, B>>& batch = {}) const {
    validate<B>();
    const index features = output_width(p);
    check_shape(name, "x", x, x.rows, features, "tokens, width of the layer");
    check_shape(name, "y", y, x.rows, features, "tokens, width of the layer");
    const auto dropout = mixed().draw(name, m, batch);
    saved<T, B> kept;
    kept.base = base.forward(ctx, p.base, x, y, m, batch);
    kept.placement = placement.forward(ctx, p.placement, kept.base.applied, adapters, x, m, batch);
    kept.mixed = mixed().forward(ctx, p.adapter, kept.placement.routing, x, y,
                                 grad_mode::accumulate, dropout);
    return kept;
  }

  /// Adds to the gradients of what trains; writes or adds to dx as dx_mode says. `from_losses`
  /// holds gradients of auxiliary losses of the placement's router, `from_base_losses` of the
  /// base's; either may be null.
  template <floating T, backend B>
  void backward(
      context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
      std::type_identity_t<matrix_view<const T, B>> x,
      std::type_identity_t<matrix_view<const T, B>> dy, std::type_identity_t<matrix_view<T, B>> dx,
      grad_mode dx_mode, const std::type_identity_t<routed_gradient<T, B>>* from_losses = nullptr,
      const std::type_identity_t<routed_gradient<T, B>>* from_base_losses = nullptr) const {
    check_shape(name, "x", x, kept.base.routed.logits.rows, output_width(p),
                "tokens of forward, width of the layer");
    check_shape(name, "dy", dy, x.rows, x.cols, "tokens, width of the layer");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    const grad_mode add = dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate;

    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dgates = ctx.scratch.template take<T>(x.rows, adapters);     // [N, M]
    const auto dbase = ctx.scratch.template take<T>(x.rows, base.experts);  // [N, E]
    ops::fill(ctx, T{0}, dbase);
    mixed().backward(ctx, p.adapter, kept.mixed, kept.placement.routing, x, dy, dgates, dx,
                     dx_mode);
    placement.backward(ctx, p.placement, kept.placement, x, dgates, dbase, dx, add, from_losses);
    base.backward(ctx, p.base, kept.base, x, dy, dx, add, from_base_losses, dbase);
  }

 private:
  mixture<Adapter> mixed() const {
    return {adapter, adapters, placement.max_selected(adapters, base.max_selected()), execution};
  }
};

}  // namespace talpa
