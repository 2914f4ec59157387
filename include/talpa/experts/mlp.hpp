// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/activation.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/segments.hpp>

#include <cmath>
#include <span>
#include <string>
#include <utility>

namespace talpa {

/// Expert that is a feed-forward network of two layers: f_e(x) = D_e act(U_e x + c_e) + d_e, the
/// biases c and d where wanted.
///
/// Backward, with a = U_e x + c_e, h = act(a) and z = g h: dD_e += z^T dy, dd_e += sum g dy,
/// dz = dy D_e^T, dg = sum_h dz_h h_h + <dy, d_e>, da = g dz act'(a), dU_e += da^T x,
/// dc_e += sum da, dx = da U_e.
/// Shapes: bank up [E H, D] and down, stored transposed, [E H, O], both row e H + j for neuron j of
/// expert e; biases up_bias [E, H], down_bias [E, O].
/// Edges: an expert without tokens gets zero gradient.
/// Cost: 2 H (D + O) flop a slot forward, twice that backward; saves a, H numbers a slot.
/// Determinism: same bits for any number of threads.
/// Throws: value_error of validate.
/// Source: Switch Transformers (arXiv 2101.03961), the experts of T5.
template <activation_function Act = relu>
struct mlp {
  static constexpr const char* name = "mlp";
  static constexpr bool slots_only = true;

  index hidden = 0;   ///< H, >= 1: neurons of one expert
  bool bias = false;  ///< whether both layers have one
  Act act{};

  template <class T, class B>
  struct params {
    parameter<T, B> up;         // [E H, D]
    parameter<T, B> down;       // [E H, O]
    parameter<T, B> up_bias;    // [E, H], absent without bias
    parameter<T, B> down_bias;  // [E, O], absent without bias

    template <class F>
    void visit(F f) {
      f(up);
      f(down);
      if (up_bias.exists()) f(up_bias);
      if (down_bias.exists()) f(down_bias);
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> a;  // [S, H] before the activation
  };

  void validate() const { check_at_least(name, "hidden", hidden, 1, "neurons of one expert"); }
  double input_dropout() const { return 0.0; }
  /// Numbers that a slot saves.
  index width() const { return hidden; }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.down.cols();
  }

  /// Bank of E experts, everything uniform in +-1 / sqrt(inputs of the layer) (Kaiming with a =
  /// sqrt 5). Parameters are named `prefix`up, `prefix`down, `prefix`up_bias and `prefix`down_bias.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    const double first = 1.0 / std::sqrt(static_cast<double>(inputs));
    const double second = 1.0 / std::sqrt(static_cast<double>(hidden));
    const auto make = [&](const char* which, index rows, index cols, double bound) {
      matrix<T, B> m(rows, cols);
      fill_uniform(m.view(), bound, random);
      return parameter<T, B>(prefix + which, std::move(m));
    };
    params<T, B> p;
    p.up = make("up", experts * hidden, inputs, first);
    p.down = make("down", experts * hidden, outputs, second);
    if (bias) {
      p.up_bias = make("up_bias", experts, hidden, first);
      p.down_bias = make("down_bias", experts, outputs, second);
    }
    return p;
  }

  /// Only the given experts of the bank train.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    p.up.train_blocks(hidden, experts);
    p.down.train_blocks(hidden, experts);
    if (p.up_bias.exists()) p.up_bias.train_blocks(1, experts);
    if (p.down_bias.exists()) p.down_bias.train_blocks(1, experts);
  }

  /// y_s = g_s f_e(x_s) for every slot s of expert e; x and y are in expert order.
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, hidden)};  // [S, H]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, hidden);  // [S, H]
    ops::grouped_gemm(ctx, slots.offsets, x, p.up.value(), transpose::yes, kept.a);
    if (p.up_bias.exists()) {
      ops::grouped_gemm(ctx, slots.offsets, ones<T>(ctx, x.rows), p.up_bias.value(), transpose::no,
                        kept.a, grad_mode::accumulate);
    }
    ops::activation(ctx, act, kept.a, z);
    ops::rank_gate(ctx, T{1}, as_column(gates), z, z);
    ops::grouped_gemm(ctx, slots.offsets, z, p.down.value(), transpose::no, y);
    if (p.down_bias.exists()) {
      ops::grouped_gemm(ctx, slots.offsets, as_column(gates), p.down_bias.value(), transpose::no, y,
                        grad_mode::accumulate);
    }
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
    ops::activation(ctx, act, kept.a, h);
    ops::grouped_gemm(ctx, slots.offsets, dy, p.down.value(), transpose::yes, da);
    ops::rank_gate_backward(ctx, T{1}, as_column(gates), h, da, da, as_column(dgates));
    if (p.down_bias.exists()) {
      ops::grouped_gemm(ctx, slots.offsets, dy, p.down_bias.value(), transpose::yes,
                        as_column(dgates), grad_mode::accumulate);
    }
    if (p.down.trainable()) {
      ops::rank_gate(ctx, T{1}, as_column(gates), h, h);
      add_slot_gradient(ctx, slots, p.down, h, dy);
    }
    add_slot_gradient(ctx, slots, p.down_bias, as_column(gates), dy);
    ops::activation_backward(ctx, act, kept.a, da, da, grad_mode::overwrite);
    add_slot_gradient(ctx, slots, p.up, da, x);
    if (p.up_bias.trainable()) {
      add_slot_gradient(ctx, slots, p.up_bias, ones<T>(ctx, x.rows), da);
    }
    if (dx_mode != grad_mode::ignore) {
      ops::grouped_gemm(ctx, slots.offsets, da, p.up.value(), transpose::no, dx);
    }
  }

 private:
  template <class T, class B>
  static matrix_view<const T, B> ones(context<B>& ctx, index rows) {
    const auto column = ctx.scratch.template take<T>(rows, index{1});  // [S, 1]
    ops::fill(ctx, T{1}, column);
    return column;
  }
};

static_assert(expert_policy<mlp<>>);

}  // namespace talpa
