// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/exp_scale.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/unit_rows.hpp>
#include <talpa/scorers/explain.hpp>

#include <cmath>
#include <string>

namespace talpa {

/// Scorer by direction alone: logits = cos(x, w_e) / temperature.
///
/// Forward: c_ne = (x_n / |x_n|) . (w_e / |w_e|), logits = c / temperature; with `.learned` the
/// temperature is exp(-s) of a parameter s, so that it stays positive.
/// Backward: dc = dlogits / temperature, through both lengths to x and W; ds += sum of dlogits
/// logits.
/// Shapes: x [N, D], W [E, D], s [1, 1], logits [N, E].
/// Initialisation: W uniform in +-1 / sqrt(D), s = -ln temperature.
/// Value: logits lie in +-1 / temperature.
/// Edges: lengths below epsilon are taken as epsilon, so a token of zeros scores 0 everywhere and
/// its gradient is that of a linear map divided by epsilon.
/// Cost: 2 N D E flop and two passes over x and W forward, twice that backward; keeps N (D + 1) + E
/// (D + 1) numbers, N E more with `.learned`.
/// Determinism: same bits for any number of threads.
/// Throws: value_error for temperature or epsilon out of range; shape_error from the front doors of
/// ops.
/// Source: Chi et al. 2022, X-MoE (arXiv 2204.09179), which learns the temperature; the projection
/// to fewer dimensions in front of it is left out.
struct cosine_scorer {
  static constexpr const char* name = "cosine_scorer";

  double temperature = 0.07;  ///< what cosines are divided by, > 0; its first value if learned
  bool learned = false;       ///< whether the temperature is a parameter
  double epsilon = 1e-4;      ///< shortest length to divide by, > 0

  template <class T, class B>
  struct params {
    parameter<T, B> weight;     // W [E, D]
    parameter<T, B> log_scale;  // s [1, 1], absent unless learned

    template <class F>
    void visit(F f) {
      f(weight);
      if (log_scale.exists()) f(log_scale);
    }
  };

  template <class T, class B>
  struct saved {
    matrix_view<T, B> tokens;          // [N, D] x / |x|
    matrix_view<T, B> token_inverse;   // [N, 1]
    matrix_view<T, B> experts;         // [E, D] w / |w|
    matrix_view<T, B> expert_inverse;  // [E, 1]
    matrix_view<T, B> cosine;          // [N, E], empty unless learned
  };

  /// Parameters named `prefix`weight and `prefix`log_scale.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    check_value(temperature > 0.0, name, "temperature", temperature, "> 0");
    check_value(epsilon > 0.0, name, "epsilon", epsilon, "> 0");
    params<T, B> p;
    matrix<T, B> w(experts, inputs);
    fill_uniform(w.view(), 1.0 / std::sqrt(static_cast<double>(inputs)), random);
    p.weight = parameter<T, B>(prefix + "weight", std::move(w));
    if (learned) {
      matrix<T, B> s(1, 1);
      fill_constant(s.view(), static_cast<T>(-std::log(temperature)));
      p.log_scale = parameter<T, B>(prefix + "log_scale", std::move(s));
    }
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    const auto bytes = [](index count) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * sizeof(T));
    };
    return bytes(tokens * inputs) + bytes(tokens) + bytes(experts * inputs) + bytes(experts) +
           (learned ? bytes(tokens * experts) : 0);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode, const batch_info<T, B>&) const {
    const index e = p.weight.rows(), d = p.weight.cols();
    saved<T, B> kept{};
    kept.tokens = ctx.memory.template take<T>(x.rows, x.cols);
    kept.token_inverse = ctx.memory.template take<T>(x.rows, 1);
    kept.experts = ctx.memory.template take<T>(e, d);
    kept.expert_inverse = ctx.memory.template take<T>(e, 1);
    ops::unit_rows(ctx, x, epsilon, kept.tokens, kept.token_inverse);
    ops::unit_rows(ctx, p.weight.value(), epsilon, kept.experts, kept.expert_inverse);
    if (!p.log_scale.exists()) {
      ops::gemm(ctx, static_cast<T>(1.0 / temperature), kept.tokens, transpose::no, kept.experts,
                transpose::yes, T{0}, logits);
      return kept;
    }
    kept.cosine = ctx.memory.template take<T>(x.rows, e);
    ops::gemm(ctx, kept.tokens, transpose::no, kept.experts, transpose::yes, T{0}, kept.cosine);
    ops::exp_scale(ctx, p.log_scale.value(), kept.cosine, logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    input<T, B> dcosine = dlogits;
    T factor = static_cast<T>(1.0 / temperature);
    if (p.log_scale.exists()) {
      const auto scaled = ctx.scratch.template take<T>(dlogits.rows, dlogits.cols);  // [N, E]
      ops::exp_scale_backward(ctx, p.log_scale.value(), kept.cosine, dlogits, scaled,
                              grad_mode::overwrite,
                              p.log_scale.trainable() ? p.log_scale.grad() : matrix_view<T, B>());
      dcosine = scaled;
      factor = T{1};
    }
    for (const row_run& run : p.weight.trained()) {
      const auto dunit = ctx.scratch.template take<T>(run.rows, p.weight.cols());
      ops::gemm(ctx, factor, dcosine.col_range(run.first, run.rows), transpose::yes, kept.tokens,
                transpose::no, T{0}, dunit);
      ops::unit_rows_backward(ctx, kept.experts.row_range(run.first, run.rows),
                              kept.expert_inverse.row_range(run.first, run.rows), epsilon, dunit,
                              p.weight.grad().row_range(run.grad_first, run.rows),
                              grad_mode::accumulate);
    }
    if (dx_mode == grad_mode::ignore) return;
    const auto dtokens = ctx.scratch.template take<T>(x.rows, x.cols);  // [N, D]
    ops::gemm(ctx, factor, dcosine, transpose::no, kept.experts, transpose::no, T{0}, dtokens);
    ops::unit_rows_backward(ctx, kept.tokens, kept.token_inverse, epsilon, dtokens, dx, dx_mode);
  }
};

static_assert(scorer_policy<cosine_scorer>);

}  // namespace talpa
