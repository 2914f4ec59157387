// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/half.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/convert.hpp>
#include <talpa/ops/gather.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/route.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/ops/slot_glu.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/routing/segments.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace talpa {

/// `moe_ffn` of a device, for a linear router and gated feed-forward experts (SwiGLU with Act =
/// silu) that are stored as halves: y = sum_e g_e(x) D_e^T (act(G_e x) * (U_e x)).
///
/// Products run on tensor cores over the slots of each expert, with sums in float; rows of tokens
/// are read where they lie, and a token adds up its slots. The experts are frozen, as a pretrained
/// network's, unless `train_experts` gives them master weights in float.
/// Forward: logits = x Wr^T in float; gates and mask by the selector; [a, b]_s = [G_e; U_e] x;
/// z_s = g_s act(a) b; y = the sum over the slots of a token of D_e^T z_s.
/// Backward: dz = D_e dy; dg = <dz, act(a) b>; [da, db] by slot_glu_backward; dx = the sum over
/// slots of [da, db] [G_e; U_e], plus dlogits Wr; dWr += dlogits^T x; where experts train, their
/// master gradients.
/// Shapes: x, y, dy and dx [N, D]; saved: logits and gates [N, E] in float, mask, the slots and
/// [a, b] [N max_selected, 2 H].
/// Ranges: selectors that read the logits of a token alone; no bias, no dropout, no shared experts.
/// Edges: N = 0; padding gets zero; experts without tokens get zero gradients.
/// Cost: 6 H D flop a slot forward, twice that backward, 18 H D where experts train; memory for
/// max_selected slots a token, whatever the router decides, so that nothing waits for it.
/// Determinism: the same bits on every run; gates and mask have the bits of ops::select.
/// Throws: shape_error, value_error before any work.
/// Source: as moe_ffn.
template <class Selector, half_storage S = bfloat16, activation_function Act = silu>
struct fused_moe_ffn {
  static constexpr const char* name = "fused_moe_ffn";
  using storage = S;
  static_assert(!coupled_selector<Selector> && !controlled_selector<Selector> &&
                    !biased_selector<Selector>,
                "talpa: fused_moe_ffn takes selectors that read the logits of a token alone");

  Selector selector{};
  index hidden = 0;   ///< H, >= 1: neurons of one expert
  index experts = 8;  ///< E, >= 1
  Act act{};

  /// Weights as products read them, and the master weights of what trains.
  template <class B>
  struct params {
    matrix<S, B> router_stored;   // [E, D]
    matrix<S, B> gate_up_stored;  // [E 2 H, D], of each expert [G_e; U_e]
    matrix<S, B> down_stored;     // [E H, D]
    parameter<float, B> router;   // [E, D]
    parameter<float, B> gate_up;  // [E 2 H, D], absent while the experts are frozen
    parameter<float, B> down;     // [E H, D], likewise

    template <class F>
    void visit(F f) {
      f(router);
      if (gate_up.exists()) f(gate_up);
      if (down.exists()) f(down);
    }
    void freeze() {
      visit([](parameter<float, B>& w) { w.freeze(); });
    }
    index features() const { return router_stored.cols(); }
  };

  template <class B>
  struct saved {
    matrix_view<float, B> logits;        // [N, E]
    matrix_view<float, B> gates;         // [N, E]
    matrix_view<std::uint32_t, B> mask;  // [N, ceil(E / 32)]
    segmented_routing<float, B> sorted;
    matrix_view<S, B> ab;          // [S, 2 H]
    routed_view<float, B> routed;  // what losses and statistics read
  };

  /// Router on frozen experts: banks gate, up and down [E H, D], row e H + j for neuron j of expert
  /// e, as glu_ffn has them. Parameters are named `prefix`router.weight, `prefix`expert.gate_up and
  /// `prefix`expert.down.
  template <class B>
  params<B> init(context<B>& ctx, matrix_view<const S, B> gate, matrix_view<const S, B> up,
                 matrix_view<const S, B> down, generator& random,
                 const std::string& prefix = "") const {
    validate();
    const index features = gate.cols, rows = experts * hidden;
    check_shape(name, "gate", gate, rows, features, "experts times hidden, width of the layer");
    check_shape(name, "up", up, rows, features, "shape of gate");
    check_shape(name, "down", down, rows, features, "shape of gate");
    params<B> p;
    matrix<float, B> router(experts, features);
    fill_uniform(router.view(), 1.0 / std::sqrt(static_cast<double>(features)), random);
    p.router = parameter<float, B>(prefix + "router.weight", std::move(router));
    p.gate_up.rename(prefix + "expert.gate_up");
    p.down.rename(prefix + "expert.down");
    p.router_stored = matrix<S, B>(experts, features);
    p.gate_up_stored = matrix<S, B>(2 * rows, features);
    p.down_stored = matrix<S, B>(rows, features);
    for (index e = 0; e < experts; ++e) {
      const auto to = p.gate_up_stored.view().row_range(2 * e * hidden, 2 * hidden);
      ops::convert(ctx, gate.row_range(e * hidden, hidden), to.row_range(0, hidden));
      ops::convert(ctx, up.row_range(e * hidden, hidden), to.row_range(hidden, hidden));
    }
    ops::convert(ctx, down, p.down_stored.view());
    refresh(ctx, p);
    return p;
  }

