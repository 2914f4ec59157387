// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/low_rank.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/gather.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/rank_share.hpp>
#include <talpa/ops/segments.hpp>

#include <span>
#include <string>
#include <utility>

namespace talpa {

/// Expert that is a low-rank update with one A for all: f_e(x) = s B_e A dropout(x), s as lora's.
///
/// Backward, with u = A x and z_e = s g_e u: dB_e += z_e^T dy, dz_e = dy B_e^T, dg_e = s <dz_e, u>,
/// du = s sum_e g_e dz_e, dA += du^T x, dx += du A.
/// Shapes: A [R, D]; bank B, stored transposed, [E R, O], row e R + r for rank r of expert e;
/// x [N, D], y [N, O].
/// Edges: an expert without tokens gets zero gradient of its B.
/// Cost: masked 2 N R (D + E O) flop forward, grouped 2 S R (D + O) for S slots; twice that
/// backward; saves u, [N, R] or [S, R].
/// Determinism: same bits for any number of threads.
/// Throws: value_error of validate.
/// Source: HydraLoRA (arXiv 2404.19245). Its code draws dropout anew for each head; here one mask a
/// call is shared, as for all experts.
struct shared_a_lora {
  static constexpr const char* name = "shared_a_lora";
  static constexpr bool slots_only = true, sums_slots = true;

  index rank = 8;       ///< R, >= 1
  double alpha = 16.0;  ///< finite
  lora_scaling scaling = lora_scaling::by_rank;
  double dropout = 0.0;  ///< share of the input that is dropped, [0, 1)
  lora_init init_a = lora_init::kaiming;

  template <class T, class B>
  struct params {
    parameter<T, B> a;  // [R, D]
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
    matrix_view<T, B> u;  // [N, R] masked, [S, R] over slots: A x
  };

  void validate() const { detail::check_low_rank(name, rank, alpha, dropout); }
  double scale() const { return detail::low_rank_scale(scaling, alpha, rank); }
  double input_dropout() const { return dropout; }
  index width() const { return rank; }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.b.cols();
  }

  /// A and the bank of E factors B, parameters named `prefix`A and `prefix`B.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    params<T, B> p;
    p.a = parameter<T, B>(prefix + "A",
                          detail::make_low_rank_a<T, B>(init_a, rank, inputs, rank, random));
    p.b = parameter<T, B>(prefix + "B",
                          detail::make_low_rank_b<T, B>(init_a, experts * rank, outputs, random));
    return p;
  }

  /// y += sum_e g_e f_e(x), zero gates included. x after dropout.
  template <class T, class B>
  saved<T, B> forward_masked(context<B>& ctx, const params<T, B>& p, input<T, B> gates,
                             input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, rank)};  // [N, R]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, p.b.rows());  // [N, E R]
    ops::gemm(ctx, x, transpose::no, p.a.value(), transpose::yes, T{0}, kept.u);
    ops::rank_spread(ctx, static_cast<T>(scale()), gates, kept.u, z);
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
    const auto dz = ctx.scratch.template take<T>(x.rows, p.b.rows());  // [N, E R]
    const auto du = ctx.scratch.template take<T>(x.rows, rank);        // [N, R]
    if (p.b.trainable()) ops::rank_spread(ctx, s, gates, kept.u, dz);
    add_gradient(ctx, p.b, dz, dy);
    ops::gemm(ctx, dy, transpose::no, p.b.value(), transpose::yes, T{0}, dz);
    ops::rank_share_gates(ctx, s, dz, kept.u, dgates);
    ops::rank_collapse(ctx, s, gates, dz, du);
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
    ops::gemm(ctx, x, transpose::no, p.a.value(), transpose::yes, T{0}, kept.u);
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
    if (p.b.trainable()) {
      ops::rank_gate(ctx, s, as_column(gates), kept.u, z);
      add_slot_gradient(ctx, slots, p.b, z, dy);
    }
    ops::grouped_gemm(ctx, slots.offsets, dy, p.b.value(), transpose::yes, du);
    ops::rank_gate_backward(ctx, s, as_column(gates), kept.u, du, du, as_column(dgates));
    ops::clear_unused(ctx, slots, du);
    add_gradient(ctx, p.a, du, x);
    input_gradient(ctx, p.a, du, dx, dx_mode);
  }
};

