// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/initialise.hpp>
#include <talpa/autograd/parameter.hpp>
#include <talpa/core/half.hpp>
#include <talpa/experts/lora.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/convert.hpp>
#include <talpa/ops/gemm.hpp>
#include <talpa/ops/mole_route.hpp>
#include <talpa/routing/routing.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace talpa {

/// `mole_linear` of a device, for a frozen base, a linear router and LoRA experts, in the storage
/// S: y = x W^T + sum_e g_e(x) s B_e A_e x, all experts' ranks at once.
///
/// The weights lie in one block [[W, B], [A; Wr, 0]] of [O + G, D + P]: P = E R and G = P + E, each
/// part rounded up to 8. So x [A; Wr]^T is one product, and where the rows of x have room for P
/// more numbers, [x, z] [W, B]^T is one more: the adapter costs P / D of the base instead of passes
/// over y. Likewise dx = [dy, du] [W; A; Wr] where the rows of dy have room for G numbers.
/// Forward: [u, logits] = x [A; Wr]^T in float; gates, mask and z = s g * u by mole_route; y.
/// Backward: dz = dy B; du and dlogits by mole_route_backward; dx; dB += z^T dy; [dA; dWr] +=
/// [du, dlogits]^T x, in float.
/// Shapes: x [N, D] or, with room, [N, D + P]; y [N, O]; dy [N, O] or [N, O + G]; saved: [u,
/// logits] [N, G] and gates [N, E] in float, mask, z [N, P] in S, which lies behind x where there
/// is room.
/// Ranges: selectors that read the logits of a token alone; no bias, no dropout.
/// Master weights A, B and Wr are float, as are their gradients: `refresh` rounds them into the
/// block after a step of an optimiser.
/// Edges: N = 0; padding gets the base alone; experts without tokens get zero gradients.
/// Cost: 2 N (D (O + G) + P O) flop forward in three launches; what all experts cost, whatever the
/// router decides.
/// Determinism: the same bits on every run; gates and mask have the bits of ops::select.
/// Throws: shape_error, value_error before any work.
/// Source: MoLA (arXiv 2402.08562); gating in rank space as in `lora`.
template <class Selector, storage_scalar S = bfloat16>
struct fused_mole_linear {
  static constexpr const char* name = "fused_mole_linear";
  using sum = sum_type<S>;
  static_assert(std::same_as<sum, float>,
                "talpa: fused_mole_linear stores its weights as bfloat16, float16 or float");

  Selector selector{};
  lora expert{};
  index experts = 8;  ///< E, >= 1

  /// P: columns of all ranks, a multiple of 8.
  index rank_width() const { return round_up(experts * expert.rank); }
  /// G: columns of [u, logits], a multiple of 8.
  index router_width() const { return rank_width() + round_up(experts); }
  /// Columns of x, of y's gradient, with room behind each row.
  index padded_inputs(index inputs) const { return inputs + rank_width(); }
  index padded_outputs(index outputs) const { return outputs + router_width(); }

  template <class B>
  struct params {
    matrix<S, B> block;          // [O + G, D + P] = [[W, B], [A; Wr, 0]]
    parameter<float, B> a;       // [E R, D]
    parameter<float, B> b;       // [E R, O]
    parameter<float, B> router;  // [E, D]

    template <class F>
    void visit(F f) {
      f(router);
      f(a);
      f(b);
    }
    index inputs() const { return a.cols(); }
    index outputs() const { return b.cols(); }
  };

  template <class B>
  struct saved {
    matrix_view<float, B> products;      // [N, G] = [u, room, logits, room]
    matrix_view<float, B> gates;         // [N, E]
    matrix_view<std::uint32_t, B> mask;  // [N, ceil(E / 32)]
    matrix_view<S, B> z;                 // [N, P]
    routed_view<float, B> routed;        // what losses and statistics read
  };

  /// Adapter on the frozen base W [O, D]. Parameters are named `prefix`router.weight,
  /// `prefix`expert.A and `prefix`expert.B and begin as those of mole_linear.
  template <class B>
  params<B> init(context<B>& ctx, matrix_view<const S, B> base, generator& random,
                 const std::string& prefix = "") const {
    validate();
    const index outputs = base.rows, inputs = base.cols;
    params<B> p;
    matrix<float, B> router(experts, inputs);
    fill_uniform(router.view(), 1.0 / std::sqrt(static_cast<double>(inputs)), random);
    p.router = parameter<float, B>(prefix + "router.weight", std::move(router));
    auto adapter = expert.template init<float, B>(inputs, outputs, experts, random,
                                                  detail::concat(prefix, "expert."));
    p.a = std::move(adapter.a);
    p.b = std::move(adapter.b);
    p.block = matrix<S, B>(outputs + router_width(), inputs + rank_width());
    ops::convert(ctx, base, base_of(p));
    refresh(ctx, p);
    return p;
  }