  /// Gives all experts master weights, which train from now on.
  template <class B>
  void train_experts(context<B>& ctx, params<B>& p) const {
    const auto master = [&](parameter<float, B>& w, const matrix<S, B>& stored) {
      if (w.exists()) {
        w.train();
        return;
      }
      matrix<float, B> value(stored.rows(), stored.cols());
      ops::convert(ctx, stored.view(), value.view());
      w = parameter<float, B>(w.name(), std::move(value));
    };
    master(p.gate_up, p.gate_up_stored);
    master(p.down, p.down_stored);
  }
  /// The same, but only the given experts train.
  template <class B>
  void train_experts(context<B>& ctx, params<B>& p, std::span<const index> which) const {
    train_experts(ctx, p);
    p.gate_up.train_blocks(2 * hidden, which);
    p.down.train_blocks(hidden, which);
  }

  /// Rounds the master weights into what products read, after a step of an optimiser or after
  /// loading.
  template <class B>
  void refresh(context<B>& ctx, params<B>& p) const {
    const auto round = [&](const parameter<float, B>& w, matrix<S, B>& stored) {
      if (w.exists()) ops::convert(ctx, w.value(), stored.view());
    };
    round(p.router, p.router_stored);
    round(p.gate_up, p.gate_up_stored);
    round(p.down, p.down_stored);
  }

  void validate() const {
    check_at_least(name, "hidden", hidden, 1, "neurons of one expert");
    check_at_least(name, "experts", experts, 1, "at least one expert");
    selector.validate(experts);
  }

  /// Places for the slots of N tokens.
  index capacity(index tokens) const { return tokens * selector.max_selected(experts); }