/// Expert that is a low-rank update with one B for all: f_e(x) = s B A_e dropout(x), s as lora's.
///
/// Backward, with u_e = A_e x and z = s sum_e g_e u_e: dB += z^T dy, dz = dy B^T,
/// dg_e = s <u_e, dz>, du_e = s g_e dz, dA_e += du_e^T x, dx += sum_e du_e A_e.
/// Shapes: bank A [E R, D], row e R + r for rank r of expert e; B, stored transposed, [R, O];
/// x [N, D], y [N, O].
/// Edges: an expert without tokens gets zero gradient of its A.
/// Cost: masked 2 N R (E D + O) flop forward, grouped 2 S R (D + O) for S slots; twice that
/// backward; saves u, [N, E R] or [S, R].
/// Determinism: same bits for any number of threads.
/// Throws: value_error of validate.
/// Source: the mirror image of HydraLoRA (arXiv 2404.19245), which that paper compares with.
struct shared_b_lora {
  static constexpr const char* name = "shared_b_lora";
  static constexpr bool slots_only = true, sums_slots = true;

  index rank = 8;       ///< R, >= 1
  double alpha = 16.0;  ///< finite
  lora_scaling scaling = lora_scaling::by_rank;
  double dropout = 0.0;  ///< share of the input that is dropped, [0, 1)
  lora_init init_a = lora_init::kaiming;

  template <class T, class B>
  struct params {
    parameter<T, B> a;  // [E R, D]
    parameter<T, B> b;  // [R, O]

    template <class F>
    void visit(F f) {
      f(a);
      f(b);
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> u;  // [N, E R] masked, [S, R] over slots: A x
  };

  void validate() const { detail::check_low_rank(name, rank, alpha, dropout); }
  double scale() const { return detail::low_rank_scale(scaling, alpha, rank); }
  double input_dropout() const { return dropout; }
  index width() const { return rank; }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.b.cols();
  }

  /// The bank of E factors A and B, parameters named `prefix`A and `prefix`B.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    params<T, B> p;
    p.a = parameter<T, B>(
        prefix + "A", detail::make_low_rank_a<T, B>(init_a, experts * rank, inputs, rank, random));
    p.b =
        parameter<T, B>(prefix + "B", detail::make_low_rank_b<T, B>(init_a, rank, outputs, random));
    return p;
  }

  /// y += sum_e g_e f_e(x), zero gates included. x after dropout.
  template <class T, class B>
  saved<T, B> forward_masked(context<B>& ctx, const params<T, B>& p, input<T, B> gates,
                             input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, p.a.rows())};  // [N, E R]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, rank);  // [N, R]
    ops::gemm(ctx, x, transpose::no, p.a.value(), transpose::yes, T{0}, kept.u);
    ops::rank_collapse(ctx, static_cast<T>(scale()), gates, kept.u, z);
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
    const auto z = ctx.scratch.template take<T>(x.rows, rank);         // [N, R]
    const auto du = ctx.scratch.template take<T>(x.rows, p.a.rows());  // [N, E R]
    if (p.b.trainable()) ops::rank_collapse(ctx, s, gates, kept.u, z);
    add_gradient(ctx, p.b, z, dy);
    ops::gemm(ctx, dy, transpose::no, p.b.value(), transpose::yes, T{0}, z);
    ops::rank_share_gates(ctx, s, kept.u, z, dgates);
    ops::rank_spread(ctx, s, gates, z, du);
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
    ops::gemm(ctx, z, transpose::no, p.b.value(), transpose::no, T{0}, y);
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
    if (p.b.trainable()) {
      ops::rank_gate(ctx, s, as_column(gates), kept.u, z);
      ops::clear_unused(ctx, slots, z);
      add_gradient(ctx, p.b, z, dy);
    }
    ops::gemm(ctx, dy, transpose::no, p.b.value(), transpose::yes, T{0}, du);
    ops::rank_gate_backward(ctx, s, as_column(gates), kept.u, du, du, as_column(dgates));
    add_slot_gradient(ctx, slots, p.a, du, x);
    if (dx_mode != grad_mode::ignore) {
      ops::grouped_gemm(ctx, slots.offsets, du, p.a.value(), transpose::no, dx);
    }
  }
};

static_assert(rank_space_expert<shared_a_lora> && rank_space_expert<shared_b_lora>);

}  // namespace talpa
