// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/low_rank.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/experts/explain.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/block_scale.hpp>
#include <talpa/ops/copy.hpp>
#include <talpa/ops/fill.hpp>
#include <talpa/ops/gather.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/mul.hpp>
#include <talpa/ops/rank_gate.hpp>
#include <talpa/ops/segments.hpp>
#include <talpa/ops/weight_norm.hpp>

#include <cmath>
#include <cstddef>
#include <span>
#include <string>
#include <utility>

namespace talpa {

/// What the lengths of the adapted rows are to backward.
enum class dora_norm {
  differentiated,  ///< a function of A and B: the gradient of f
  constant,        ///< numbers, as in section 4.3 of DoRA: less work, not the gradient of f
};

/// Expert that is a weight-decomposed low-rank update of a frozen map W0: rows of W0 + s B_e A_e
/// are brought to learned magnitudes, f_e(x) = m_e * (V_e x) / |V_e| - W0 x, V_e = W0 + s B_e A_e,
/// |V_e| the lengths of its rows.
///
/// f_e is what is added to W0 x, so that gate 1 of one expert is DoRA itself. With c_e = m_e /
/// |V_e| it is gated in rank space: sum_e g_e f_e(x) = (sum_e g_e (c_e - 1)) * (W0 x) + s B' (g *
/// (A x)), B'_e = diag(c_e) B_e, all experts' factors stacked.
/// Backward, with u = A_e x, z = s g u and q = s B_e u: dg = <dy, (c_e - 1) * (W0 x) + c_e * q>,
/// dc_e = sum over tokens of g dy * (W0 x + q), dm_e += dc_e / |V_e|, dV_e = -dc_e m_e / |V_e|^3 *
/// V_e by rows (zero for dora_norm::constant), dB_e += c_e * (dy^T z) + s dV_e A_e^T,
/// dA_e += (s g B'_e^T dy) x^T + s B_e^T dV_e,
/// dx += W0^T (g (c_e - 1) * dy) + A_e^T (s g B'_e^T dy). The base gets its gradient where it is
/// the expert's own and trains.
/// Shapes: base W0 [O, D], one for all experts; bank A [E R, D], B transposed [E R, O], magnitudes
/// m [E, O]; x [N, D], y [N, O].
/// Edges: an expert without tokens gets zero gradient; a fresh one contributes exactly zero; a row
/// of V_e that is zero stays so, whatever its magnitude.
/// Cost: 2 N D O flop for W0 x, which the layer's own product does not lend, as much for dx; 2 N R
/// (D + O) a token's expert as lora; and, whatever N is, 2 O D R for the lengths of each expert,
/// four times that backward. Saves u, W0 x and 3 E O numbers; one [O, D] of scratch.
/// Determinism: same bits for any number of threads.
/// Throws: value_error of validate.
/// Source: Liu et al. 2024 (arXiv 2402.09353), whose code takes the lengths for constants: that is
/// dora_norm::constant. As experts of a mixture MixDoRA of the code of MixLoRA (arXiv 2404.15159).
struct dora {
  static constexpr const char* name = "dora";
  static constexpr bool slots_only = true, sums_slots = true;

  index rank = 8;       ///< R, >= 1
  double alpha = 16.0;  ///< finite
  lora_scaling scaling = lora_scaling::by_rank;
  double dropout = 0.0;  ///< share of the input that is dropped, also for W0 x, [0, 1)
  lora_init init_a = lora_init::kaiming;
  dora_norm norm = dora_norm::differentiated;

  /// Moves only: a copy would go on looking at the base of the original.
  template <class T, class B>
  struct params {
    parameter<T, B> base;       // W0 [O, D], borrowed (adapt) or the expert's own (init)
    parameter<T, B> a;          // [E R, D]
    parameter<T, B> b;          // [E R, O]
    parameter<T, B> magnitude;  // [E, O]
    bool owns_base = false;

    params() = default;
    params(params&&) = default;
    params& operator=(params&&) = default;

    /// A borrowed base is the business of its owner.
    template <class F>
    void visit(F f) {
      if (owns_base) f(base);
      f(a);
      f(b);
      f(magnitude);
    }
  };

  /// What backward reads beside its inputs.
  template <class T, class B>
  struct saved {
    matrix_view<T, B> u;                     // [N, E R] masked, [S, R] over slots: A x
    matrix_view<T, B> wx;                    // [N, O] or [S, O]: W0 x
    matrix_view<T, B> length, ratio, shift;  // [E, O]: |V|, c, c - 1
  };

