// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/gated_activation.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/segments.hpp>

#include <cmath>
#include <span>
#include <string>
#include <utility>

namespace talpa {

/// Expert that is a gated feed-forward network: f_e(x) = D_e (act(G_e x) * (U_e x)), SwiGLU with
/// act = silu.
///
/// Backward, with a = G_e x, b = U_e x, h = act(a) b and z = g h: dD_e += z^T dy, dz = dy D_e^T,
/// dg = sum_h dz_h h_h, dh = g dz, da = dh b act'(a), db = dh act(a), dG_e += da^T x, dU_e += db^T
/// x, dx = da G_e + db U_e.
/// Shapes: banks gate and up [E H, D], and down stored transposed [E H, O], all row e H + j for
/// neuron j of expert e: an expert is a block of rows of each, and so is a slice of a dense
/// network.
/// Edges: an expert without tokens gets zero gradient.
/// Cost: 2 H (2 D + O) flop a slot forward, twice that backward; saves a and b, 2 H numbers a slot.
/// Determinism: same bits for any number of threads.
/// Throws: value_error of validate.
/// Source: Shazeer 2020 (arXiv 2002.05202); as an expert Mixtral (arXiv 2401.04088).
template <activation_function Act = silu>
struct glu_ffn {
  static constexpr const char* name = "glu_ffn";
  static constexpr bool slots_only = true;

  index hidden = 0;  ///< H, >= 1: neurons of one expert
  Act act{};

  template <class T, class B>
  struct params {
    parameter<T, B> gate;  // [E H, D]
    parameter<T, B> up;    // [E H, D]
    parameter<T, B> down;  // [E H, O]

    template <class F>
    void visit(F f) {
      f(gate);
      f(up);
      f(down);
    }
    void freeze() {
      visit([](parameter<T, B>& p) { p.freeze(); });
    }
    void train() {
      visit([](parameter<T, B>& p) { p.train(); });
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> a;  // [S, H] G x
    matrix_view<T, B> b;  // [S, H] U x
  };

  void validate() const { check_at_least(name, "hidden", hidden, 1, "neurons of one expert"); }
  double input_dropout() const { return 0.0; }
  /// Numbers that a slot saves.
  index width() const { return 2 * hidden; }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.down.cols();
  }

  /// Bank of E experts, each factor uniform in +-1 / sqrt(its inputs) (Kaiming with a = sqrt 5).
  /// Parameters are named `prefix`gate, `prefix`up and `prefix`down.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    matrix<T, B> gate(experts * hidden, inputs), up(experts * hidden, inputs);
    matrix<T, B> down(experts * hidden, outputs);
    fill_uniform(gate.view(), 1.0 / std::sqrt(static_cast<double>(inputs)), random);
    fill_uniform(up.view(), 1.0 / std::sqrt(static_cast<double>(inputs)), random);
    fill_uniform(down.view(), 1.0 / std::sqrt(static_cast<double>(hidden)), random);
    params<T, B> p;
    p.gate = parameter<T, B>(prefix + "gate", std::move(gate));
    p.up = parameter<T, B>(prefix + "up", std::move(up));
    p.down = parameter<T, B>(prefix + "down", std::move(down));
    return p;
  }

  /// Only the given experts of the bank train.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    p.gate.train_blocks(hidden, experts);
    p.up.train_blocks(hidden, experts);
    p.down.train_blocks(hidden, experts);
  }

  /// y_s = g_s f_e(x_s) for every slot s of expert e; x and y are in expert order.
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, hidden),
                           ctx.memory.template take<T>(x.rows, hidden)};
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, hidden);  // [S, H]
    ops::grouped_gemm(ctx, slots.offsets, x, p.gate.value(), transpose::yes, kept.a);
    ops::grouped_gemm(ctx, slots.offsets, x, p.up.value(), transpose::yes, kept.b);
    ops::gated_activation(ctx, act, kept.a, kept.b, z);
    ops::rank_gate(ctx, T{1}, as_column(gates), z, z);
    ops::grouped_gemm(ctx, slots.offsets, z, p.down.value(), transpose::no, y);
    return kept;
  }

  /// Overwrites dgates [S] and dx [S, D].
  template <class T, class B>
  void backward_grouped(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                        const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                        input<T, B> dy, vector_output<T, B> dgates, output<T, B> dx,
                        grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto h = ctx.scratch.template take<T>(x.rows, hidden);   // [S, H]
    const auto da = ctx.scratch.template take<T>(x.rows, hidden);  // [S, H]
    ops::gated_activation(ctx, act, kept.a, kept.b, h);
    ops::grouped_gemm(ctx, slots.offsets, dy, p.down.value(), transpose::yes, da);
    ops::rank_gate_backward(ctx, T{1}, as_column(gates), h, da, da, as_column(dgates));
    if (p.down.trainable()) {
      ops::rank_gate(ctx, T{1}, as_column(gates), h, h);
      add_slot_gradient(ctx, slots, p.down, h, dy);
    }
    const matrix_view<T, B> db = h;  // h has served
    ops::gated_activation_backward(ctx, act, kept.a, kept.b, da, da, db);
    add_slot_gradient(ctx, slots, p.gate, da, x);
    add_slot_gradient(ctx, slots, p.up, db, x);
    if (dx_mode == grad_mode::ignore) return;
    ops::grouped_gemm(ctx, slots.offsets, da, p.gate.value(), transpose::no, dx);
    ops::grouped_gemm(ctx, slots.offsets, db, p.up.value(), transpose::no, dx,
                      grad_mode::accumulate);
  }
};

/// The feed-forward network of Llama, Mixtral and OLMoE.
using swiglu = glu_ffn<silu>;

static_assert(expert_policy<swiglu>);

}  // namespace talpa
