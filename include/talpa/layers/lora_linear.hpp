// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/lora.hpp>
#include <talpa/layers/input_dropout.hpp>
#include <talpa/layers/linear.hpp>
#include <talpa/ops/fill.hpp>

#include <string>
#include <utility>

namespace talpa {

/// Layer that adds one low-rank update to a linear map: y = x W^T (+ b) + s B A dropout(x). What a
/// mixture is compared with.
///
/// Backward, with u = A x and z = s u: dB += z^T dy, du = s dy B^T, dA += du^T x,
/// dx = dy W + du A (through the dropout mask).
/// Shapes: x [N, D], y [N, O], A [R, D], B transposed [R, O]; saved: u [N, R], with
/// dropout on the CPU the bits of its mask, [N, ceil(D / 32)] words.
/// Cost: 2 N D O + 2 N R (D + O) flop forward, twice the second that backward.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error, value_error before any work.
/// Source: Hu et al. 2021 (arXiv 2106.09685).
struct lora_linear {
  static constexpr const char* name = "lora_linear";

  lora adapter{};

  template <class T, class B>
  struct params {
    affine_params<T, B> base;    // W [O, D], b [1, O]
    lora::params<T, B> adapter;  // A [R, D], B [R, O]

    /// Every parameter in a fixed order: base, adapter.
    template <class F>
    void visit(F f) {
      base.visit(f);
      adapter.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    index tokens = 0;
    lora::saved<T, B> adapter;  // u [N, R]
    input_dropout<B> dropout;
  };

  /// Adapter on `base`, which keeps its trainability: freeze it first for adapter tuning.
  template <class T, class B>
  params<T, B> init(affine_params<T, B> base, generator& random,
                    const std::string& prefix = "") const {
    adapter.validate();
    params<T, B> p;
    const index inputs = base.weight.cols(), outputs = base.weight.rows();
    p.base = std::move(base);
    p.adapter = adapter.init<T, B>(inputs, outputs, 1, random, detail::concat(prefix, "adapter."));
    return p;
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.base.weight.rows();
  }

  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, mode m,
                      const std::type_identity_t<batch_info<T, B>>& batch = {}) const {
    adapter.validate();
    check_shape(name, "x", x, x.rows, p.base.weight.cols(), "tokens, input width of the base");
    check_shape(name, "y", y, x.rows, p.base.weight.rows(), "tokens, output width of the base");
    saved<T, B> kept;
    kept.tokens = x.rows;
    kept.dropout = input_dropout<B>::draw(name, adapter.dropout, m, batch);
    affine_forward(ctx, p.base, x, y);
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto gates = unit_gates<T>(ctx, x.rows);  // [N, 1]
    kept.adapter = adapter.forward_masked(ctx, p.adapter, gates, kept.dropout.begin(ctx, x), y);
    return kept;
  }

  /// Adds to the gradients of what trains; writes or adds to dx as dx_mode says.
  template <floating T, backend B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<const T, B>> dy,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* = nullptr) const {
    check_shape(name, "x", x, kept.tokens, p.base.weight.cols(),
                "tokens of forward, input width of the base");
    check_shape(name, "dy", dy, x.rows, p.base.weight.rows(), "tokens, output width of the base");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    affine_backward(ctx, p.base, x, dy, dx, dx_mode);

    const grad_mode add = dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate;

    const typename workspace<B>::scope scope(ctx.scratch);
    const auto gates = unit_gates<T>(ctx, x.rows);                       // [N, 1]
    const auto dgates = ctx.scratch.template take<T>(x.rows, index{1});  // [N, 1], not wanted
    const matrix_view<const T, B> dropped = kept.dropout.apply(ctx, x);  // [N, D]
    kept.dropout.through(ctx, dx, add, [&](matrix_view<T, B> share, grad_mode share_mode) {
      adapter.backward_masked(ctx, p.adapter, kept.adapter, gates, dropped, dy, dgates, share,
                              share_mode);
    });
  }

 private:
  /// The gates of a single expert that is always on.
  template <class T, class B>
  static matrix_view<T, B> unit_gates(context<B>& ctx, index tokens) {
    const auto gates = ctx.scratch.template take<T>(tokens, index{1});  // [N, 1]
    ops::fill(ctx, T{1}, gates);
    return gates;
  }
};

}  // namespace talpa
