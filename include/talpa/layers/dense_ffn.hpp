// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/bank.hpp>
#include <talpa/experts/glu_ffn.hpp>
#include <talpa/ops/gated_activation.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/unit_rows.hpp>
#include <talpa/routing/routing.hpp>

#include <string>
#include <type_traits>

namespace talpa {

/// Layer that is one gated feed-forward network for all tokens: y = D (act(G x) * (U x)), SwiGLU
/// with act = silu. What factored_ffn cuts into experts.
///
/// Backward, with a = G x, b = U x, h = act(a) b: dD += h^T dy, dh = dy D^T, da = dh b act'(a),
/// db = dh act(a), dG += da^T x, dU += db^T x, dx = da G + db U.
/// Shapes: x and y [N, D]; parameters as a bank of one glu_ffn: gate and up [F, D], and down stored
/// transposed [F, D]: neuron j is row j of each. The number F of neurons is that of the parameters.
/// Edges: N = 0.
/// Cost: 6 N D F flop forward, twice that backward; saves 2 N F numbers.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error.
/// Source: Shazeer 2020 (arXiv 2002.05202).
template <activation_function Act = silu>
struct dense_ffn {
  static constexpr const char* name = "dense_ffn";

  Act act{};

  template <class T, class B>
  using params = typename glu_ffn<Act>::template params<T, B>;

  template <class T, class B>
  struct saved {
    matrix_view<T, B> a;  // [N, F] G x
    matrix_view<T, B> b;  // [N, F] U x
  };

  /// F = `neurons`; parameters named `prefix`gate, `prefix`up and `prefix`down.
  template <class T, class B>
  params<T, B> init(index features, index neurons, generator& random,
                    const std::string& prefix = "") const {
    const glu_ffn<Act> one{.hidden = neurons, .act = act};
    one.validate();
    return one.template init<T, B>(features, features, 1, random, prefix);
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.down.cols();
  }

  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, mode,
                      const std::type_identity_t<batch_info<T, B>>& = {}) const {
    check_shape(name, "x", x, x.rows, p.gate.cols(), "tokens, input width of the network");
    check_shape(name, "y", y, x.rows, p.down.cols(), "tokens, output width of the network");
    const saved<T, B> kept{ctx.memory.template take<T>(x.rows, p.gate.rows()),
                           ctx.memory.template take<T>(x.rows, p.gate.rows())};
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto h = ctx.scratch.template take<T>(x.rows, p.gate.rows());  // [N, F]
    ops::gemm(ctx, x, transpose::no, p.gate.value(), transpose::yes, T{0}, kept.a);
    ops::gemm(ctx, x, transpose::no, p.up.value(), transpose::yes, T{0}, kept.b);
    ops::gated_activation(ctx, act, kept.a, kept.b, h);
    ops::gemm(ctx, h, transpose::no, p.down.value(), transpose::no, T{0}, y);
    return kept;
  }

  template <floating T, backend B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<const T, B>> dy,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* = nullptr) const {
    check_shape(name, "x", x, kept.a.rows, p.gate.cols(), "tokens of forward, width of x");
    check_shape(name, "dy", dy, x.rows, p.down.cols(), "tokens, output width of the network");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto h = ctx.scratch.template take<T>(x.rows, p.gate.rows());   // [N, F]
    const auto da = ctx.scratch.template take<T>(x.rows, p.gate.rows());  // [N, F]
    if (p.down.trainable()) {
      ops::gated_activation(ctx, act, kept.a, kept.b, h);
      add_gradient<B, T>(ctx, p.down, h, dy);
    }
    ops::gemm(ctx, dy, transpose::no, p.down.value(), transpose::yes, T{0}, da);
    ops::gated_activation_backward(ctx, act, kept.a, kept.b, da, da, h);
    add_gradient<B, T>(ctx, p.gate, da, x);
    add_gradient<B, T>(ctx, p.up, h, x);
    input_gradient<B, T>(ctx, p.gate, da, dx, dx_mode);
    input_gradient<B, T>(ctx, p.up, h, dx,
                         dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate);
  }

  /// Writes what the neurons say, h = act(G x) * (U x) [N, F]. With `unit_length` tokens and rows
  /// of G and U are divided by their lengths before, so that a neuron is judged by its direction.
  template <floating T, backend B>
  void neurons(context<B>& ctx, const params<T, B>& p,
               std::type_identity_t<matrix_view<const T, B>> x,
               std::type_identity_t<matrix_view<T, B>> h, bool unit_length = false) const {
    check_shape(name, "x", x, x.rows, p.gate.cols(), "tokens, input width of the network");
    check_shape(name, "h", h, x.rows, p.gate.rows(), "tokens, neurons");
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto b = ctx.scratch.template take<T>(h.rows, h.cols);  // [N, F]
    const auto unit = [&](matrix_view<const T, B> m) -> matrix_view<const T, B> {
      if (!unit_length) return m;
      constexpr double epsilon = 1e-12;
      const auto u = ctx.scratch.template take<T>(m.rows, m.cols);
      const auto inverse = ctx.scratch.template take<T>(m.rows, 1);
      ops::unit_rows(ctx, m, epsilon, u, inverse);
      return u;
    };
    const auto tokens = unit(x);
    ops::gemm(ctx, tokens, transpose::no, unit(p.gate.value()), transpose::yes, T{0}, h);
    ops::gemm(ctx, tokens, transpose::no, unit(p.up.value()), transpose::yes, T{0}, b);
    ops::gated_activation(ctx, act, h, b, h);
  }
};

}  // namespace talpa
