// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/low_rank.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/ragged_gate.hpp>
#include <talpa/ops/ragged_gemm.hpp>
#include <talpa/ops/segments.hpp>

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace talpa {

/// Expert that is a low-rank update, each of a rank of its own: f_e(x) = s_e B_e A_e dropout(x),
/// s_e = alpha / R_e or alpha / sqrt(R_e).
///
/// Gated in rank space as lora, with the ranks of all experts one behind the other and none padded.
/// Backward, with u = A_e x and z = s_e g u: dB_e += z^T dy, dz = dy B_e^T,
/// dg = s_e sum_r dz_r u_r, du = s_e g dz, dA_e += du^T x, dx += du A_e.
/// Shapes: with P = sum_e R_e and p_e = R_0 + .. + R_(e - 1), bank A [P, D] and B transposed
/// [P, O], both row p_e + r for rank r of expert e; x [N, D], y [N, O].
/// Edges: an expert without tokens gets zero gradient; equal ranks give what lora gives.
/// Cost: 2 N R_e (D + O) flop per expert and its tokens forward, twice that backward; saves u, over
/// slots in rows of the largest rank. A plan counts the largest rank for every expert.
/// Dropout is the layer's business (`input_dropout`): one mask per call, shared by the experts.
/// Determinism: same bits for any number of threads.
/// Throws: value_error of validate, and of init unless there is one rank an expert.
/// Source: Hu et al. 2021 (arXiv 2106.09685); ranks per expert as in DR-LoRA (arXiv 2601.04823),
/// whose schedule that grows them is not part of this.
struct mixed_rank_lora {
  static constexpr const char* name = "mixed_rank_lora";
  static constexpr bool slots_only = true;

  std::vector<index> ranks{8};  ///< R_e, one an expert, each >= 1
  double alpha = 16.0;          ///< finite
  lora_scaling scaling = lora_scaling::by_rank;
  double dropout = 0.0;  ///< share of the input that is dropped, [0, 1)
  lora_init init_a = lora_init::kaiming;

  template <class T, class B>
  struct params {
    parameter<T, B> a;         // [P, D]
    parameter<T, B> b;         // [P, O]
    vector<index, cpu> first;  // [E + 1]: p_e, and P
    vector<index, B> blocks;   // the same, where the experts are
    vector<T, B> scales;       // [E]: s_e

    template <class F>
    void visit(F f) {
      f(a);
      f(b);
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> u;  // [N, P] masked, [S, largest R] over slots: A x
  };

  void validate() const {
    check_value(!ranks.empty(), name, "ranks", 0.0, "at least one number, one an expert");
    for (const index rank : ranks) detail::check_low_rank(name, rank, alpha, dropout);
  }
  double scale(index expert) const {
    return detail::low_rank_scale(scaling, alpha, ranks[static_cast<std::size_t>(expert)]);
  }
  double input_dropout() const { return dropout; }
  /// The largest rank.
  index width() const { return *std::max_element(ranks.begin(), ranks.end()); }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.b.cols();
  }

  /// Bank of E experts, parameters named `prefix`A and `prefix`B. Each expert begins as one of its
  /// rank alone would.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    validate();
    check_range(name, "ranks", static_cast<index>(ranks.size()), experts, experts,
                "numbers, one an expert");
    params<T, B> p;
    vector<T, cpu> scales(experts);
    p.first = vector<index, cpu>(experts + 1);
    for (index e = 0; e < experts; ++e) {
      p.first[e + 1] = p.first[e] + ranks[static_cast<std::size_t>(e)];
      scales[e] = static_cast<T>(scale(e));
    }
    p.blocks = vector<index, B>(experts + 1);
    p.scales = vector<T, B>(experts);
    to_device<index, B>(as_column(p.first.view()), as_column(p.blocks.view()));
    to_device<T, B>(as_column(scales.view()), as_column(p.scales.view()));
    matrix<T, cpu> a(p.first[experts], inputs);
    for (index e = 0; e < experts; ++e) {
      const index rank = ranks[static_cast<std::size_t>(e)];
      const auto of_expert = detail::make_low_rank_a<T, cpu>(init_a, rank, inputs, rank, random);
      for (index r = 0; r < rank; ++r) {
        std::copy_n(of_expert.view().row(r), inputs, a.view().row(p.first[e] + r));
      }
    }
    p.b = parameter<T, B>(prefix + "B",
                          detail::make_low_rank_b<T, B>(init_a, a.rows(), outputs, random));
    p.a = parameter<T, B>(prefix + "A", to_device<B>(a.view()));
    return p;
  }

  /// Only the given experts of the bank train.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    std::vector<index> rows;
    for (const index e : experts) {
      check_range(name, "experts", e, 0, static_cast<index>(ranks.size()) - 1, "experts");
      for (index row = p.first[e]; row < p.first[e + 1]; ++row) rows.push_back(row);
    }
    p.a.train_blocks(1, rows);
    p.b.train_blocks(1, rows);
  }

  /// y += sum_e g_e f_e(x) over all ranks at once, zero gates included. x after dropout.
  template <class T, class B>
  saved<T, B> forward_masked(context<B>& ctx, const params<T, B>& p, input<T, B> gates,
                             input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, p.a.rows())};  // [N, P]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, p.a.rows());  // [N, P]
    ops::gemm(ctx, x, transpose::no, p.a.value(), transpose::yes, T{0}, kept.u);
    ops::ragged_gate(ctx, p.blocks, p.scales, gates, kept.u, z);
    ops::gemm(ctx, z, transpose::no, p.b.value(), transpose::no, T{1}, y);
    return kept;
  }

  /// Overwrites dgates [N, E]; writes or adds to dx [N, D] as dx_mode says.
  template <class T, class B>
  void backward_masked(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> gates,
                       input<T, B> x, input<T, B> dy, output<T, B> dgates, output<T, B> dx,
                       grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, p.a.rows());   // [N, P]
    const auto du = ctx.scratch.template take<T>(x.rows, p.a.rows());  // [N, P]
    if (p.b.trainable()) ops::ragged_gate(ctx, p.blocks, p.scales, gates, kept.u, z);
    add_gradient(ctx, p.b, z, dy);
    ops::gemm(ctx, dy, transpose::no, p.b.value(), transpose::yes, T{0}, du);
    ops::ragged_gate_backward(ctx, p.blocks, p.scales, gates, kept.u, du, du, dgates);
    add_gradient(ctx, p.a, du, x);
    input_gradient(ctx, p.a, du, dx, dx_mode);
  }

  /// y_s = g_s f_e(x_s) for every slot s of expert e; x and y are in expert order, x after dropout.
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, width())};  // [S, R]
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, width());  // [S, R]
    ops::ragged_gemm(ctx, slots.offsets, p.blocks, x, p.a.value(), transpose::yes, kept.u);
    ops::ragged_slot_gate(ctx, slots.offsets, p.blocks, p.scales, gates, kept.u, z);
    ops::ragged_gemm(ctx, slots.offsets, p.blocks, z, p.b.value(), transpose::no, y);
    return kept;
  }

  /// Overwrites dgates [S] and dx [S, D].
  template <class T, class B>
  void backward_grouped(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                        const segments<B>& slots, vector_input<T, B> gates, input<T, B> x,
                        input<T, B> dy, vector_output<T, B> dgates, output<T, B> dx,
                        grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, width());   // [S, R]
    const auto du = ctx.scratch.template take<T>(x.rows, width());  // [S, R]
    if (p.b.trainable()) {
      ops::ragged_slot_gate(ctx, slots.offsets, p.blocks, p.scales, gates, kept.u, z);
      ops::ragged_gemm_gradient(ctx, slots.offsets, p.blocks, z, dy, p.b.trained(), p.b.grad());
    }
    ops::ragged_gemm(ctx, slots.offsets, p.blocks, dy, p.b.value(), transpose::yes, du);
    ops::ragged_slot_gate_backward(ctx, slots.offsets, p.blocks, p.scales, gates, kept.u, du, du,
                                   dgates);
    if (p.a.trainable()) {
      ops::ragged_gemm_gradient(ctx, slots.offsets, p.blocks, du, x, p.a.trained(), p.a.grad());
    }
    if (dx_mode != grad_mode::ignore) {
      ops::ragged_gemm(ctx, slots.offsets, p.blocks, du, p.a.value(), transpose::no, dx);
    }
  }
};

static_assert(rank_space_expert<mixed_rank_lora>);

}  // namespace talpa
