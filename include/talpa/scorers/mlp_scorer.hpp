// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/activation.hpp>
#include <talpa/ops/unit_rows.hpp>
#include <talpa/scorers/explain.hpp>

#include <string>

namespace talpa {

/// Scorer with one hidden layer: logits = f(z V^T + c) W^T (+ b), with z = x, or x / |x| with
/// `.normalise`.
///
/// Forward: a = z V^T (+ c), h = f(a), logits = h W^T (+ b); f is any activation of ops.
/// Backward: dW += dlogits^T h, db += column sums of dlogits, da = (dlogits W) f'(a),
/// dV += da^T z, dc += column sums of da, dz = da V, dx = dz, or through the length of x.
/// Shapes: x [N, D], V [H, D], c [1, H], W [E, H], b [1, E], logits [N, E].
/// Initialisation: V and W uniform in +-1 / sqrt(columns), biases `initial_bias`.
/// Edges: normalise divides by max(|x|, epsilon), so a token of zeros stays zero.
/// Cost: 2 N H (D + E) flop forward, twice that backward; keeps 2 N H numbers, N (D + 1) more with
/// normalise.
/// Determinism: same bits for any number of threads.
/// Throws: value_error for hidden or epsilon out of range; shape_error from the front doors of ops.
/// Source: LD-MoLE (arXiv 2509.25684), whose lambda is such a scorer with one output, relu, both
/// biases and initial_bias -2.5; MoEfication (arXiv 2110.01786), whose router has tanh, no bias and
/// a normalised input, and begins with the centroids of clusters in V and the identity in W: copy
/// them in. LLaMA-MoE takes the latter without the normalisation.
template <activation_function Activation = relu>
struct mlp_scorer {
  static constexpr const char* name = "mlp_scorer";

  index hidden = 16;          ///< H, >= 1
  bool hidden_bias = true;    ///< whether c exists
  bool bias = false;          ///< whether b exists
  double initial_bias = 0.0;  ///< first value of both biases
  bool normalise = false;     ///< whether the input is divided by its length
  double epsilon = 1e-12;     ///< shortest length to divide by, > 0
  Activation activation{};

  template <class T, class B>
  struct params {
    affine_params<T, B> down;  // V [H, D], c [1, H]
    affine_params<T, B> up;    // W [E, H], b [1, E]

    template <class F>
    void visit(F f) {
      down.visit(f);
      up.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    matrix_view<T, B> unit;     // [N, D] x / |x|, empty without normalise
    matrix_view<T, B> inverse;  // [N, 1] 1 / |x|
    matrix_view<T, B> a;        // [N, H] in front of f
    matrix_view<T, B> h;        // [N, H] behind it
  };

  /// Parameters named `prefix`down.weight, `prefix`down.bias, `prefix`up.weight, `prefix`up.bias.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    check_at_least(name, "hidden", hidden, 1, "width of the hidden layer");
    check_value(epsilon > 0.0, name, "epsilon", epsilon, "> 0");
    params<T, B> p;
    p.down = init_affine<T, B>(inputs, hidden, hidden_bias, true, random, prefix + "down.");
    p.up = init_affine<T, B>(hidden, experts, bias, true, random, prefix + "up.");
    for (parameter<T, B>* q : {&p.down.bias, &p.up.bias}) {
      if (q->exists()) fill_constant(q->value(), static_cast<T>(initial_bias));
    }
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index) const {
    const auto bytes = [](index count) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * sizeof(T));
    };
    return 2 * bytes(tokens * hidden) + (normalise ? bytes(tokens * inputs) + bytes(tokens) : 0);
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode, const batch_info<T, B>&) const {
    saved<T, B> kept{};
    if (normalise) {
      kept.unit = ctx.memory.template take<T>(x.rows, x.cols);
      kept.inverse = ctx.memory.template take<T>(x.rows, 1);
      ops::unit_rows(ctx, x, epsilon, kept.unit, kept.inverse);
    }
    kept.a = ctx.memory.template take<T>(x.rows, hidden);
    kept.h = ctx.memory.template take<T>(x.rows, hidden);
    affine_forward(ctx, p.down, normalise ? input<T, B>(kept.unit) : x, kept.a);
    ops::activation(ctx, activation, kept.a, kept.h);
    affine_forward(ctx, p.up, kept.h, logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto da = ctx.scratch.template take<T>(x.rows, hidden);  // [N, H]
    affine_backward(ctx, p.up, kept.h, dlogits, da, grad_mode::overwrite);
    ops::activation_backward(ctx, activation, kept.a, da, da, grad_mode::overwrite);
    if (!normalise) {
      affine_backward(ctx, p.down, x, da, dx, dx_mode);
      return;
    }
    matrix_view<T, B> dunit;
    if (dx_mode != grad_mode::ignore) dunit = ctx.scratch.template take<T>(x.rows, x.cols);
    affine_backward(ctx, p.down, kept.unit, da, dunit,
                    dx_mode == grad_mode::ignore ? dx_mode : grad_mode::overwrite);
    ops::unit_rows_backward(ctx, kept.unit, kept.inverse, epsilon, dunit, dx, dx_mode);
  }
};

static_assert(scorer_policy<mlp_scorer<>>);

}  // namespace talpa