  void validate() const { detail::check_low_rank(name, rank, alpha, dropout); }
  double scale() const { return detail::low_rank_scale(scaling, alpha, rank); }
  double input_dropout() const { return dropout; }
  index width() const { return rank; }
  /// Bytes that forward saves beside `width` columns an expert.
  template <class T, class B>
  std::size_t more_saved_bytes(index rows, index outputs, index experts) const {
    const auto bytes = [](index count) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * sizeof(T));
    };
    return bytes(rows * outputs) + 3 * bytes(experts * outputs);
  }
  /// O of a bank.
  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.b.cols();
  }

  /// Bank of E experts over a base of its own, uniform in +-1 / sqrt(D); parameters named
  /// `prefix`base, and as adapt names them.
  template <class T, class B>
  params<T, B> init(index inputs, index outputs, index experts, generator& random,
                    const std::string& prefix) const {
    matrix<T, B> base(outputs, inputs);
    fill_uniform(base.view(), 1.0 / std::sqrt(static_cast<double>(inputs)), random);
    params<T, B> p = adapt<T, B>(base.view(), experts, random, prefix);
    p.base = parameter<T, B>(prefix + "base", std::move(base));
    p.owns_base = true;
    return p;
  }
  /// Bank of E experts over the map `base`, which must outlive it where it is and stay as it is;
  /// the magnitudes begin as the lengths of its rows. Parameters named `prefix`A, `prefix`B,
  /// `prefix`magnitude.
  template <class T, class B>
  params<T, B> adapt(matrix_view<T, B> base, index experts, generator& random,
                     const std::string& prefix) const {
    params<T, B> p;
    p.base = parameter<T, B>::borrow(prefix + "base", base);
    p.a = parameter<T, B>(prefix + "A", detail::make_low_rank_a<T, B>(init_a, experts * rank,
                                                                      base.cols, rank, random));
    p.b = parameter<T, B>(prefix + "B",
                          detail::make_low_rank_b<T, B>(init_a, experts * rank, base.rows, random));
    matrix<T, B> magnitude(experts, base.rows);  // on a device this waits for what writes the base
    // By the op itself: a fresh expert then has the ratio 1 exactly.
    context<B> ctx;
    const auto unused = ctx.scratch.template take<T>(index{2}, base.rows);
    for (index e = 0; e < experts; ++e) {
      const auto row = magnitude.view().row_range(e, 1);
      ops::weight_norm(ctx, base, unused.row_range(0, 1), row, unused.row_range(0, 1),
                       unused.row_range(1, 1));
    }
    if constexpr (requires { ctx.synchronise(); }) ctx.synchronise();
    p.magnitude = parameter<T, B>(prefix + "magnitude", std::move(magnitude));
    return p;
  }

  /// Only the given experts of the bank train, and the base does not.
  template <class T, class B>
  void train_experts(params<T, B>& p, std::span<const index> experts) const {
    p.magnitude.train_blocks(1, experts);
    p.a.train_blocks(rank, experts);
    p.b.train_blocks(rank, experts);
    p.base.freeze();
  }

  /// y += sum_e g_e f_e(x) over all ranks at once, zero gates included. x after dropout.
  template <class T, class B>
  saved<T, B> forward_masked(context<B>& ctx, const params<T, B>& p, input<T, B> gates,
                             input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept = keep(ctx, p, x, p.a.rows());
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, p.a.rows());    // [N, E R]
    const auto shifted = ctx.scratch.template take<T>(x.rows, y.cols);  // [N, O]
    const auto b = scaled_b(ctx, p, kept);
    ops::gemm(ctx, x, transpose::no, p.a.value(), transpose::yes, T{0}, kept.u);
    ops::rank_gate(ctx, static_cast<T>(scale()), gates, kept.u, z);
    ops::gemm(ctx, z, transpose::no, b, transpose::no, T{1}, y);
    ops::gemm(ctx, gates, transpose::no, kept.shift, transpose::no, T{0}, shifted);
    ops::mul(ctx, shifted, kept.wx, y, grad_mode::accumulate);
    return kept;
  }

  /// Overwrites dgates [N, E]; writes or adds to dx [N, D] as dx_mode says.
  template <class T, class B>
  void backward_masked(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> gates,
                       input<T, B> x, input<T, B> dy, output<T, B> dgates, output<T, B> dx,
                       grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const T s = static_cast<T>(scale());
    const auto du = ctx.scratch.template take<T>(x.rows, p.a.rows());  // [N, E R]
    const auto out = ctx.scratch.template take<T>(x.rows, dy.cols);    // [N, O]
    ops::gemm(ctx, dy, transpose::no, scaled_b(ctx, p, kept), transpose::yes, T{0}, du);
    ops::rank_gate_backward(ctx, s, gates, kept.u, du, du, dgates);
    ops::mul(ctx, dy, kept.wx, out);
    ops::gemm(ctx, out, transpose::no, kept.shift, transpose::yes, T{1}, dgates);
    if (trains(p)) {
      const auto dratio = ctx.scratch.template take<T>(gates.cols, dy.cols);  // [E, O]
      const auto g = ctx.scratch.template take<T>(p.b.rows(), dy.cols);       // [E R, O]
      const auto z = ctx.scratch.template take<T>(x.rows, p.a.rows());        // [N, E R]
      ops::gemm(ctx, gates, transpose::yes, out, transpose::no, T{0}, dratio);
      ops::rank_gate(ctx, s, gates, kept.u, z);
      ops::gemm(ctx, z, transpose::yes, dy, transpose::no, T{0}, g);
      add_gradient(ctx, p.a, du, x);
      add_weight_gradients(ctx, p, kept, g, dratio);
    }
    ops::gemm(ctx, gates, transpose::no, kept.shift, transpose::no, T{0}, out);
    ops::mul(ctx, out, dy, out);
    add_gradient(ctx, p.base, out, x);
    input_gradient(ctx, p.base, out, dx, dx_mode);
    input_gradient(ctx, p.a, du, dx,
                   dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate);
  }

  /// y_s = g_s f_e(x_s) for every slot s of expert e; x and y are in expert order, x after dropout.
  template <class T, class B>
  saved<T, B> forward_grouped(context<B>& ctx, const params<T, B>& p, const segments<B>& slots,
                              vector_input<T, B> gates, input<T, B> x, output<T, B> y) const {
    const saved<T, B> kept = keep(ctx, p, x, rank);
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto z = ctx.scratch.template take<T>(x.rows, rank);  // [S, R]
    const auto b = scaled_b(ctx, p, kept);
    ops::grouped_gemm(ctx, slots.offsets, x, p.a.value(), transpose::yes, kept.u);
    ops::rank_gate(ctx, static_cast<T>(scale()), as_column(gates), kept.u, z);
    ops::grouped_gemm(ctx, slots.offsets, as_column(gates), kept.shift, transpose::no, y);
    ops::mul(ctx, y, kept.wx, y);
    ops::grouped_gemm(ctx, slots.offsets, z, b, transpose::no, y, grad_mode::accumulate);
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
    const auto du = ctx.scratch.template take<T>(x.rows, rank);            // [S, R]
    const auto out = ctx.scratch.template take<T>(x.rows, dy.cols);        // [S, O]
    const auto of_shift = ctx.scratch.template take<T>(x.rows, index{1});  // [S, 1]
    const auto gate_column = as_column(gates);                             // [S, 1]
    ops::grouped_gemm(ctx, slots.offsets, dy, scaled_b(ctx, p, kept), transpose::yes, du);
    ops::rank_gate_backward(ctx, s, gate_column, kept.u, du, du, as_column(dgates));
    ops::mul(ctx, dy, kept.wx, out);
    ops::grouped_gemm(ctx, slots.offsets, out, kept.shift, transpose::yes, of_shift);
    ops::axpy(ctx, T{1}, of_shift, as_column(dgates));
    if (trains(p)) {
      const auto dratio = ctx.scratch.template take<T>(slots.experts(), dy.cols);  // [E, O]
      const auto g = ctx.scratch.template take<T>(p.b.rows(), dy.cols);            // [E R, O]
      const auto z = ctx.scratch.template take<T>(x.rows, rank);                   // [S, R]
      ops::fill(ctx, T{0}, dratio);
      ops::fill(ctx, T{0}, g);
      const row_run all_ratios{0, dratio.rows, 0}, all{0, g.rows, 0};
      ops::grouped_gemm_gradient(ctx, slots.offsets, gate_column, out,
                                 std::span<const row_run>(&all_ratios, 1), dratio);
      ops::rank_gate(ctx, s, gate_column, kept.u, z);
      ops::grouped_gemm_gradient(ctx, slots.offsets, z, dy, std::span<const row_run>(&all, 1), g);
      add_slot_gradient(ctx, slots, p.a, du, x);
      add_weight_gradients(ctx, p, kept, g, dratio);
    }
    if (dx_mode == grad_mode::ignore && !p.base.trainable()) return;
    ops::grouped_gemm(ctx, slots.offsets, gate_column, kept.shift, transpose::no, out);
    ops::mul(ctx, out, dy, out);
    // x may lie where dx does, so everything that reads it stands above.
    if (p.base.trainable()) {
      ops::clear_unused(ctx, slots, out);
      add_gradient(ctx, p.base, out, x);
    }
    if (dx_mode == grad_mode::ignore) return;
    input_gradient(ctx, p.base, out, dx, grad_mode::overwrite);
    ops::grouped_gemm(ctx, slots.offsets, du, p.a.value(), transpose::no, dx,
                      grad_mode::accumulate);
  }

 private:
  template <class T, class B>
  static bool trains(const params<T, B>& p) {
    return p.a.trainable() || p.b.trainable() || p.magnitude.trainable() || p.base.trainable();
  }

  /// V_e = W0 + s B_e A_e.
  template <class T, class B>
  void adapted_weight(context<B>& ctx, const params<T, B>& p, index e, output<T, B> v) const {
    ops::copy(ctx, p.base.value(), v);
    ops::gemm(ctx, static_cast<T>(scale()), p.b.value().row_range(e * rank, rank), transpose::yes,
              p.a.value().row_range(e * rank, rank), transpose::no, T{1}, v);
  }

  /// Room for A x, and everything else that is kept.
  template <class T, class B>
  saved<T, B> keep(context<B>& ctx, const params<T, B>& p, input<T, B> x, index ranks) const {
    const index experts = p.magnitude.rows(), outputs = p.magnitude.cols();
    const auto take = [&](index rows, index cols) {
      return ctx.memory.template take<T>(rows, cols);
    };
    const saved<T, B> kept{take(x.rows, ranks), take(x.rows, outputs), take(experts, outputs),
                           take(experts, outputs), take(experts, outputs)};
    ops::gemm(ctx, x, transpose::no, p.base.value(), transpose::yes, T{0}, kept.wx);
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto v = ctx.scratch.template take<T>(outputs, x.cols);  // [O, D]
    for (index e = 0; e < experts; ++e) {
      adapted_weight(ctx, p, e, v);
      ops::weight_norm(ctx, v, p.magnitude.value().row_range(e, 1), kept.length.row_range(e, 1),
                       kept.ratio.row_range(e, 1), kept.shift.row_range(e, 1));
    }
    return kept;
  }

  /// B' in scratch of the caller's scope.
  template <class T, class B>
  static matrix_view<const T, B> scaled_b(context<B>& ctx, const params<T, B>& p,
                                          const saved<T, B>& kept) {
    const auto b = ctx.scratch.template take<T>(p.b.rows(), p.b.cols());  // [E R, O]
    ops::block_scale(ctx, kept.ratio, p.b.value(), b);
    return b;
  }

  /// Gradients of B and of the magnitudes, and those of A and the base that come through the
  /// lengths. g = z^T dy [E R, O] and dratio [E, O], without q so far, are consumed.
  template <class T, class B>
  void add_weight_gradients(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                            output<T, B> g, output<T, B> dratio) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const index outputs = g.cols, inputs = p.a.cols();
    const auto v = ctx.scratch.template take<T>(outputs, inputs);  // [O, D]
    const auto da = ctx.scratch.template take<T>(rank, inputs);    // [R, D]
    const auto dm = ctx.scratch.template take<T>(index{1}, outputs);
    const T s = static_cast<T>(scale());
    ops::block_scale_backward(ctx, kept.ratio, p.b.value(), g, g, dratio);
    for (index e = 0; e < dratio.rows; ++e) {
      const index first = e * rank;
      if (!p.base.trainable() && !trains_rows(p.a, first, rank) && !trains_rows(p.b, first, rank) &&
          !trains_rows(p.magnitude, e, 1)) {
        continue;
      }
      const bool through_lengths = norm == dora_norm::differentiated;
      if (through_lengths) adapted_weight(ctx, p, e, v);
      ops::fill(ctx, T{0}, dm);
      ops::weight_norm_backward(ctx, v, kept.length.row_range(e, 1), kept.ratio.row_range(e, 1),
                                dratio.row_range(e, 1), dm,
                                through_lengths ? v : matrix_view<T, B>());
      const auto g_e = g.row_range(first, rank);  // [R, O]
      if (through_lengths) {
        ops::gemm(ctx, s, p.a.value().row_range(first, rank), transpose::no, v, transpose::yes,
                  T{1}, g_e);
        ops::gemm(ctx, s, p.b.value().row_range(first, rank), transpose::no, v, transpose::no, T{0},
                  da);
        add_rows(ctx, p.a, first, da);
        add_rows(ctx, p.base, 0, v);
      }
      add_rows(ctx, p.b, first, g_e);
      add_rows(ctx, p.magnitude, e, dm);
    }
  }
};

static_assert(rank_space_expert<dora> && base_adapting_expert<dora>);

}  // namespace talpa
