// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/experts/glu_ffn.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/layers/input_dropout.hpp>
#include <talpa/layers/router.hpp>
#include <talpa/layers/slots.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/gated_activation.hpp>
#include <talpa/ops/gather.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/scale.hpp>

#include <span>
#include <string>
#include <type_traits>
#include <utility>

namespace talpa {

/// Layer that makes a mixture of feed-forward networks of one dense network and LoRA experts on
/// each of its three matrices: y = sum_e g_e(x) f_e(x), g = router(x),
/// f_e(x) = (D + s B^D_e A^D_e) (act(a_e) b_e), a_e = (G + s B^G_e A^G_e) x,
/// b_e = (U + s B^U_e A^U_e) x.
///
/// The products of the dense network are computed once a token, whatever its experts: G x and U x
/// before, D sum_e g_e h_e behind, h_e = act(a_e) b_e. LoRA's dropout is on x for G and U, one mask
/// for all, and on h for D.
/// Backward: dh_e = g_e (D^T dy + s A^D_e^T B^D_e^T dy), dg_e = <h_e, dh_e / g_e>, then through the
/// gated activation to a_e and b_e, whose sums over experts go through the dense network; LoRA
/// factors, router and the dense network get theirs where they train. The mask is a constant.
/// Shapes: x and y [N, D]; dense network of H neurons, banks as lora's: A [E R, D or H], B
/// transposed [E R, H or D]; saved: what the router keeps, a and b [S, H], and three of [S, R] with
/// S set bits of the mask; with dropout on the CPU the bits of its masks, of x and of S rows of h.
/// Edges: N = 0; experts without tokens get zero gradients; padding, and a token without experts,
/// gets 0, for the dense network too is behind the gates; fresh adapters and gates that sum to one
/// give the dense network.
/// Cost: 6 N D H flop for the dense network and 6 S R (D + H) for the experts forward, twice that
/// backward, and the router's.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error, value_error before any work.
/// Source: MixLoRA (arXiv 2404.15159).
template <class Router, activation_function Act = silu>
struct mole_ffn {
  static constexpr const char* name = "mole_ffn";

  Router router{};
  lora expert{};      ///< of each of the three matrices
  index experts = 8;  ///< E, >= 1
  Act act{};

  template <class T, class B>
  struct params {
    typename glu_ffn<Act>::template params<T, B> base;  // of one network: [H, D], [H, D], [H, D]
    typename Router::template params<T, B> router;
    lora::params<T, B> gate;  // A [E R, D], B [E R, H]
    lora::params<T, B> up;    // A [E R, D], B [E R, H]
    lora::params<T, B> down;  // A [E R, H], B [E R, D]

    /// Every parameter in a fixed order: base, router, experts.
    template <class F>
    void visit(F f) {
      base.visit(f);
      router.visit(f);
      gate.visit(f);
      up.visit(f);
      down.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    typename Router::template saved<T, B> router;
    routed_view<T, B> routed;  // what losses and statistics read
    sorted_slots<T, B> sorted;
    matrix_view<T, B> a, b;          // [S, H]
    matrix_view<T, B> u_gate, u_up;  // [S, R] A x
    matrix_view<T, B> u_down;        // [S, R] A h
    input_dropout<B> on_x, on_h;
  };

  /// Experts on `base`, a network of one block, which keeps its trainability: freeze it first for
  /// adapter tuning. Parameters are named `prefix`router.*, `prefix`gate.*, `prefix`up.*,
  /// `prefix`down.*.
  template <class T, class B>
  params<T, B> init(typename glu_ffn<Act>::template params<T, B> base, generator& random,
                    const std::string& prefix = "") const {
    validate();
    const index hidden = base.gate.rows(), features = base.gate.cols();
    params<T, B> p;
    p.base = std::move(base);
    const auto part = [&](const char* which) { return detail::concat(prefix, which); };
    p.router = router.template init<T, B>(features, experts, random, part("router."));
    p.gate = expert.init<T, B>(features, hidden, experts, random, part("gate."));
    p.up = expert.init<T, B>(features, hidden, experts, random, part("up."));
    p.down = expert.init<T, B>(hidden, features, experts, random, part("down."));
    return p;
  }

  void validate() const {
    check_at_least(name, "experts", experts, 1, "at least one expert");
    expert.validate();
    router.selector.validate(experts);
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.base.down.cols();
  }

  /// Only the given experts train; router and base are left as they are.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> chosen) const {
    for (lora::params<T, B>* bank : {&p.gate, &p.up, &p.down}) expert.train_experts(*bank, chosen);
  }

