// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/parameter.hpp>
#include <talpa/core/half.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/experts/parallel_adapter.hpp>
#include <talpa/layers/fused_moe_ffn.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/convert.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/pair_gates.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/route.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/placements/dense.hpp>
#include <talpa/placements/embedded.hpp>
#include <talpa/placements/routed.hpp>
#include <talpa/routing/always_on.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/scorers/linear_scorer.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

namespace talpa {

namespace detail {

/// Adapters that are s B f(A x): f and s of each kind.
inline identity activation_of(const lora&) { return {}; }
template <class Act>
Act activation_of(const parallel_adapter<Act>& adapter) {
  return adapter.act;
}
inline double scale_of(const lora& adapter) { return adapter.scale(); }
template <class Act>
double scale_of(const parallel_adapter<Act>& adapter) {
  return adapter.scale;
}
template <class A>
concept bottleneck_adapter = requires(const A& adapter) {
  activation_of(adapter);
  scale_of(adapter);
};

/// How the gates of adapters come about under a placement.
enum class gated_by { own_router, own_choice_of_base, base, nobody, unknown };
template <class Placement>
inline constexpr gated_by gates_of_placement = gated_by::unknown;
template <class Selector>
inline constexpr gated_by gates_of_placement<placement::routed<router<linear_scorer, Selector>>> =
    gated_by::own_router;
template <class Selector>
inline constexpr gated_by
    gates_of_placement<placement::base_weighted<router<linear_scorer, Selector>>> =
        gated_by::own_choice_of_base;
template <>
inline constexpr gated_by gates_of_placement<placement::embedded> = gated_by::base;
template <>
inline constexpr gated_by gates_of_placement<placement::dense> = gated_by::nobody;
template <>
inline constexpr gated_by gates_of_placement<placement::single> = gated_by::nobody;

template <class Placement>
inline constexpr bool reads_logits_alone = true;
template <class Placement>
requires requires(const Placement& p) { p.router.selector; }
inline constexpr bool reads_logits_alone<Placement> =
    !coupled_selector<decltype(Placement::router.selector)> &&
    !controlled_selector<decltype(Placement::router.selector)> &&
    !biased_selector<decltype(Placement::router.selector)>;

template <class Base>
inline constexpr bool is_fused_moe_ffn = false;
template <class Selector, class S, class Act>
inline constexpr bool is_fused_moe_ffn<fused_moe_ffn<Selector, S, Act>> = true;

}  // namespace detail

/// `perft_block` of a device: adapters beside or inside a `fused_moe_ffn`, all of them stored as
/// halves: y = base(x) + sum_j c_j s B_j f(A_j x), the coefficients c as the placement says
/// (PERFT-R, -E, -D, -S), f the identity for `lora`.
///
/// The adapters' ranks are taken all at once, whoever is on. With P = M R columns of ranks, rounded
/// up to 8, [A; Wr] lie in one block of [G, D], so that x [A; Wr]^T is one product; there is no Wr
/// without a router of the placement.
/// Forward: y = base(x); [u, logits] = x [A; Wr]^T in float; c by the placement;
/// z = s c * f(u), each coefficient over the R ranks of its adapter; y += z B.
/// Backward: dz = dy B^T; dc_j = s sum_r dz_r f(u_r); du = s c * dz f'(u); dlogits by the selector,
/// or dc to the gates of the base; dx = the base's + [du, dlogits] [A; Wr]; dB += z^T dy,
/// [dA; dWr] += [du, dlogits]^T x, in float; the base gets its own where it trains.
/// Shapes: x, y, dy and dx [N, D]; saved: the base's, [u, logits] [N, G] and c [N, M] in float, z
/// [N, P].
/// Ranges: the placement's router is linear without bias, with a selector that reads the logits of
/// a token alone; no dropout.
/// Master weights A, B and Wr are float, as are their gradients: `refresh` rounds them after a step
/// of an optimiser.
/// Edges: N = 0; padding gets shared experts and adapters that are always on alone; adapters that
/// get no tokens get zero gradients.
/// Cost: the base's and 2 N D (G + P) flop forward, as much backward, and once more where adapters
/// train: what all adapters cost, whatever a router decides, so that nothing waits for it.
/// Determinism: the same bits on every run; gates and masks have the bits of ops::select.
/// Throws: shape_error, value_error before any work.
/// Source: as perft_block.
template <class Base, class Placement, class Adapter = lora>
struct fused_perft_block {
  static constexpr const char* name = "fused_perft_block";
  static_assert(detail::is_fused_moe_ffn<Base>,
                "talpa: fused_perft_block takes a fused_moe_ffn as its base, for others see "
                "perft_block (docs/cuda.md)");
  static_assert(detail::gates_of_placement<Placement> != detail::gated_by::unknown,
                "talpa: fused_perft_block knows placement::embedded, dense and single, and routed "
                "and base_weighted with a router of a linear_scorer, for others see perft_block "
                "(docs/cuda.md)");
  static_assert(detail::bottleneck_adapter<Adapter>,
                "talpa: fused_perft_block takes lora or parallel_adapter as its adapter, for "
                "others see perft_block (docs/cuda.md)");
  static_assert(detail::reads_logits_alone<Placement>,
                "talpa: fused_perft_block takes selectors that read the logits of a token alone");

