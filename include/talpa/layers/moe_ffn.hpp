// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/glu_ffn.hpp>
#include <talpa/layers/mixture.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/routing/always_on.hpp>

#include <cmath>
#include <concepts>
#include <string>
#include <type_traits>

namespace talpa {

namespace detail {

/// An expert that knows the width of what a bank writes.
template <class X>
concept sized_expert = requires(const X x, const typename X::template params<float, cpu>& p) {
  { x.output_width(p) } -> std::same_as<index>;
};

}  // namespace detail

/// Layer that is a mixture of feed-forward networks:
/// y = scale sum_e g_e(x) f_e(x) + sum_s h_s(x) + residual x, g = router(x), h_s shared experts
/// that are always on.
///
/// Backward: dg_e = scale <dy, f_e>, dx = sum_e scale g_e (df_e/dx)^T dy + sum_s (dh_s/dx)^T dy +
/// residual dy + router's share; router, experts and shared experts get theirs where they train.
/// The mask is a constant.
/// Shapes: x and y [N, D]; saved: what the router keeps, scaled gates [N, E] where scale is not 1,
/// and what the experts keep of [S, .] with S set bits of the mask.
/// Edges: N = 0; experts without tokens get zero gradients; padding gets shared experts and
/// residual alone.
/// Cost: the router's, and that of the experts for S + N shared_experts slots; gathers and adds up
/// S D numbers.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error, value_error before any work.
/// Source: Mixtral (arXiv 2401.04088), OLMoE (arXiv 2409.02060); shared experts and scale
/// DeepSeekMoE (arXiv 2401.06066); residual Parrot (arXiv 2406.02539).
template <class Router, class Expert = swiglu>
struct moe_ffn {
  static_assert(detail::sized_expert<Expert>,
                "talpa: moe_ffn asks its expert for the width of a bank, add: template <class T, "
                "class B> talpa::index output_width(const params<T, B>&) const; "
                "(docs/policies/expert.md)");

  static constexpr const char* name = "moe_ffn";

  Router router{};
  Expert expert{};
  index experts = 8;         ///< E, >= 1
  Expert shared{};           ///< looked at where shared_experts > 0
  index shared_experts = 0;  ///< >= 0
  double scale = 1.0;        ///< of the routed experts, finite
  double residual = 0.0;     ///< of x, finite

  template <class T, class B>
  using bank = typename Expert::template params<T, B>;

  template <class T, class B>
  struct params {
    typename Router::template params<T, B> router;
    bank<T, B> expert;
    bank<T, B> shared;  // of default-made parameters without shared experts

    /// Every parameter in a fixed order: router, experts, shared experts.
    template <class F>
    void visit(F f) {
      router.visit(f);
      expert.visit(f);
      shared.visit([&](parameter<T, B>& p) {
        if (p.exists()) f(p);
      });
    }
    void freeze() {
      visit([](parameter<T, B>& p) { p.freeze(); });
    }
  };

  template <class T, class B>
  struct saved {
    typename Router::template saved<T, B> router;
    routed_view<T, B> routed;            // what losses and statistics read
    routing_view<const T, B> applied{};  // the routing with scale in its gates
    typename mixture<Expert>::template saved<T, B> mixed;
    routing_view<const T, B> on{};  // of the shared experts
    typename mixture<Expert>::template saved<T, B> always;
  };

  /// Parameters named `prefix`router.*, `prefix`expert.*, `prefix`shared.*.
  template <class T, class B>
  params<T, B> init(index features, generator& random, const std::string& prefix = "") const {
    validate();
    params<T, B> p;
    p.router =
        router.template init<T, B>(features, experts, random, detail::concat(prefix, "router."));
    p.expert = expert.template init<T, B>(features, features, experts, random,
                                          detail::concat(prefix, "expert."));
    if (shared_experts > 0) {
      p.shared = shared.template init<T, B>(features, features, shared_experts, random,
                                            detail::concat(prefix, "shared."));
    }
    return p;
  }

