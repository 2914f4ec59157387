// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/half.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/bias.hpp>
#include <talpa/ops/convert.hpp>
#include <talpa/ops/gather.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/reduce.hpp>
#include <talpa/ops/route.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/ops/slot_glu.hpp>
#include <talpa/routing/always_on.hpp>
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
/// silu) that are stored as halves: y = c sum_e g_e(x) f_e(x) + sum_s h_s(x), f_e(x) =
/// D_e^T (act(G_e x) * (U_e x)), c the scale, h_s shared experts that are always on.
///
/// Products run on tensor cores over the slots of each expert, with sums in float; rows of tokens
/// are read where they lie, and a token adds up its slots. Shared experts are one network of all
/// their neurons. The experts are frozen, as a pretrained network's, unless `train_experts` or
/// `train_shared` gives them master weights in float.
/// Forward: logits = x Wr^T (+ b) in float; gates and mask by the selector; [a, b]_s = [G_e; U_e]
/// x; z_s = c g_s act(a) b; y = the sum over the slots of a token of D_e^T z_s, plus the shared.
/// Backward: dz = D_e dy; dg = c <dz, act(a) b>; [da, db] by slot_glu_backward; dx = the sum over
/// slots of [da, db] [G_e; U_e], plus dlogits Wr and the shared experts' share; dWr += dlogits^T x,
/// db += column sums of dlogits; where experts train, their master gradients.
/// Shapes: x, y, dy and dx [N, D]; saved: logits and gates [N, E] in float, once more where c is
/// not 1, mask, the slots, [a, b] [N max_selected, 2 H], and of shared experts [N, 2 H] each.
/// Ranges: selectors that read the logits of a token alone; no dropout.
/// Edges: N = 0; padding gets shared experts alone; experts without tokens get zero gradients.
/// Cost: 6 H D flop a slot forward, twice that backward, 18 H D where experts train, and as much
/// for each shared expert and token; memory for max_selected slots a token, whatever the router
/// decides, so that nothing waits for it.
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
  index shared_experts = 0;  ///< >= 0: experts that are always on
  double scale = 1.0;        ///< c, of the routed experts, finite
  bool bias = false;         ///< whether the router has a bias

  /// Weights as products read them, and the master weights of what trains.
  template <class B>
  struct params {
    matrix<S, B> router_stored;          // [E, D]
    matrix<S, B> gate_up_stored;         // [E 2 H, D], of each expert [G_e; U_e]
    matrix<S, B> down_stored;            // [E H, D]
    matrix<S, B> shared_gate_up_stored;  // [2 F, D] = [G; U] of the F neurons of shared experts
    matrix<S, B> shared_down_stored;     // [F, D]
    parameter<float, B> router;          // [E, D]
    parameter<float, B> router_bias;     // [1, E], absent without a bias
    parameter<float, B> gate_up;         // [E 2 H, D], absent while the experts are frozen
    parameter<float, B> down;            // [E H, D], likewise
    parameter<float, B> shared_gate_up;  // [2 F, D], likewise
    parameter<float, B> shared_down;     // [F, D], likewise

    /// Every parameter that is there in a fixed order: router, experts, shared experts.
    template <class F>
    void visit(F f) {
      f(router);
      for (auto* w : {&router_bias, &gate_up, &down, &shared_gate_up, &shared_down}) {
        if (w->exists()) f(*w);
      }
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
    matrix_view<S, B> ab;                    // [S, 2 H]
    routed_view<float, B> routed;            // what losses and statistics read
    routing_view<const float, B> applied{};  // the routing with c in its gates
    segmented_routing<float, B> always{};    // of shared experts: a slot a token
    matrix_view<S, B> shared_ab{};           // [N, 2 F]
  };

  /// Router on frozen experts: banks gate, up and down [(shared_experts + E) H, D], a row a neuron,
  /// expert behind expert, first the shared ones. Parameters are named `prefix`router.weight and
  /// .bias, `prefix`expert.gate_up and .down, `prefix`shared.gate_up and .down.
  template <class B>
  params<B> init(context<B>& ctx, matrix_view<const S, B> gate, matrix_view<const S, B> up,
                 matrix_view<const S, B> down, generator& random,
                 const std::string& prefix = "") const {
    validate();
    const index features = gate.cols, always = shared_experts * hidden, routed = experts * hidden;
    check_shape(name, "gate", gate, always + routed, features,
                "neurons of all experts, width of the layer");
    check_shape(name, "up", up, gate.rows, features, "shape of gate");
    check_shape(name, "down", down, gate.rows, features, "shape of gate");
    params<B> p;
    matrix<float, B> router(experts, features);
    fill_uniform(router.view(), 1.0 / std::sqrt(static_cast<double>(features)), random);
    p.router = parameter<float, B>(prefix + "router.weight", std::move(router));
    if (bias) {
      p.router_bias = parameter<float, B>(prefix + "router.bias", matrix<float, B>(1, experts));
    }
    p.gate_up.rename(prefix + "expert.gate_up");
    p.down.rename(prefix + "expert.down");
    p.shared_gate_up.rename(prefix + "shared.gate_up");
    p.shared_down.rename(prefix + "shared.down");
    p.router_stored = matrix<S, B>(experts, features);
    p.gate_up_stored = matrix<S, B>(2 * routed, features);
    p.down_stored = matrix<S, B>(routed, features);
    for (index e = 0; e < experts; ++e) {
      stack(ctx, gate, up, always + e * hidden, hidden,
            p.gate_up_stored.view().row_range(2 * e * hidden, 2 * hidden));
    }
    ops::convert(ctx, down.row_range(always, routed), p.down_stored.view());
    if (shared_experts > 0) {
      p.shared_gate_up_stored = matrix<S, B>(2 * always, features);
      p.shared_down_stored = matrix<S, B>(always, features);
      stack(ctx, gate, up, 0, always, p.shared_gate_up_stored.view());
      ops::convert(ctx, down.row_range(0, always), p.shared_down_stored.view());
    }
    refresh(ctx, p);
    return p;
  }

  /// Gives all routed experts master weights, which train from now on.
  template <class B>
  void train_experts(context<B>& ctx, params<B>& p) const {
    make_master(ctx, p.gate_up, p.gate_up_stored);
    make_master(ctx, p.down, p.down_stored);
  }
  /// The same, but only the given experts train.
  template <class B>
  void train_experts(context<B>& ctx, params<B>& p, std::span<const index> which) const {
    train_experts(ctx, p);
    p.gate_up.train_blocks(2 * hidden, which);
    p.down.train_blocks(hidden, which);
  }

  /// Gives the shared experts master weights, which train from now on.
  template <class B>
  void train_shared(context<B>& ctx, params<B>& p) const {
    if (shared_experts == 0) return;
    make_master(ctx, p.shared_gate_up, p.shared_gate_up_stored);
    make_master(ctx, p.shared_down, p.shared_down_stored);
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
    round(p.shared_gate_up, p.shared_gate_up_stored);
    round(p.shared_down, p.shared_down_stored);
  }

  void validate() const {
    check_at_least(name, "hidden", hidden, 1, "neurons of one expert");
    check_at_least(name, "experts", experts, 1, "at least one expert");
    selector.validate(experts);
    check_at_least(name, "shared_experts", shared_experts, 0, "experts that are always on");
    check_value(std::isfinite(scale), name, "scale", scale, "a finite number");
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
    std::size_t sum = 3 * bytes(tokens * experts, 4) + bytes(tokens * mask_words(experts), 4) +
                      segments_bytes<B>(tokens, experts, slots) + bytes(slots, 4) +
                      bytes(slots * 2 * hidden, sizeof(S));
    if (shared_experts > 0) {
      sum += 3 * bytes(tokens, 4) + segments_bytes<B>(tokens, 1, tokens) +
             bytes(tokens * 2 * hidden * shared_experts, sizeof(S));
    }
    return sum;
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
    if (scale != 1.0) {
      ops::scale(ctx, static_cast<float>(scale), matrix_view<const float, B>(dgates), dgates);
    }
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
    if (p.router_bias.trainable()) {
      ops::column_sum(ctx, matrix_view<const float, B>(dlogits), 1.0f, p.router_bias.grad());
    }
    if (shared_experts > 0) shared_backward(ctx, p, kept, x, dy, dx, dx_mode);
    if (dx_mode == grad_mode::ignore) return;
    const auto dx_of_slot = ctx.scratch.template take<S>(places, features);  // [S, D]
    ops::mixed_grouped_gemm(ctx, slots.offsets, matrix_view<const S, B>(dab), {},
                            std::as_const(p.gate_up_stored).view(), transpose::no, dx_of_slot);
    ops::combine(ctx, slots, dx_of_slot, dx, shared_experts > 0 ? grad_mode::accumulate : dx_mode);
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
    if (p.router_bias.exists()) {
      ops::add_bias(ctx, matrix_view<const float, B>(kept.logits), p.router_bias.value(),
                    kept.logits);
    }
    route(kept);
    kept.applied = kept.routed.routing;
    if (scale != 1.0) {
      const auto scaled = ctx.memory.template take<float>(n, experts);  // [N, E]
      ops::scale(ctx, static_cast<float>(scale), matrix_view<const float, B>(kept.gates), scaled);
      kept.applied.gates = scaled;
    }
    kept.sorted = make_segmented<float>(ctx, kept.applied, places);
    kept.ab = ctx.memory.template take<S>(places, 2 * hidden);
    const segments<B>& slots = kept.sorted.slots;
    ops::mixed_grouped_gemm(ctx, slots.offsets, x, slots.token_of_slot, p.gate_up_stored.view(),
                            transpose::yes, kept.ab);
    ops::slot_glu(ctx, act, slots, matrix_view<const S, B>(kept.ab), kept.sorted.gate_of_slot, z);
    ops::mixed_grouped_gemm(ctx, slots.offsets, matrix_view<const S, B>(z), {},
                            p.down_stored.view(), transpose::no, y_of_slot);
    if (shared_experts > 0) shared_forward(ctx, p, x, y, kept);
    ops::combine(ctx, slots, y_of_slot, y,
                 shared_experts > 0 ? grad_mode::accumulate : grad_mode::overwrite);
    return kept;
  }

  /// y = the shared experts' share.
  template <class B>
  void shared_forward(context<B>& ctx, const params<B>& p, matrix_view<const S, B> x,
                      matrix_view<S, B> y, saved<B>& kept) const {
    const index n = x.rows, neurons = p.shared_down_stored.rows();
    kept.always = make_segmented<float>(ctx, always_on<float>(ctx, ctx.memory, n, 1), n);
    kept.shared_ab = ctx.memory.template take<S>(n, 2 * neurons);
    const auto z = ctx.scratch.template take<S>(n, neurons);  // [N, F]
    ops::mixed_gemm(ctx, 1.0f, x, transpose::no, p.shared_gate_up_stored.view(), transpose::yes,
                    0.0f, kept.shared_ab);
    ops::slot_glu(ctx, act, kept.always.slots, matrix_view<const S, B>(kept.shared_ab),
                  kept.always.gate_of_slot, z);
    ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(z), transpose::no,
                    p.shared_down_stored.view(), transpose::no, 0.0f, y);
  }

  /// Writes or adds their share to dx as dx_mode says, and adds their gradients where they train.
  template <class B>
  void shared_backward(context<B>& ctx, params<B>& p, const saved<B>& kept,
                       matrix_view<const S, B> x, matrix_view<const S, B> dy, matrix_view<S, B> dx,
                       grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const index n = x.rows, neurons = p.shared_down_stored.rows();
    const auto dz = ctx.scratch.template take<S>(n, neurons);       // [N, F]
    const auto dab = ctx.scratch.template take<S>(n, 2 * neurons);  // [N, 2 F]
    const auto unwanted = ctx.scratch.template take<float>(n);      // [N]
    ops::mixed_gemm(ctx, 1.0f, dy, transpose::no, std::as_const(p.shared_down_stored).view(),
                    transpose::yes, 0.0f, dz);
    ops::slot_glu_backward(ctx, act, kept.always.slots, matrix_view<const S, B>(kept.shared_ab),
                           kept.always.gate_of_slot, dz, p.shared_down.trainable(), unwanted, dab);
    // z has taken the place of dz.
    const auto add = [&](parameter<float, B>& w, matrix_view<const S, B> d,
                         matrix_view<const S, B> of) {
      for (const row_run& run : w.trained()) {
        ops::mixed_gemm(ctx, 1.0f, d.col_range(run.first, run.rows), transpose::yes, of,
                        transpose::no, 1.0f, w.grad().row_range(run.grad_first, run.rows));
      }
    };
    add(p.shared_down, dz, dy);
    add(p.shared_gate_up, dab, x);
    if (dx_mode == grad_mode::ignore) return;
    ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(dab), transpose::no,
                    std::as_const(p.shared_gate_up_stored).view(), transpose::no,
                    dx_mode == grad_mode::accumulate ? 1.0f : 0.0f, dx);
  }

  /// to = [gate; up] of some neurons.
  template <class B>
  static void stack(context<B>& ctx, matrix_view<const S, B> gate, matrix_view<const S, B> up,
                    index first, index rows, matrix_view<S, B> to) {
    ops::convert(ctx, gate.row_range(first, rows), to.row_range(0, rows));
    ops::convert(ctx, up.row_range(first, rows), to.row_range(rows, rows));
  }
  template <class B>
  static void make_master(context<B>& ctx, parameter<float, B>& w, const matrix<S, B>& stored) {
    if (w.exists()) {
      w.train();
      return;
    }
    matrix<float, B> value(stored.rows(), stored.cols());
    ops::convert(ctx, stored.view(), value.view());
    w = parameter<float, B>(w.name(), std::move(value));
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
