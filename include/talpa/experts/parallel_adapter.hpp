// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/activation.hpp>
#include <talpa/ops/dropout.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/segments.hpp>
#include <talpa/ops/slot_dropout.hpp>

#include <cmath>
#include <span>
#include <string>
#include <utility>

namespace talpa {

/// How the factors of a parallel adapter begin.
enum class adapter_init {
  /// down uniform in +-1 / sqrt(D) (Kaiming with a = sqrt 5), up zero: nothing changes at first.
  kaiming,
  /// down normal with standard deviation sqrt(2 / R), up normal with 1e-6: as PERFT's code, whose
  /// fan is the output's. Nearly nothing changes at first.
  perft,
};

/// Expert that is a bottleneck with an activation: f_e(x) = s U_e act(dropout(V_e x)).
///
/// The gate is applied behind the activation, in the bottleneck: sum_e g_e f_e(x) = U (s g *
/// act(dropout(V x))) with all experts' factors stacked. In training each unit of each expert is
/// dropped by itself, before the activation; the input is not.
/// Backward, with u = dropout(V_e x), h = act(u) and z = s g h: dU_e += z^T dy, dz = dy U_e^T,
/// dg = s sum_r dz_r h_r, dv = s g dz act'(u) through the mask, dV_e += dv^T x, dx += dv V_e.
/// Shapes: bank down [E R, D] and up, stored transposed, [E R, O], both row e R + r for unit r of
/// expert e; x [N, D], y [N, O].
/// Edges: an expert without tokens gets zero gradient.
/// Cost: 2 N R (D + O) flop per expert and its tokens forward, twice that backward; saves u.
/// Determinism: same bits for any number of threads. The mask is a function of a stream, token,
/// expert and unit, so that both forms drop the same.
/// Throws: value_error of validate.
/// Source: He et al. 2022 (arXiv 2110.04366); as an expert beside a mixture PERFT (arXiv
/// 2411.08212), with silu, s = 1 and dropout 0.05.
template <activation_function Act = silu>
struct parallel_adapter {
  static constexpr const char* name = "parallel_adapter";
  static constexpr bool slots_only = true;

  index rank = 16;       ///< R, >= 1: width of the bottleneck
  double scale = 1.0;    ///< s, finite
  double dropout = 0.0;  ///< share of the bottleneck that is dropped, [0, 1)
  adapter_init init_factors = adapter_init::kaiming;
  Act act{};

  template <class T, class B>
  struct params {
    parameter<T, B> down;  // [E R, D]
    parameter<T, B> up;    // [E R, O]

    template <class F>
    void visit(F f) {
      f(down);
      f(up);
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> u;  // [N, E R] masked, [S, R] over slots: dropout(V x)
    dropout_mask mask;
  };

  void validate() const {
    check_at_least(name, "rank", rank, 1, "width of the bottleneck");
    check_value(std::isfinite(scale), name, "scale", scale, "a finite number");
    check_value(dropout >= 0.0 && dropout < 1.0, name, "dropout", dropout, "0 <= dropout < 1");
  }
  double input_dropout() const { return 0.0; }
  double hidden_dropout() const { return dropout; }
  index width() const { return rank; }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.up.cols();
  }

  /// Bank of E experts, parameters named `prefix`down and `prefix`up.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    matrix<T, B> down(experts * rank, inputs), up(experts * rank, outputs);
    if (init_factors == adapter_init::kaiming) {
      fill_uniform(down.view(), 1.0 / std::sqrt(static_cast<double>(inputs)), random);
    } else {
      fill_normal(down.view(), std::sqrt(2.0 / static_cast<double>(rank)), random);
      fill_normal(up.view(), 1e-6, random);
    }
    params<T, B> p;
    p.down = parameter<T, B>(prefix + "down", std::move(down));
    p.up = parameter<T, B>(prefix + "up", std::move(up));
    return p;
  }