  void validate() const {
    mixed().validate(name);
    router.selector.validate(experts);
    check_at_least(name, "shared_experts", shared_experts, 0, "experts that are always on");
    if (shared_experts > 0) always().validate(name);
    check_value(std::isfinite(scale), name, "scale", scale, "a finite number");
    check_value(std::isfinite(residual), name, "residual", residual, "a finite number");
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return expert.output_width(p.expert);
  }
  /// Most experts of a token.
  index max_selected() const { return router.selector.max_selected(experts); }

  /// Writes y; keeps what backward reads in ctx.memory.
  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, mode m,
                      const std::type_identity_t<batch_info<T, B>>& batch = {}) const {
    validate();
    const index features = output_width(p);
    check_shape(name, "x", x, x.rows, features, "tokens, width of the layer");
    check_shape(name, "y", y, x.rows, features, "tokens, width of the layer");
    const auto dropout = mixed().draw(name, m, batch);
    const auto of_shared = shared_experts > 0
                               ? always().draw(name, m, batch)
                               : typename mixture<Expert>::template drawn_dropout<B>{};

    saved<T, B> kept;
    kept.router = router.forward(ctx, p.router, experts, x, m, batch);
    kept.routed = kept.router.routed;
    kept.applied = kept.routed.routing;
    if (scale != 1.0) {
      const auto scaled = ctx.memory.template take<T>(x.rows, experts);  // [N, E]
      ops::scale(ctx, static_cast<T>(scale), kept.routed.routing.gates, scaled);
      kept.applied.gates = scaled;
    }
    kept.mixed = mixed().forward(ctx, p.expert, kept.applied, x, y, grad_mode::overwrite, dropout);
    if (shared_experts > 0) {
      kept.on = always_on<T>(ctx, ctx.memory, x.rows, shared_experts);
      kept.always =
          always().forward(ctx, p.shared, kept.on, x, y, grad_mode::accumulate, of_shared);
    }
    if (residual != 0.0) ops::axpy(ctx, static_cast<T>(residual), x, y);
    return kept;
  }

  /// Adds to the gradients of what trains; writes or adds to dx as dx_mode says. `from_losses`, if
  /// given, holds gradients of auxiliary losses with respect to logits and gates; `dapplied`, if
  /// not empty, gradients of the gates as the experts saw them, from whatever else read them.
  template <floating T, backend B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<const T, B>> dy,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* from_losses = nullptr,
                std::type_identity_t<matrix_view<const T, B>> dapplied = {}) const {
    check_shape(name, "x", x, kept.routed.logits.rows, output_width(p),
                "tokens of forward, width of the layer");
    check_shape(name, "dy", dy, x.rows, x.cols, "tokens, width of the layer");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    const grad_mode add = dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate;

    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dgates = ctx.scratch.template take<T>(x.rows, experts);  // [N, E]
    mixed().backward(ctx, p.expert, kept.mixed, kept.applied, x, dy, dgates, dx, dx_mode);
    if (!dapplied.empty()) ops::axpy(ctx, T{1}, dapplied, dgates);
    if (scale != 1.0) ops::scale(ctx, static_cast<T>(scale), dgates, dgates);
    router.backward(ctx, p.router, kept.router, x, dgates, dx, add, from_losses);
    if (shared_experts > 0) {
      const auto unwanted = ctx.scratch.template take<T>(x.rows, shared_experts);
      always().backward(ctx, p.shared, kept.always, kept.on, x, dy, unwanted, dx, add);
    }
    if (residual != 0.0 && dx_mode != grad_mode::ignore) {
      ops::axpy(ctx, static_cast<T>(residual), dy, dx);
    }
  }

 private:
  mixture<Expert> mixed() const { return {expert, experts, max_selected(), strategy::automatic}; }
  mixture<Expert> always() const {
    return {shared, shared_experts, shared_experts, strategy::automatic};
  }
};

}  // namespace talpa
