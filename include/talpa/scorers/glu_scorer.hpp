// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/affine.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/activation.hpp>
#include <talpa/ops/mul.hpp>
#include <talpa/scorers/explain.hpp>

#include <string>

namespace talpa {

namespace detail {

/// f(x) = |x|; the derivative at 0 is 0.
struct absolute_value {
  template <floating T>
  TALPA_HD T value(T x) const {
    return x < T{0} ? -x : x;
  }
  template <floating T>
  TALPA_HD T derivative(T x) const {
    return x > T{0} ? T{1} : (x < T{0} ? T{-1} : T{0});
  }
};

}  // namespace detail

/// Scorer that is one representative SwiGLU neuron for each expert: logits = |u silu(v)|, u = x
/// Wu^T, v = x Wg^T.
///
/// Backward, with h = u silu(v) and dh = dlogits sign(h): du = dh silu(v), dv = dh u silu'(v), then
/// those of two linear maps; sign(0) = 0.
/// Shapes: x [N, D], Wu and Wg [E, D], logits [N, E].
/// Initialisation: both uniform in +-1 / sqrt(D); CMoE copies the rows of each cluster's
/// representative neuron in, divided by their lengths.
/// Edges: a logit is never negative and has a kink at 0.
/// Cost: 4 N D E flop forward, twice that backward; keeps 4 N E numbers.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error from the front doors of ops.
/// Source: CMoE (arXiv 2502.04416), whose router is analytic; its bias for the choice belongs to
/// the
/// selector.
struct glu_scorer {
  static constexpr const char* name = "glu_scorer";

  template <class T, class B>
  struct params {
    affine_params<T, B> up;    // Wu [E, D]
    affine_params<T, B> gate;  // Wg [E, D]

    template <class F>
    void visit(F f) {
      up.visit(f);
      gate.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    matrix_view<T, B> u;     // [N, E]
    matrix_view<T, B> v;     // [N, E]
    matrix_view<T, B> silu;  // [N, E] silu(v)
    matrix_view<T, B> h;     // [N, E]
  };

  /// Parameters named `prefix`up.weight and `prefix`gate.weight.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    params<T, B> p;
    p.up = init_affine<T, B>(inputs, experts, false, true, random, prefix + "up.");
    p.gate = init_affine<T, B>(inputs, experts, false, true, random, prefix + "gate.");
    return p;
  }

  /// Bytes that one forward of N tokens keeps in ctx.memory.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index, index experts) const {
    return 4 * workspace<B>::rounded(static_cast<std::size_t>(tokens * experts) * sizeof(T));
  }

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, input<T, B> x, output<T, B> logits,
                      mode, const batch_info<T, B>&) const {
    const auto take = [&] { return ctx.memory.template take<T>(x.rows, logits.cols); };
    const saved<T, B> kept{take(), take(), take(), take()};
    affine_forward(ctx, p.up, x, kept.u);
    affine_forward(ctx, p.gate, x, kept.v);
    ops::activation(ctx, talpa::silu{}, kept.v, kept.silu);
    ops::mul(ctx, kept.u, kept.silu, kept.h);
    ops::activation(ctx, detail::absolute_value{}, kept.h, logits);
    return kept;
  }

  template <class T, class B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept, input<T, B> x,
                input<T, B> dlogits, output<T, B> dx, grad_mode dx_mode) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dh = ctx.scratch.template take<T>(x.rows, dlogits.cols);  // [N, E]
    const auto dv = ctx.scratch.template take<T>(x.rows, dlogits.cols);  // [N, E]
    ops::activation_backward(ctx, detail::absolute_value{}, kept.h, dlogits, dh,
                             grad_mode::overwrite);
    ops::mul(ctx, dh, kept.u, dv);
    ops::activation_backward(ctx, talpa::silu{}, kept.v, dv, dv, grad_mode::overwrite);
    ops::mul(ctx, dh, kept.silu, dh);
    affine_backward(ctx, p.up, x, dh, dx, dx_mode);
    affine_backward(ctx, p.gate, x, dv, dx,
                    dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate);
  }
};

static_assert(scorer_policy<glu_scorer>);

}  // namespace talpa
