// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/low_rank.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/gated_activation.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/ops/segments.hpp>

#include <span>
#include <string>
#include <utility>

namespace talpa {

/// Expert that is a gated feed-forward network of its own with a low-rank update on each of its
/// three matrices: f_e(x) = (D_e + s B^D_e A^D_e) (act(a) b), a = (G_e + s B^G_e A^G_e) x,
/// b = (U_e + s B^U_e A^U_e) x.
///
/// For mixtures whose experts exist already and are tuned by adapters, all of them or some
/// (train_experts); the networks are borrowed or owned, and frozen as init makes them.
/// Backward, with h = act(a) b and z = g h: dh = g (D_e^T dy + s A^D_e^T B^D_e^T dy),
/// dg = <h, dh / g>, da = dh b act'(a), db = dh act(a), dx = (G_e + s B A)^T da + (U_e + s B A)^T
/// db; a factor gets dB += (s A in)^T dout and dA += (s dout B)^T in, the networks theirs where
/// they train.
/// Shapes: banks of the networks as Ffn's: gate and up [E H, D], down stored transposed [E H, O];
/// of the updates A [E R, D or H] and B transposed [E R, H or O].
/// Edges: an expert without tokens gets zero gradient.
/// Cost: 2 (H (2 D + O) + R (2 D + 4 H + O)) flop a slot forward, less than twice that backward
/// with frozen networks; saves 2 H + 3 R numbers a slot.
/// Determinism: same bits for any number of threads.
/// Throws: value_error of validate.
/// Source: CEFT (arXiv 2508.19594), whose code trains LoRA of rank 8, alpha 32 and dropout 0.1 on
/// the chosen experts.
template <class Ffn, class Adapter>
struct adapted_glu {
  static constexpr const char* name = "adapted_glu";
  static constexpr bool slots_only = true;

  Ffn network{};      ///< glu_ffn
  Adapter adapter{};  ///< lora; its dropout is that of x, one mask for all

  template <class T, class B>
  struct params {
    typename Ffn::template params<T, B> network;
    typename Adapter::template params<T, B> gate;  // A [E R, D], B [E R, H]
    typename Adapter::template params<T, B> up;    // A [E R, D], B [E R, H]
    typename Adapter::template params<T, B> down;  // A [E R, H], B [E R, O]

    template <class F>
    void visit(F f) {
      network.visit(f);
      gate.visit(f);
      up.visit(f);
      down.visit(f);
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> a, b;                  // [S, H]
    matrix_view<T, B> u_gate, u_up, u_down;  // [S, R] A x, A x, A h
  };

  void validate() const {
    network.validate();
    adapter.validate();
  }
  double input_dropout() const { return adapter.input_dropout(); }
  /// Numbers that a slot saves.
  index width() const { return network.width() + 3 * adapter.width(); }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.network.down.cols();
  }