  /// Writes y; keeps what backward reads in ctx.memory.
  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, mode m,
                      const std::type_identity_t<batch_info<T, B>>& batch = {}) const {
    validate();
    check_shape(name, "x", x, x.rows, p.base.gate.cols(), "tokens, width of the layer");
    check_shape(name, "y", y, x.rows, output_width(p), "tokens, width of the layer");
    const index hidden = p.base.gate.rows();
    saved<T, B> kept;
    kept.on_x = input_dropout<B>::draw(name, expert.dropout, m, batch);
    kept.on_h = input_dropout<B>::draw(name, expert.dropout, m, batch);
    kept.router = router.forward(ctx, p.router, experts, x, m, batch);
    kept.routed = kept.router.routed;
    kept.sorted =
        sort_slots(ctx, kept.routed.routing, router.selector.max_selected(experts), false);
    const segments<B>& slots = kept.sorted.slots;
    const index count = slots.capacity();
    // Room for the most that may come, so that later steps need no new memory.
    const index most = x.rows * router.selector.max_selected(experts);
    const auto take = [&](index cols) {
      return ctx.memory.template take<T>(most, cols).row_range(0, count);
    };
    kept.a = take(hidden);
    kept.b = take(hidden);
    kept.u_gate = take(expert.rank);
    kept.u_up = take(expert.rank);
    kept.u_down = take(expert.rank);
    kept.on_h.keep(ctx, count, hidden, most);

    const typename workspace<B>::scope scope(ctx.scratch);
    const auto once = ctx.scratch.template take<T>(x.rows, hidden);    // [N, H]
    const auto x_slots = ctx.scratch.template take<T>(count, x.cols);  // [S, D]
    const auto z = ctx.scratch.template take<T>(count, expert.rank);   // [S, R]
    const auto h = ctx.scratch.template take<T>(count, hidden);        // [S, H]
    const auto y_slots = ctx.scratch.template take<T>(count, y.cols);  // [S, D]
    ops::gather(ctx, slots, kept.on_x.begin(ctx, x), x_slots);
    const auto enter = [&](const parameter<T, B>& base, const lora::params<T, B>& bank,
                           matrix_view<T, B> u, matrix_view<T, B> a) {
      ops::gemm(ctx, x, transpose::no, base.value(), transpose::yes, T{0}, once);
      ops::gather(ctx, slots, once, a);
      ops::grouped_gemm(ctx, slots.offsets, x_slots, bank.a.value(), transpose::yes, u);
      ops::scale(ctx, scale<T>(), u, z);
      ops::grouped_gemm(ctx, slots.offsets, z, bank.b.value(), transpose::no, a,
                        grad_mode::accumulate);
    };
    enter(p.base.gate, p.gate, kept.u_gate, kept.a);
    enter(p.base.up, p.up, kept.u_up, kept.b);
    ops::gated_activation(ctx, act, kept.a, kept.b, h);
    ops::grouped_gemm(ctx, slots.offsets, kept.on_h.begin(ctx, matrix_view<const T, B>(h)),
                      p.down.a.value(), transpose::yes, kept.u_down);
    ops::rank_gate(ctx, scale<T>(), as_column(kept.sorted.gates), kept.u_down, z);
    ops::grouped_gemm(ctx, slots.offsets, z, p.down.b.value(), transpose::no, y_slots);
    ops::rank_gate(ctx, T{1}, as_column(kept.sorted.gates), h, h);
    ops::combine(ctx, slots, h, once, grad_mode::overwrite);
    ops::gemm(ctx, once, transpose::no, p.base.down.value(), transpose::no, T{0}, y);
    ops::combine(ctx, slots, y_slots, y, grad_mode::accumulate);
    return kept;
  }