  using S = typename Base::storage;
  static constexpr detail::gated_by gated = detail::gates_of_placement<Placement>;
  static constexpr bool routes =
      gated == detail::gated_by::own_router || gated == detail::gated_by::own_choice_of_base;

  Base base{};
  Placement placement{};
  Adapter adapter{};
  index adapters = 1;  ///< M, >= 1

  /// P: columns of all ranks, a multiple of 8.
  index rank_width() const { return round_up(adapters * adapter.rank); }
  /// G: columns of [u, logits], a multiple of 8.
  index router_width() const { return rank_width() + (routes ? round_up(adapters) : 0); }

  /// Weights as products read them, and the master weights of what trains.
  template <class B>
  struct params {
    typename Base::template params<B> base;
    matrix<S, B> in_stored;      // [G, D] = [A; room; Wr; room]
    matrix<S, B> out_stored;     // [P, D] = [B; room]
    parameter<float, B> router;  // [M, D] Wr, absent without a router of the placement
    parameter<float, B> a;       // [M R, D]
    parameter<float, B> b;       // [M R, D]

    /// Every parameter in a fixed order: base, placement, adapters.
    template <class F>
    void visit(F f) {
      base.visit(f);
      if (router.exists()) f(router);
      f(a);
      f(b);
    }
    index features() const { return a.cols(); }
  };

  template <class B>
  struct saved {
    typename Base::template saved<B> base;   // base.routed: for losses of its router
    matrix_view<float, B> products;          // [N, G] = [u, room, logits, room]
    routing_view<const float, B> routing{};  // c [N, M] and who is on
    matrix_view<S, B> z;                     // [N, P]
    routed_view<float, B> routed{};          // of the placement's router, if it has one
  };

  /// Adapters on `base`, which keeps its trainability: freeze it first for adapter tuning.
  /// Parameters are named as those of perft_block, `prefix`placement.router.weight and
  /// `prefix`adapter.*, and begin as they do.
  template <class B>
  params<B> init(context<B>& ctx, typename Base::template params<B> base_params, generator& random,
                 const std::string& prefix = "") const {
    validate();
    const index features = base_params.features();
    params<B> p;
    p.base = std::move(base_params);
    if constexpr (routes) {
      auto made = placement.template init<float, B>(features, adapters, random,
                                                    detail::concat(prefix, "placement."));
      p.router = std::move(made.router.scorer.weight);
    }
    auto factors = adapter.template init<float, B>(features, features, adapters, random,
                                                   detail::concat(prefix, "adapter."));
    parameter<float, B>* to = &p.a;
    factors.visit([&](parameter<float, B>& from) {
      *to = std::move(from);
      to = &p.b;
    });
    p.in_stored = matrix<S, B>(router_width(), features);
    p.out_stored = matrix<S, B>(rank_width(), features);
    refresh(ctx, p);
    return p;
  }

  /// Rounds the master weights into what products read, after a step of an optimiser or after
  /// loading.
  template <class B>
  void refresh(context<B>& ctx, params<B>& p) const {
    base.refresh(ctx, p.base);
    ops::convert(ctx, std::as_const(p.a).value(), p.in_stored.view().row_range(0, p.a.rows()));
    ops::convert(ctx, std::as_const(p.b).value(), p.out_stored.view().row_range(0, p.b.rows()));
    if constexpr (routes) {
      ops::convert(ctx, std::as_const(p.router).value(),
                   p.in_stored.view().row_range(rank_width(), adapters));
    }
  }

  void validate() const {
    check_at_least(name, "adapters", adapters, 1, "at least one adapter");
    base.validate();
    placement.validate(adapters, base.experts);
    placement.max_selected(adapters, base.selector.max_selected(base.experts));
    adapter.validate();
    check_value(adapter.dropout == 0.0, name, "adapter.dropout", adapter.dropout, "0 = no dropout");
    if constexpr (routes) {
      if (placement.router.scorer.bias) {
        detail::throw_value(name, "placement.router.scorer.bias", "true",
                            "false = a router without bias");
      }
    }
  }