  /// Only the given experts of the bank train.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    p.down.train_blocks(rank, experts);
    p.up.train_blocks(rank, experts);
  }

  /// y += sum_e g_e f_e(x) over all bottlenecks at once, zero gates included.
  template <class T, class B>
  saved<T, B> forward_masked(context<B>& ctx, const params<T, B>& p, input<T, B> gates,
                             input<T, B> x, output<T, B> y, const dropout_mask& mask = {}) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, p.down.rows()), mask};
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, p.down.rows());  // [N, E R]
    ops::gemm(ctx, x, transpose::no, p.down.value(), transpose::yes, T{0}, kept.u);
    if (mask.active) ops::dropout(ctx, mask.stream, mask.keep, kept.u, kept.u);
    ops::activation(ctx, act, kept.u, z);
    ops::rank_gate(ctx, static_cast<T>(scale), gates, z, z);
    ops::gemm(ctx, z, transpose::no, p.up.value(), transpose::no, T{1}, y);
    return kept;
  }

  /// Overwrites dgates [N, E]; writes or adds to dx [N, D] as dx_mode says.
  template <class T, class B>
  void backward_masked(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> gates,
                       input<T, B> x, input<T, B> dy, output<T, B> dgates, output<T, B> dx,
                       grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const T s = static_cast<T>(scale);
    const auto h = ctx.scratch.template take<T>(x.rows, p.down.rows());   // [N, E R]
    const auto du = ctx.scratch.template take<T>(x.rows, p.down.rows());  // [N, E R]
    ops::activation(ctx, act, kept.u, h);
    ops::gemm(ctx, dy, transpose::no, p.up.value(), transpose::yes, T{0}, du);
    ops::rank_gate_backward(ctx, s, gates, h, du, du, dgates);
    ops::activation_backward(ctx, act, kept.u, du, du, grad_mode::overwrite);
    if (kept.mask.active) ops::dropout(ctx, kept.mask.stream, kept.mask.keep, du, du);
    if (p.up.trainable()) ops::rank_gate(ctx, s, gates, h, h);
    add_gradient(ctx, p.up, h, dy);
    add_gradient(ctx, p.down, du, x);
    input_gradient(ctx, p.down, du, dx, dx_mode);
  }

  /// y_s = g_s f_e(x_s) for every slot s of expert e; x and y are in expert order.
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y,
                              const dropout_mask& mask = {}) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, rank), mask};
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, rank);  // [S, R]
    ops::grouped_gemm(ctx, slots.offsets, x, p.down.value(), transpose::yes, kept.u);
    if (mask.active) ops::slot_dropout(ctx, slots, mask.stream, mask.keep, kept.u, kept.u);
    ops::activation(ctx, act, kept.u, z);
    ops::rank_gate(ctx, static_cast<T>(scale), as_column(gates), z, z);
    ops::grouped_gemm(ctx, slots.offsets, z, p.up.value(), transpose::no, y);
    return kept;
  }

  /// Overwrites dgates [S] and dx [S, D].
  template <class T, class B>
  void backward_grouped(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                        const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                        input<T, B> dy, vector_output<T, B> dgates, output<T, B> dx,
                        grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const T s = static_cast<T>(scale);
    const auto h = ctx.scratch.template take<T>(x.rows, rank);   // [S, R]
    const auto du = ctx.scratch.template take<T>(x.rows, rank);  // [S, R]
    ops::activation(ctx, act, kept.u, h);
    ops::grouped_gemm(ctx, slots.offsets, dy, p.up.value(), transpose::yes, du);
    ops::rank_gate_backward(ctx, s, as_column(gates), h, du, du, as_column(dgates));
    ops::activation_backward(ctx, act, kept.u, du, du, grad_mode::overwrite);
    if (kept.mask.active) {
      ops::slot_dropout(ctx, slots, kept.mask.stream, kept.mask.keep, du, du);
    }
    if (p.up.trainable()) {
      ops::rank_gate(ctx, s, as_column(gates), h, h);
      add_slot_gradient(ctx, slots, p.up, h, dy);
    }
    add_slot_gradient(ctx, slots, p.down, du, x);
    if (dx_mode != grad_mode::ignore) {
      ops::grouped_gemm(ctx, slots.offsets, du, p.down.value(), transpose::no, dx);
    }
  }
};

static_assert(rank_space_expert<parallel_adapter<>> && drops_hidden<parallel_adapter<>>);

}  // namespace talpa