  /// Adds to the gradients of what trains; writes or adds to dx as dx_mode says. `from_losses`, if
  /// given, holds gradients of auxiliary losses with respect to logits and gates.
  template <floating T, backend B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<const T, B>> dy,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* from_losses = nullptr) const {
    check_shape(name, "x", x, kept.routed.logits.rows, p.base.gate.cols(),
                "tokens of forward, width of the layer");
    check_shape(name, "dy", dy, x.rows, output_width(p), "tokens, width of the layer");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    const segments<B>& slots = kept.sorted.slots;
    const auto gates = as_column(kept.sorted.gates);  // [S, 1]
    const index hidden = p.base.gate.rows(), count = slots.capacity();

    const typename workspace<B>::scope scope(ctx.scratch);
    const auto once = ctx.scratch.template take<T>(x.rows, hidden);    // [N, H]
    const auto h = ctx.scratch.template take<T>(count, hidden);        // [S, H]
    const auto da = ctx.scratch.template take<T>(count, hidden);       // [S, H]
    const auto more = ctx.scratch.template take<T>(count, hidden);     // [S, H]
    const auto dz = ctx.scratch.template take<T>(count, expert.rank);  // [S, R]
    const auto z = ctx.scratch.template take<T>(count, expert.rank);   // [S, R]
    const auto dgate_of_slot = ctx.scratch.template take<T>(count);
    const auto other_dgates = ctx.scratch.template take<T>(count);
    ops::gated_activation(ctx, act, kept.a, kept.b, h);

    // The dense D, behind the sum over experts.
    if (p.base.down.trainable()) {
      ops::rank_gate(ctx, T{1}, gates, h, more);
      ops::combine(ctx, slots, more, once, grad_mode::overwrite);
      add_gradient(ctx, p.base.down, once, dy);
    }
    ops::gemm(ctx, dy, transpose::no, p.base.down.value(), transpose::yes, T{0}, once);
    ops::gather(ctx, slots, once, da);
    ops::rank_gate_backward(ctx, T{1}, gates, h, da, da, as_column(dgate_of_slot));

    // LoRA of D.
    {
      const typename workspace<B>::scope inner(ctx.scratch);
      const auto dy_slots = ctx.scratch.template take<T>(count, dy.cols);  // [S, D]
      ops::gather(ctx, slots, dy, dy_slots);
      ops::grouped_gemm(ctx, slots.offsets, dy_slots, p.down.b.value(), transpose::yes, dz);
      if (p.down.b.trainable()) {
        ops::rank_gate(ctx, scale<T>(), gates, kept.u_down, z);
        add_slot_gradient(ctx, slots, p.down.b, z, dy_slots);
      }
      ops::rank_gate_backward(ctx, scale<T>(), gates, kept.u_down, dz, dz, as_column(other_dgates));
      if (p.down.a.trainable()) {
        add_slot_gradient(ctx, slots, p.down.a, dz,
                          kept.on_h.apply(ctx, matrix_view<const T, B>(h)));
      }
      kept.on_h.through(ctx, da, grad_mode::accumulate,
                        [&](matrix_view<T, B> share, grad_mode share_mode) {
                          ops::grouped_gemm(ctx, slots.offsets, dz, p.down.a.value(), transpose::no,
                                            share, share_mode);
                        });
    }
    ops::axpy(ctx, T{1}, as_column(other_dgates), as_column(dgate_of_slot));

    // G and U, dense and LoRA.
    const grad_mode add = dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate;
    const matrix_view<T, B> db = h;  // h has served
    ops::gated_activation_backward(ctx, act, kept.a, kept.b, da, da, db);
    const auto x_slots = ctx.scratch.template take<T>(count, x.cols);   // [S, D]
    const auto dx_slots = ctx.scratch.template take<T>(count, x.cols);  // [S, D]
    ops::gather(ctx, slots, kept.on_x.apply(ctx, x), x_slots);
    const auto leave = [&](parameter<T, B>& base, lora::params<T, B>& bank, matrix_view<T, B> u,
                           matrix_view<T, B> d, grad_mode into_dx, grad_mode into_slots) {
      ops::combine(ctx, slots, d, once, grad_mode::overwrite);
      add_gradient(ctx, base, once, x);
      input_gradient(ctx, base, once, dx, into_dx);
      if (bank.b.trainable()) {
        ops::scale(ctx, scale<T>(), u, z);
        add_slot_gradient(ctx, slots, bank.b, z, d);
      }
      ops::grouped_gemm(ctx, slots.offsets, d, bank.b.value(), transpose::yes, dz);
      ops::scale(ctx, scale<T>(), dz, dz);
      add_slot_gradient(ctx, slots, bank.a, dz, x_slots);
      ops::grouped_gemm(ctx, slots.offsets, dz, bank.a.value(), transpose::no, dx_slots,
                        into_slots);
    };
    leave(p.base.gate, p.gate, kept.u_gate, da, dx_mode, grad_mode::overwrite);
    leave(p.base.up, p.up, kept.u_up, db, add, grad_mode::accumulate);
    kept.on_x.through(ctx, dx, add, [&](matrix_view<T, B> share, grad_mode share_mode) {
      ops::combine(ctx, slots, dx_slots, share, share_mode);
    });

    const auto dgates = ctx.scratch.template take<T>(x.rows, experts);  // [N, E]
    ops::build_segments_backward(ctx, kept.routed.routing.mask, slots, dgate_of_slot, dgates,
                                 grad_mode::overwrite);
    router.backward(ctx, p.router, kept.router, x, dgates, dx, add, from_losses);
  }

 private:
  template <class T>
  T scale() const {
    return static_cast<T>(expert.scale());
  }
};

}  // namespace talpa