  /// Bytes that one forward of N tokens saves in ctx.memory, an upper bound.
  template <class B>
  std::size_t saved_bytes(index tokens) const {
    const auto bytes = [](index count, std::size_t size) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * size);
    };
    const index slots = capacity(tokens);
    return 2 * bytes(tokens * experts, 4) + bytes(tokens * mask_words(experts), 4) +
           segments_bytes<B>(tokens, experts, slots) + bytes(slots, 4) +
           bytes(slots * 2 * hidden, sizeof(S));
  }

  /// Writes y; keeps what backward reads in ctx.memory.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p,
                   std::type_identity_t<matrix_view<const S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask = {}) const {
    return forward_with(ctx, p, x, y, padding_mask, [&](const saved<B>& kept) {
      ops::select(ctx, selector_at(selector, m), kept.logits, padding_mask, kept.gates, kept.mask);
    });
  }
  /// The same, and the totals of the routing in the launch that routes: what statistics are made of
  /// (routing_statistics::wanted) and losses read.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p,
                   std::type_identity_t<matrix_view<const S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask,
                   const std::type_identity_t<wanted_totals<float, B>>& totals) const {
    saved<B> kept = forward_with(ctx, p, x, y, padding_mask, [&](const saved<B>& made) {
      ops::route(ctx, selector_at(selector, m), made.logits, padding_mask, made.gates, made.mask,
                 totals);
    });
    kept.routed.totals = totals;
    return kept;
  }

  /// Adds to the gradients of what trains; writes or adds to dx as dx_mode says. `from_losses`, if
  /// given, holds gradients of auxiliary losses with respect to logits and gates.
  template <class B>
  void backward(
      context<B>& ctx, params<B>& p, const saved<B>& kept,
      std::type_identity_t<matrix_view<const S, B>> x,
      std::type_identity_t<matrix_view<const S, B>> dy, std::type_identity_t<matrix_view<S, B>> dx,
      grad_mode dx_mode, mode m,
      const std::type_identity_t<routed_gradient<float, B>>* from_losses = nullptr) const {
    const index n = kept.logits.rows, features = p.features(),
                places = kept.sorted.slots.capacity();
    check_shape(name, "x", x, n, features, "tokens of forward, width of the layer");
    check_shape(name, "dy", dy, n, features, "tokens, width of the layer");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, n, features, "shape of x");
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dz = ctx.scratch.template take<S>(places, hidden);         // [S, H]
    const auto dab = ctx.scratch.template take<S>(places, 2 * hidden);    // [S, 2 H]
    const auto dgate_of_slot = ctx.scratch.template take<float>(places);  // [S]
    const auto dgates = ctx.scratch.template take<float>(n, experts);     // [N, E]
    const auto dlogits = ctx.scratch.template take<float>(n, experts);    // [N, E]
    // Rows of whole 16 bytes, which products read fastest.
    const auto dscores =
        ctx.scratch.template take<S>(n, ceil_div(experts, 8) * 8).col_range(0, experts);
    const segments<B>& slots = kept.sorted.slots;

    ops::mixed_grouped_gemm(ctx, slots.offsets, dy, slots.token_of_slot,
                            std::as_const(p.down_stored).view(), transpose::yes, dz);
    ops::slot_glu_backward(ctx, act, slots, matrix_view<const S, B>(kept.ab),
                           kept.sorted.gate_of_slot, dz, p.down.trainable(), dgate_of_slot, dab);
    ops::build_segments_backward(ctx, kept.mask, slots, dgate_of_slot, dgates,
                                 grad_mode::overwrite);
    if (from_losses != nullptr && !from_losses->dgates.empty()) {
      ops::axpy(ctx, 1.0f, from_losses->dgates, dgates);
    }
    ops::select_backward(ctx, selector_at(selector, m), kept.logits, kept.gates, kept.mask, dgates,
                         dlogits);
    if (from_losses != nullptr && !from_losses->dlogits.empty()) {
      ops::axpy(ctx, 1.0f, from_losses->dlogits, dlogits);
    }
    ops::convert(ctx, matrix_view<const float, B>(dlogits), dscores);

    // z has taken the place of dz.
    add_product(ctx, slots, p.down, matrix_view<const S, B>(dz), dy);
    add_product(ctx, slots, p.gate_up, matrix_view<const S, B>(dab), x);
    for (const row_run& run : p.router.trained()) {
      ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(dscores.col_range(run.first, run.rows)),
                      transpose::yes, x, transpose::no, 1.0f,
                      p.router.grad().row_range(run.grad_first, run.rows));
    }
    if (dx_mode == grad_mode::ignore) return;
    const auto dx_of_slot = ctx.scratch.template take<S>(places, features);  // [S, D]
    ops::mixed_grouped_gemm(ctx, slots.offsets, matrix_view<const S, B>(dab), {},
                            std::as_const(p.gate_up_stored).view(), transpose::no, dx_of_slot);
    ops::combine(ctx, slots, dx_of_slot, dx, dx_mode);
    ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(dscores), transpose::no,
                    std::as_const(p.router_stored).view(), transpose::no, 1.0f, dx);
  }

 private:
  /// forward, where route(kept) makes gates and mask of the logits.
  template <class B, class Route>
  saved<B> forward_with(context<B>& ctx, const params<B>& p, matrix_view<const S, B> x,
                        matrix_view<S, B> y, vector_view<const std::uint8_t, B> padding_mask,
                        const Route& route) const {
    validate();
    const index n = x.rows, features = p.features(), places = capacity(n);
    check_shape(name, "x", x, n, features, "tokens, width of the layer");
    check_shape(name, "y", y, n, features, "tokens, width of the layer");

    saved<B> kept;
    kept.logits = ctx.memory.template take<float>(n, experts);
    kept.gates = ctx.memory.template take<float>(n, experts);
    kept.mask = ctx.memory.template take<std::uint32_t>(n, mask_words(experts));
    kept.routed.logits = kept.logits;
    kept.routed.routing = routing_view<const float, B>(kept.gates, kept.mask);
    kept.routed.padding_mask = padding_mask;
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<S>(places, hidden);            // [S, H]
    const auto y_of_slot = ctx.scratch.template take<S>(places, features);  // [S, D]

    ops::mixed_gemm(ctx, 1.0f, x, transpose::no, p.router_stored.view(), transpose::yes, 0.0f,
                    kept.logits);
    route(kept);
    kept.sorted = make_segmented<float>(ctx, kept.routed.routing, places);
    kept.ab = ctx.memory.template take<S>(places, 2 * hidden);
    const segments<B>& slots = kept.sorted.slots;
    ops::mixed_grouped_gemm(ctx, slots.offsets, x, slots.token_of_slot, p.gate_up_stored.view(),
                            transpose::yes, kept.ab);
    ops::slot_glu(ctx, act, slots, matrix_view<const S, B>(kept.ab), kept.sorted.gate_of_slot, z);
    ops::mixed_grouped_gemm(ctx, slots.offsets, matrix_view<const S, B>(z), {},
                            p.down_stored.view(), transpose::no, y_of_slot);
    ops::combine(ctx, slots, y_of_slot, y, grad_mode::overwrite);
    return kept;
  }

  /// dW += d_e^T x_e for the experts that train; d by slot, x by token.
  template <class B>
  static void add_product(context<B>& ctx, const segments<B>& slots, parameter<float, B>& w,
                          matrix_view<const S, B> d, matrix_view<const S, B> x) {
    if (!w.trainable()) return;
    ops::mixed_grouped_gemm_gradient(ctx, slots.offsets, d, x, slots.token_of_slot, w.trained(),
                                     w.grad());
  }
};

}  // namespace talpa