  /// Rounds the master weights into the block, after a step of an optimiser or after loading.
  template <class B>
  void refresh(context<B>& ctx, params<B>& p) const {
    const matrix_view<S, B> block = p.block.view();
    const index outputs = p.outputs(), inputs = p.inputs();
    ops::convert(ctx, std::as_const(p.a).value(),
                 block.row_range(outputs, p.a.rows()).col_range(0, inputs));
    ops::convert(ctx, std::as_const(p.router).value(),
                 block.row_range(outputs + rank_width(), experts).col_range(0, inputs));
    ops::convert_transposed(ctx, std::as_const(p.b).value(),
                            block.row_range(0, outputs).col_range(inputs, p.b.rows()));
  }

  void validate() const {
    check_at_least(name, "experts", experts, 1, "at least one expert");
    expert.validate();
    check_value(expert.dropout == 0.0, name, "expert.dropout", expert.dropout, "0 = no dropout");
    selector.validate(experts);
  }

  /// Bytes that one forward of N tokens saves in ctx.memory, an upper bound.
  template <class B>
  std::size_t saved_bytes(index tokens) const {
    const auto bytes = [&](index cols, std::size_t size) {
      return workspace<B>::rounded(static_cast<std::size_t>(tokens * cols) * size);
    };
    return bytes(router_width(), 4) + bytes(experts, 4) + bytes(mask_words(experts), 4) +
           bytes(rank_width(), sizeof(S));
  }