  /// Bytes that one forward of N tokens saves in ctx.memory, an upper bound.
  template <class B>
  std::size_t saved_bytes(index tokens) const {
    const auto bytes = [&](index cols, std::size_t size) {
      return workspace<B>::rounded(static_cast<std::size_t>(tokens * cols) * size);
    };
    return base.template saved_bytes<B>(tokens) + bytes(router_width(), 4) +
           2 * bytes(adapters, 4) + bytes(mask_words(adapters), 4) + bytes(rank_width(), sizeof(S));
  }

  /// Writes y; keeps what backward reads in ctx.memory.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p,
                   std::type_identity_t<matrix_view<const S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask = {}) const {
    check_tokens(p, x, y);
    saved<B> kept;
    kept.base = base.forward(ctx, p.base, x, y, m, padding_mask);
    add_adapters(ctx, p, x, y, padding_mask, m, kept,
                 [&](const auto& selector, auto gates, auto mask) {
                   ops::select(ctx, selector, kept.routed.logits, padding_mask, gates, mask);
                 });
    return kept;
  }
  /// The same, and the totals of both routings in the launches that route: of the base's router,
  /// and of the placement's where it has one.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p,
                   std::type_identity_t<matrix_view<const S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask,
                   const std::type_identity_t<wanted_totals<float, B>>& of_base,
                   const std::type_identity_t<wanted_totals<float, B>>& of_placement = {
                       {}, grad_mode::ignore}) const {
    check_tokens(p, x, y);
    saved<B> kept;
    kept.base = base.forward(ctx, p.base, x, y, m, padding_mask, of_base);
    add_adapters(
        ctx, p, x, y, padding_mask, m, kept, [&](const auto& selector, auto gates, auto mask) {
          ops::route(ctx, selector, kept.routed.logits, padding_mask, gates, mask, of_placement);
          kept.routed.totals = of_placement;
        });
    return kept;
  }

  /// Adds to the gradients of what trains; writes or adds to dx as dx_mode says. `from_losses`
  /// holds gradients of auxiliary losses of the placement's router, `from_base_losses` of the
  /// base's; either may be null.
  template <class B>
  void backward(
      context<B>& ctx, params<B>& p, const saved<B>& kept,
      std::type_identity_t<matrix_view<const S, B>> x,
      std::type_identity_t<matrix_view<const S, B>> dy, std::type_identity_t<matrix_view<S, B>> dx,
      grad_mode dx_mode, mode m,
      const std::type_identity_t<routed_gradient<float, B>>* from_losses = nullptr,
      const std::type_identity_t<routed_gradient<float, B>>* from_base_losses = nullptr) const {
    const index n = kept.products.rows, features = p.features();
    check_shape(name, "x", x, n, features, "tokens of forward, width of the layer");
    check_shape(name, "dy", dy, n, features, "tokens, width of the layer");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, n, features, "shape of x");
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dz = ctx.scratch.template take<float>(n, rank_width());  // [N, P]
    const auto du = ctx.scratch.template take<S>(n, router_width());    // [N, G]
    const auto dgates = ctx.scratch.template take<float>(n, adapters);  // [N, M]
    const matrix_view<const S, B> dproducts = du;

    ops::mixed_gemm(ctx, 1.0f, dy, transpose::no, std::as_const(p.out_stored).view(),
                    transpose::yes, 0.0f, dz);
    ops::mixed_rank_gate_backward(
        ctx, detail::activation_of(adapter), static_cast<float>(detail::scale_of(adapter)),
        kept.routing.gates, ranks_of(kept.products), matrix_view<const float, B>(dz), du, dgates);
    routed_gradient<float, B> to_base;
    if (from_base_losses != nullptr) to_base = *from_base_losses;
    if constexpr (gated == detail::gated_by::base) {
      to_base.dgates = with_losses(ctx, from_base_losses, unscaled(ctx, dgates));
    }
    if constexpr (gated == detail::gated_by::own_choice_of_base) {
      const auto dbase = ctx.scratch.template take<float>(n, base.experts);  // [N, E]
      ops::fill(ctx, 0.0f, dbase);
      ops::pair_gates_backward(ctx, kept.routed.logits, kept.routing.mask, kept.base.applied.gates,
                               kept.base.applied.mask, matrix_view<const float, B>(dgates), dbase);
      to_base.dgates = with_losses(ctx, from_base_losses, unscaled(ctx, dbase));
      ops::fill(ctx, 0.0f, dgates);
    }
    if constexpr (routes) {
      const auto dlogits = ctx.scratch.template take<float>(n, adapters);  // [N, M]
      with_losses(ctx, from_losses, dgates);
      ops::select_backward(ctx, selector_at(placement.router.selector, m), kept.routed.logits,
                           kept.routed.routing.gates, kept.routed.routing.mask,
                           matrix_view<const float, B>(dgates), dlogits);
      if (from_losses != nullptr && !from_losses->dlogits.empty()) {
        ops::axpy(ctx, 1.0f, from_losses->dlogits, dlogits);
      }
      ops::convert(ctx, matrix_view<const float, B>(dlogits), du.col_range(rank_width(), adapters));
    }
    base.backward(ctx, p.base, kept.base, x, dy, dx, dx_mode, m, &to_base);
    if (dx_mode != grad_mode::ignore) {
      ops::mixed_gemm(ctx, 1.0f, dproducts, transpose::no, std::as_const(p.in_stored).view(),
                      transpose::no, 1.0f, dx);
    }
    add_product(ctx, p.b, matrix_view<const S, B>(kept.z), dy);
    add_product(ctx, p.a, dproducts, x);
    if constexpr (routes) {
      add_product(ctx, p.router, dproducts.col_range(rank_width(), adapters), x);
    }
  }

 private:
  static constexpr index round_up(index n) { return ceil_div(n, 8) * 8; }

  template <class B>
  void check_tokens(const params<B>& p, matrix_view<const S, B> x, matrix_view<S, B> y) const {
    validate();
    check_shape(name, "x", x, x.rows, p.features(), "tokens, width of the layer");
    check_shape(name, "y", y, x.rows, p.features(), "tokens, width of the layer");
  }
  template <class B>
  matrix_view<const float, B> ranks_of(matrix_view<float, B> products) const {
    return products.col_range(0, adapters * adapter.rank);
  }

  /// y += the adapters' share, where route(selector, gates, mask) asks the placement's router.
  template <class B, class Route>
  void add_adapters(context<B>& ctx, const params<B>& p, matrix_view<const S, B> x,
                    matrix_view<S, B> y, vector_view<const std::uint8_t, B> padding_mask, mode m,
                    saved<B>& kept, const Route& route) const {
    const index n = x.rows;
    kept.products = ctx.memory.template take<float>(n, router_width());
    ops::mixed_gemm(ctx, 1.0f, x, transpose::no, p.in_stored.view(), transpose::yes, 0.0f,
                    kept.products);
    if constexpr (routes) {
      const auto gates = ctx.memory.template take<float>(n, adapters);
      const auto mask = ctx.memory.template take<std::uint32_t>(n, mask_words(adapters));
      kept.routed.logits = kept.products.col_range(rank_width(), adapters);
      kept.routed.routing = routing_view<const float, B>(gates, mask);
      kept.routed.padding_mask = padding_mask;
      route(selector_at(placement.router.selector, m), gates, mask);
      kept.routing = kept.routed.routing;
    }
    if constexpr (gated == detail::gated_by::own_choice_of_base) {
      const auto weights = ctx.memory.template take<float>(n, adapters);
      ops::pair_gates(ctx, kept.routed.logits, kept.routed.routing.mask, kept.base.applied.gates,
                      kept.base.applied.mask, weights);
      kept.routing.gates = weights;
    }
    if constexpr (gated == detail::gated_by::base) kept.routing = kept.base.applied;
    if constexpr (gated == detail::gated_by::nobody) {
      kept.routing = always_on<float>(ctx, ctx.memory, n, adapters);
    }
    kept.z = ctx.memory.template take<S>(n, rank_width());
    ops::mixed_rank_gate(ctx, detail::activation_of(adapter),
                         static_cast<float>(detail::scale_of(adapter)), kept.routing.gates,
                         ranks_of(kept.products), kept.z);
    ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(kept.z), transpose::no, p.out_stored.view(),
                    transpose::no, 1.0f, y);
  }

  /// Gradients of the gates of the base from those of the gates as its experts saw them, in
  /// place.
  template <class B>
  matrix_view<float, B> unscaled(context<B>& ctx, matrix_view<float, B> dapplied) const {
    if (base.scale != 1.0) {
      ops::scale(ctx, static_cast<float>(base.scale), matrix_view<const float, B>(dapplied),
                 dapplied);
    }
    return dapplied;
  }
  /// dgates, with those of losses added to it.
  template <class B>
  static matrix_view<float, B> with_losses(context<B>& ctx, const routed_gradient<float, B>* losses,
                                           matrix_view<float, B> dgates) {
    if (losses != nullptr && !losses->dgates.empty()) {
      ops::axpy(ctx, 1.0f, losses->dgates, dgates);
    }
    return dgates;
  }
  /// dW += d^T x for the rows of W that train.
  template <class B>
  static void add_product(context<B>& ctx, parameter<float, B>& w, matrix_view<const S, B> d,
                          matrix_view<const S, B> x) {
    for (const row_run& run : w.trained()) {
      ops::mixed_gemm(ctx, 1.0f, d.col_range(run.first, run.rows), transpose::yes, x, transpose::no,
                      1.0f, w.grad().row_range(run.grad_first, run.rows));
    }
  }
};

}  // namespace talpa
