// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/low_rank.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/indexed_gemm.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/routed_linear.hpp>
#include <talpa/ops/segments.hpp>

#include <span>
#include <string>

namespace talpa {

/// Expert that is a low-rank update: f_e(x) = s B_e A_e dropout(x), s = alpha / r or alpha /
/// sqrt(r).
///
/// The gate is applied in rank space: sum_e g_e f_e(x) = s B (g * (A x)) with all experts' factors
/// stacked, which costs one multiplication per rank instead of one per output.
/// Backward, with u = A_e x and z = s g u: dB_e += z^T dy, dz = dy B_e^T, dg = s sum_r dz_r u_r,
/// du = s g dz, dA_e += du^T x, dx += du A_e.
/// Shapes: bank A [E R, D] and B transposed [E R, O], both row e R + r for rank r of expert e;
/// x [N, D], y [N, O].
/// Edges: an expert without tokens gets zero gradient; gate 1 and E = 1 is plain LoRA bit for bit.
/// Cost: 2 N R (D + O) flop per expert and its tokens forward, twice that backward; saves u.
/// Dropout is the layer's business (`input_dropout`): one mask per call, shared by the experts.
/// Determinism: same bits for any number of threads.
/// Throws: value_error for a rank below 1, an alpha that is not finite, a dropout outside [0, 1).
/// Source: Hu et al. 2021 (arXiv 2106.09685); as an expert MoLA (arXiv 2402.08562).
struct lora {
  static constexpr const char* name = "lora";
  static constexpr bool slots_only = true;

  index rank = 8;       ///< R, >= 1
  double alpha = 16.0;  ///< finite
  lora_scaling scaling = lora_scaling::by_rank;
  double dropout = 0.0;  ///< share of the input that is dropped, [0, 1)
  lora_init init_a = lora_init::kaiming;

  template <class T, class B>
  struct params {
    parameter<T, B> a;  // [E R, D]
    parameter<T, B> b;  // [E R, O]

    template <class F>
    void visit(F f) {
      f(a);
      f(b);
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> u;  // [N, E R] masked, [S, R] over slots: A x, which dgates and dB need
  };

  void validate() const { detail::check_low_rank(name, rank, alpha, dropout); }
  double scale() const { return detail::low_rank_scale(scaling, alpha, rank); }
  double input_dropout() const { return dropout; }
  /// Adapter columns of one expert: what the cost model of a layer counts.
  index width() const { return rank; }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.b.cols();
  }

  /// Bank of E experts, parameters named `prefix`A and `prefix`B.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    params<T, B> p;
    p.a = parameter<T, B>(
        prefix + "A", detail::make_low_rank_a<T, B>(init_a, experts * rank, inputs, rank, random));
    p.b = parameter<T, B>(prefix + "B",
                          detail::make_low_rank_b<T, B>(init_a, experts * rank, outputs, random));
    return p;
  }