  /// Writes y. x is [N, D] or [N, D + P]: what lies behind the D numbers of a row is then
  /// overwritten, and must stay until backward.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p, std::type_identity_t<matrix_view<S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask = {}) const {
    return forward_with(ctx, p, x, y, padding_mask, [&](const mole_rows<S, B>& rows) {
      ops::mole_route(ctx, selector_at(selector, m), rows);
    });
  }
  /// The same, and the totals of the routing in the launch that routes: what statistics are made of
  /// (routing_statistics::wanted) and losses read.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p, std::type_identity_t<matrix_view<S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask,
                   const std::type_identity_t<wanted_totals<float, B>>& totals) const {
    saved<B> kept = forward_with(ctx, p, x, y, padding_mask, [&](const mole_rows<S, B>& rows) {
      ops::mole_route(ctx, selector_at(selector, m), rows, totals);
    });
    kept.routed.totals = totals;
    return kept;
  }

  /// Adds to the gradients of what trains; writes or adds to dx [N, D] as dx_mode says. x as in
  /// forward; dy is [N, O] or [N, O + G]: what lies behind the O numbers of a row is then
  /// overwritten. `from_losses`, if given, holds gradients of auxiliary losses with respect to
  /// logits and gates.
  template <class B>
  void backward(
      context<B>& ctx, params<B>& p, const saved<B>& kept,
      std::type_identity_t<matrix_view<const S, B>> x, std::type_identity_t<matrix_view<S, B>> dy,
      std::type_identity_t<matrix_view<S, B>> dx, grad_mode dx_mode, mode m,
      const std::type_identity_t<routed_gradient<float, B>>* from_losses = nullptr) const {
    const index inputs = p.inputs(), outputs = p.outputs(), n = kept.products.rows;
    const bool room = dy.cols == padded_outputs(outputs);
    if (x.cols != padded_inputs(inputs)) {
      check_shape(name, "x", x, n, inputs, "tokens of forward, input width of the base, or padded");
    }
    if (!room) {
      check_shape(name, "dy", dy, n, outputs, "tokens, output width of the base, or padded");
    }
    if (dx_mode != grad_mode::ignore) {
      check_shape(name, "dx", dx, n, inputs, "tokens, input width of the base");
    }
    const matrix_view<const S, B> block = std::as_const(p.block).view();
    const matrix_view<const S, B> tokens = x.col_range(0, inputs);
    const matrix_view<const S, B> dout = dy.col_range(0, outputs);
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dz = ctx.scratch.template take<float>(n, rank_width());
    const auto dgates = ctx.scratch.template take<float>(n, experts);
    const auto dlogits = ctx.scratch.template take<float>(n, experts);
    const matrix_view<S, B> du = room ? dy.col_range(outputs, router_width())
                                      : ctx.scratch.template take<S>(n, router_width());

    ops::mixed_gemm(ctx, 1.0f, dout, transpose::no,
                    block.row_range(0, outputs).col_range(inputs, rank_width()), transpose::no,
                    0.0f, dz);
    mole_rows_gradient<S, B> gradient{dz, {}, {}, dgates, dlogits, du, rank_width()};
    if (from_losses != nullptr) {
      gradient.dgates_losses = from_losses->dgates;
      gradient.dlogits_losses = from_losses->dlogits;
    }
    ops::mole_route_backward(ctx, selector_at(selector, m), rows_of(kept), gradient);

    if (dx_mode != grad_mode::ignore) {
      const float add = dx_mode == grad_mode::accumulate ? 1.0f : 0.0f;
      if (room) {
        ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(dy), transpose::no,
                        block.col_range(0, inputs), transpose::no, add, dx);
      } else {
        ops::mixed_gemm(ctx, 1.0f, dout, transpose::no,
                        block.row_range(0, outputs).col_range(0, inputs), transpose::no, add, dx);
        ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(du), transpose::no,
                        block.row_range(outputs, router_width()).col_range(0, inputs),
                        transpose::no, 1.0f, dx);
      }
    }
    add_product(ctx, p.b, matrix_view<const S, B>(kept.z), dout);
    const matrix_view<const S, B> dproducts = du;
    if (p.a.trainable() && p.router.trainable()) {
      // Both in one pass over x.
      const auto both = ctx.scratch.template take<float>(router_width(), inputs);  // [G, D]
      ops::mixed_gemm(ctx, 1.0f, dproducts, transpose::yes, tokens, transpose::no, 0.0f, both);
      add_part(ctx, p.a, matrix_view<const float, B>(both));
      add_part(ctx, p.router, matrix_view<const float, B>(both.row_range(rank_width(), experts)));
    } else {
      add_product(ctx, p.a, dproducts, tokens);
      add_product(ctx, p.router, dproducts.col_range(rank_width(), experts), tokens);
    }
  }

 private:
  /// forward, where route(rows) makes gates, mask and z.
  template <class B, class Route>
  saved<B> forward_with(context<B>& ctx, const params<B>& p, matrix_view<S, B> x,
                        matrix_view<S, B> y, vector_view<const std::uint8_t, B> padding_mask,
                        const Route& route) const {
    validate();
    const index inputs = p.inputs(), outputs = p.outputs(), n = x.rows;
    const bool room = x.cols == padded_inputs(inputs);
    if (!room) check_shape(name, "x", x, n, inputs, "tokens, input width of the base, or padded");
    check_shape(name, "y", y, n, outputs, "tokens, output width of the base");

    const matrix_view<const S, B> block = p.block.view();
    const matrix_view<const S, B> tokens = x.col_range(0, inputs);
    saved<B> kept;
    kept.products = ctx.memory.template take<float>(n, router_width());
    kept.z =
        room ? x.col_range(inputs, rank_width()) : ctx.memory.template take<S>(n, rank_width());
    kept.gates = ctx.memory.template take<float>(n, experts);
    kept.mask = ctx.memory.template take<std::uint32_t>(n, mask_words(experts));
    kept.routed.logits = kept.products.col_range(rank_width(), experts);
    kept.routed.routing = routing_view<const float, B>(kept.gates, kept.mask);
    kept.routed.padding_mask = padding_mask;

    ops::mixed_gemm(ctx, 1.0f, tokens, transpose::no,
                    block.row_range(outputs, router_width()).col_range(0, inputs), transpose::yes,
                    0.0f, kept.products);
    route(rows_of(kept));
    if (room) {
      ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(x), transpose::no,
                      block.row_range(0, outputs), transpose::yes, 0.0f, y);
    } else {
      ops::mixed_gemm(ctx, 1.0f, tokens, transpose::no,
                      block.row_range(0, outputs).col_range(0, inputs), transpose::yes, 0.0f, y);
      ops::mixed_gemm(ctx, 1.0f, matrix_view<const S, B>(kept.z), transpose::no,
                      block.row_range(0, outputs).col_range(inputs, rank_width()), transpose::yes,
                      1.0f, y);
    }
    return kept;
  }

  static constexpr index round_up(index n) { return ceil_div(n, 8) * 8; }

  template <class B>
  matrix_view<S, B> base_of(params<B>& p) const {
    return p.block.view().row_range(0, p.outputs()).col_range(0, p.inputs());
  }
  template <class B>
  mole_rows<S, B> rows_of(const saved<B>& kept) const {
    return {kept.products.col_range(0, experts * expert.rank),
            kept.routed.logits,
            kept.routed.padding_mask,
            kept.gates,
            kept.mask,
            kept.z,
            expert.rank,
            static_cast<float>(expert.scale())};
  }
  /// dW += du^T x for the rows of W that train.
  template <class B>
  static void add_product(context<B>& ctx, parameter<float, B>& w, matrix_view<const S, B> du,
                          matrix_view<const S, B> x) {
    for (const row_run& run : w.trained()) {
      ops::mixed_gemm(ctx, 1.0f, du.col_range(run.first, run.rows), transpose::yes, x,
                      transpose::no, 1.0f, w.grad().row_range(run.grad_first, run.rows));
    }
  }
  /// dW += the rows of a gradient of all rows that train.
  template <class B>
  static void add_part(context<B>& ctx, parameter<float, B>& w, matrix_view<const float, B> all) {
    for (const row_run& run : w.trained()) {
      ops::axpy(ctx, 1.0f, all.row_range(run.first, run.rows),
                w.grad().row_range(run.grad_first, run.rows));
    }
  }
};

}  // namespace talpa