  /// Networks and updates of E experts, parameters named `prefix`network.*, `prefix`gate.*,
  /// `prefix`up.*, `prefix`down.*.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    return adapt<T, B>(
        network.template init<T, B>(inputs, outputs, experts, random, prefix + "network."), experts,
        random, prefix);
  }
  /// Updates of networks that exist already, which keep their trainability.
  template <class T, class B>
  params<T, B> adapt(typename Ffn::template params<T, B> networks, index experts, generator& random,
                     const std::string& prefix) const {
    const index inputs = networks.gate.cols(), outputs = networks.down.cols();
    params<T, B> p;
    p.network = std::move(networks);
    const auto make = [&](index in, index out, const char* which) {
      return adapter.template init<T, B>(in, out, experts, random, prefix + which);
    };
    p.gate = make(inputs, network.hidden, "gate.");
    p.up = make(inputs, network.hidden, "up.");
    p.down = make(network.hidden, outputs, "down.");
    return p;
  }

  /// Only the updates of the given experts train, and no network.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    p.network.freeze();
    for (auto* bank : {&p.gate, &p.up, &p.down}) adapter.train_experts(*bank, experts);
  }

  /// y_s = g_s f_e(x_s) for every slot s of expert e; x and y are in expert order, x after dropout.
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y) const {
    const auto take = [&](index cols) { return ctx.memory.template take<T>(x.rows, cols); };
    const index hidden = network.hidden, ranks = adapter.width();
    const saved<T, B> kept{take(hidden), take(hidden), take(ranks), take(ranks), take(ranks)};
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto h = ctx.scratch.template take<T>(x.rows, hidden);  // [S, H]
    const auto z = ctx.scratch.template take<T>(x.rows, ranks);   // [S, R]
    const T s = static_cast<T>(adapter.scale());
    const auto enter = [&](const auto& base, const auto& bank, matrix_view<T, B> u,
                           matrix_view<T, B> a) {
      ops::grouped_gemm(ctx, slots.offsets, x, base.value(), transpose::yes, a);
      ops::grouped_gemm(ctx, slots.offsets, x, bank.a.value(), transpose::yes, u);
      ops::scale(ctx, s, u, z);
      ops::grouped_gemm(ctx, slots.offsets, z, bank.b.value(), transpose::no, a,
                        grad_mode::accumulate);
    };
    enter(p.network.gate, p.gate, kept.u_gate, kept.a);
    enter(p.network.up, p.up, kept.u_up, kept.b);
    ops::gated_activation(ctx, network.act, kept.a, kept.b, h);
    ops::grouped_gemm(ctx, slots.offsets, h, p.down.a.value(), transpose::yes, kept.u_down);
    ops::rank_gate(ctx, s, as_column(gates), kept.u_down, z);
    ops::rank_gate(ctx, T{1}, as_column(gates), h, h);
    ops::grouped_gemm(ctx, slots.offsets, h, p.network.down.value(), transpose::no, y);
    ops::grouped_gemm(ctx, slots.offsets, z, p.down.b.value(), transpose::no, y,
                      grad_mode::accumulate);
    return kept;
  }

  /// Overwrites dgates [S] and dx [S, D].
  template <class T, class B>
  void backward_grouped(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                        const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                        input<T, B> dy, vector_output<T, B> dgates, output<T, B> dx,
                        grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const index hidden = network.hidden, ranks = adapter.width();
    const auto h = ctx.scratch.template take<T>(x.rows, hidden);   // [S, H]
    const auto da = ctx.scratch.template take<T>(x.rows, hidden);  // [S, H]
    const auto z = ctx.scratch.template take<T>(x.rows, ranks);    // [S, R]
    const auto dz_gate = ctx.scratch.template take<T>(x.rows, ranks);
    const auto dz_up = ctx.scratch.template take<T>(x.rows, ranks);
    const auto more_dgates = ctx.scratch.template take<T>(x.rows, index{1});
    const T s = static_cast<T>(adapter.scale());

    ops::gated_activation(ctx, network.act, kept.a, kept.b, h);
    ops::grouped_gemm(ctx, slots.offsets, dy, p.network.down.value(), transpose::yes, da);
    ops::rank_gate_backward(ctx, T{1}, as_column(gates), h, da, da, as_column(dgates));
    const matrix_view<T, B> dz = dz_gate;
    ops::grouped_gemm(ctx, slots.offsets, dy, p.down.b.value(), transpose::yes, dz);
    if (p.down.b.trainable()) {
      ops::rank_gate(ctx, s, as_column(gates), kept.u_down, z);
      add_slot_gradient(ctx, slots, p.down.b, z, dy);
    }
    ops::rank_gate_backward(ctx, s, as_column(gates), kept.u_down, dz, dz, more_dgates);
    ops::axpy(ctx, T{1}, more_dgates, as_column(dgates));
    add_slot_gradient(ctx, slots, p.down.a, dz, h);
    ops::grouped_gemm(ctx, slots.offsets, dz, p.down.a.value(), transpose::no, da,
                      grad_mode::accumulate);
    if (p.network.down.trainable()) {
      ops::rank_gate(ctx, T{1}, as_column(gates), h, h);
      add_slot_gradient(ctx, slots, p.network.down, h, dy);
    }

    const matrix_view<T, B> db = h;  // h has served
    ops::gated_activation_backward(ctx, network.act, kept.a, kept.b, da, da, db);
    const auto leave = [&](auto& base, auto& bank, matrix_view<T, B> u, matrix_view<T, B> d,
                           matrix_view<T, B> du) {
      add_slot_gradient(ctx, slots, base, d, x);
      if (bank.b.trainable()) {
        ops::scale(ctx, s, u, z);
        add_slot_gradient(ctx, slots, bank.b, z, d);
      }
      ops::grouped_gemm(ctx, slots.offsets, d, bank.b.value(), transpose::yes, du);
      ops::scale(ctx, s, du, du);
      add_slot_gradient(ctx, slots, bank.a, du, x);
    };
    leave(p.network.gate, p.gate, kept.u_gate, da, dz_gate);
    leave(p.network.up, p.up, kept.u_up, db, dz_up);
    if (dx_mode == grad_mode::ignore) return;
    // x may lie where dx does, so everything that reads it stands above.
    const auto into = [&](input<T, B> d, input<T, B> bank, grad_mode mode) {
      ops::grouped_gemm(ctx, slots.offsets, d, bank, transpose::no, dx, mode);
    };
    into(da, p.network.gate.value(), grad_mode::overwrite);
    into(db, p.network.up.value(), grad_mode::accumulate);
    into(dz_gate, p.gate.a.value(), grad_mode::accumulate);
    into(dz_up, p.up.a.value(), grad_mode::accumulate);
  }
};

}  // namespace talpa