  /// Only the given experts of the bank train.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    p.a.train_blocks(rank, experts);
    p.b.train_blocks(rank, experts);
  }

  /// y += sum_e g_e f_e(x) over all ranks at once, zero gates included. x after dropout.
  template <class T, class B>
  saved<T, B> forward_masked(context<B>& ctx, const params<T, B>& p, input<T, B> gates,
                             input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, p.a.rows())};  // [N, E R]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, p.a.rows());  // [N, E R]
    ops::gemm(ctx, x, transpose::no, p.a.value(), transpose::yes, T{0}, kept.u);
    ops::rank_gate(ctx, static_cast<T>(scale()), gates, kept.u, z);
    ops::gemm(ctx, z, transpose::no, p.b.value(), transpose::no, T{1}, y);
    return kept;
  }

  /// Overwrites dgates [N, E]; writes or adds to dx [N, D] as dx_mode says.
  template <class T, class B>
  void backward_masked(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> gates,
                       input<T, B> x, input<T, B> dy, output<T, B> dgates, output<T, B> dx,
                       grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const T s = static_cast<T>(scale());
    const auto z = ctx.scratch.template take<T>(x.rows, p.a.rows());   // [N, E R]
    const auto du = ctx.scratch.template take<T>(x.rows, p.a.rows());  // [N, E R]
    if (p.b.trainable()) ops::rank_gate(ctx, s, gates, kept.u, z);
    add_gradient(ctx, p.b, z, dy);
    ops::gemm(ctx, dy, transpose::no, p.b.value(), transpose::yes, T{0}, du);
    ops::rank_gate_backward(ctx, s, gates, kept.u, du, du, dgates);
    add_gradient(ctx, p.a, du, x);
    input_gradient(ctx, p.a, du, dx, dx_mode);
  }

  /// y_s = g_s f_e(x_s) for every slot s of expert e; x and y are in expert order, x after dropout.
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, rank)};  // [S, R]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, rank);  // [S, R]
    ops::grouped_gemm(ctx, slots.offsets, x, p.a.value(), transpose::yes, kept.u);
    ops::rank_gate(ctx, static_cast<T>(scale()), as_column(gates), kept.u, z);
    ops::grouped_gemm(ctx, slots.offsets, z, p.b.value(), transpose::no, y);
    return kept;
  }

  /// Overwrites dgates [S] and dx [S, D].
  template <class T, class B>
  void backward_grouped(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                        const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                        input<T, B> dy, vector_output<T, B> dgates, output<T, B> dx,
                        grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const T s = static_cast<T>(scale());
    const auto z = ctx.scratch.template take<T>(x.rows, rank);   // [S, R]
    const auto du = ctx.scratch.template take<T>(x.rows, rank);  // [S, R]
    const auto gate_column = as_column(gates);                   // [S, 1]
    if (p.b.trainable()) {
      ops::rank_gate(ctx, s, gate_column, kept.u, z);
      add_slot_gradient(ctx, slots, p.b, z, dy);
    }
    ops::grouped_gemm(ctx, slots.offsets, dy, p.b.value(), transpose::yes, du);
    ops::rank_gate_backward(ctx, s, gate_column, kept.u, du, du, as_column(dgates));
    add_slot_gradient(ctx, slots, p.a, du, x);
    if (dx_mode != grad_mode::ignore) {
      ops::grouped_gemm(ctx, slots.offsets, du, p.a.value(), transpose::no, dx);
    }
  }

  /// y (+)= `base` + sum_e g_e f_e(x) over the slots of each token, rows of x and y read and
  /// written where they lie. x [N, D] after dropout, y [N, O], gates [S]; the base may be none.
  template <class T, class B>
  saved<T, B> forward_indexed(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y,
                              grad_mode y_mode, const packed_product<T, B>& base = {}) const {
    const saved<T, B> kept{ctx.memory.template take<T>(gates.size, rank)};  // [S, R]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(gates.size, rank);  // [S, R]
    ops::indexed_shrink(ctx, slots, x, p.a.value(), kept.u);
    ops::rank_gate(ctx, static_cast<T>(scale()), as_column(gates), kept.u, z);
    expand(ctx, slots, z, p.b, base, y, y_mode);
    return kept;
  }

  /// Overwrites dgates [S]; writes or adds to dx [N, D] as dx_mode says, `base` included, and what
  /// more() returns, which is called when dgates is there. `dropped` is the mask that made x, where
  /// the backend keeps it: only its share of the experts' dx stays.
  template <class T, class B, class More = no_more<T, B>>
  void backward_indexed(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                        const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                        input<T, B> dy, vector_output<T, B> dgates, output<T, B> dx,
                        grad_mode dx_mode, const packed_product<T, B>& base = {},
                        const More& more = {}, const dropout_bits<B>& dropped = {}) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto du = ctx.scratch.template take<T>(gates.size, rank);  // [S, R]
    ops::indexed_shrink(ctx, slots, dy, p.b.value(), du);
    ops::rank_gate_backward(ctx, static_cast<T>(scale()), as_column(gates), kept.u, du, du,
                            as_column(dgates));
    const low_rank_product<T, B> rest = more();
    bank_gradients(ctx, p, kept, slots, gates, x, dy, du);
    expand(ctx, slots, du, p.a, base, dx, dx_mode, rest, dropped);
  }

  /// What ops::routed_linear reads of a bank behind a router [E, D].
  template <class T, class B>
  routed_adapter<T, B> adapter(const params<T, B>& p, input<T, B> router,
                               index max_selected) const {
    return {router, p.a.value(), p.b.value(), static_cast<T>(scale()), max_selected};
  }
  /// Adds to the gradients of a bank: du [S, R] as backward makes it.
  template <class T, class B>
  void bank_gradients(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                      const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                      input<T, B> dy, input<T, B> du) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(gates.size, rank);  // [S, R]
    if (p.b.trainable()) {
      ops::rank_gate(ctx, static_cast<T>(scale()), as_column(gates), kept.u, z);
      ops::indexed_gradient(ctx, slots, z, dy, p.b.trained(), p.b.grad());
    }
    if (p.a.trainable()) ops::indexed_gradient(ctx, slots, du, x, p.a.trained(), p.a.grad());
  }

 private:
  template <class T, class B>
  static void expand(context<B>& ctx, const segments<B>& slots, input<T, B> z,
                     const parameter<T, B>& bank, const packed_product<T, B>& base, output<T, B> y,
                     grad_mode y_mode, const low_rank_product<T, B>& rest = {},
                     const dropout_bits<B>& dropped = {}) {
    if constexpr (has_packed_matrix<B>) {
      if (base.b != nullptr) {
        ops::indexed_expand(ctx, slots, z, bank.value(), base, y, y_mode, rest, dropped);
        return;
      }
    }
    if constexpr (has_dropout_bits<B>) {
      ops::indexed_expand(ctx, slots, z, bank.value(), y, y_mode, dropped);
    } else {
      ops::indexed_expand(ctx, slots, z, bank.value(), y, y_mode);
    }
    if (rest.w.rows != 0 && y_mode != grad_mode::ignore) {
      ops::gemm(ctx, rest.d, transpose::no, rest.w, transpose::no, T{1}, y);
    }
  }
};

static_assert(indexed_expert<lora> && routed_linear_expert<lora>);

}  // namespace talpa
