// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/experts/explain.hpp>
#include <talpa/layers/linear.hpp>
#include <talpa/layers/mixture.hpp>
#include <talpa/layers/router.hpp>

#include <string>
#include <utility>

namespace talpa {

/// Layer that adds a routed mixture of low-rank experts to a linear map:
/// y = x W^T (+ b) + sum_e g_e(x) f_e(dropout(x)), g = router(x).
///
/// Backward: dg_e = <dy, f_e>, dx = dy W + sum_e g_e (df_e/dx)^T dy + router's share; the
/// parameters of router, experts and base get theirs where they train. The mask is a constant.
/// Shapes: x [N, D], y [N, O], W [O, D]; saved: logits, gates [N, E], mask, and A x: [N, E R] for
/// dense_masked, [S, R] for grouped and indexed with S set bits of the mask; with dropout on the
/// CPU the bits of its mask, [N, ceil(D / 32)] words.
/// Edges: N = 0; experts without tokens get zero gradients; padding gets the base alone; E = 1 with
/// gate 1 equals `lora_linear` bit for bit under dense_masked. Under grouped it does so on the CPU
/// with widths below 64 and at most 256 tokens, or 512 or more; else products take other tiles or
/// kernels and may round otherwise; under indexed it adds in another order.
/// Cost: 2 N D O for the base, the router's, and what strategy.hpp counts for the experts. From
/// the second step of the same sizes on the arenas take no new memory. A reserve by `plan` serves
/// ctx.memory from the first step on; ctx.scratch still settles in it. On the CPU, Eigen takes
/// packing buffers above its stack limit (128 KiB) by malloc in each product, and frees them.
/// Determinism: same bits for any number of threads; strategies differ by rounding.
/// Throws: shape_error, value_error before any work.
/// Source: MoLA (arXiv 2402.08562), LoRAMoE (arXiv 2312.09979).
template <class Router, class Expert>
struct mole_linear {
  static_assert(detail::explain_expert<Expert>());
  static_assert(rank_space_expert<Expert>,
                "talpa: mole_linear gates its experts in rank space, the expert needs "
                "forward_masked and backward_masked (docs/policies/expert.md)");

  static constexpr const char* name = "mole_linear";

  Router router{};
  Expert expert{};
  index experts = 8;  ///< E, >= 1
  strategy execution = strategy::automatic;

  template <class T, class B>
  struct params {
    affine_params<T, B> base;                       // W [O, D], b [1, O]
    typename Router::template params<T, B> router;  // linear: [E, D]
    typename Expert::template params<T, B> expert;  // lora: A [E R, D], B [E R, O]

    /// Every parameter in a fixed order: base, where there is one, router, experts.
    template <class F>
    void visit(F f) {
      if (base.weight.exists()) base.visit(f);
      router.visit(f);
      expert.visit(f);
    }
  };

  template <class T, class B>
  struct saved {
    typename Router::template saved<T, B> router;
    routed_view<T, B> routed;  // what losses and statistics read
    typename mixture<Expert>::template saved<T, B> mixed;
  };

  /// What a call of given sizes will do and need.
  struct plan_result {
    strategy used = strategy::dense_masked;
    std::size_t saved_bytes = 0;  ///< of ctx.memory, per forward
  };

  /// Adapter on `base`, which keeps its trainability: freeze it first for adapter tuning, and on
  /// the CPU pack it afterwards for speed (`params.base.pack(ctx)`). Experts that look at the base
  /// themselves (dora) take a frozen one only, and look at it where it lies: the params may be
  /// moved, but another base needs another init.
  /// Parameters are named `prefix`router.*, `prefix`expert.*.
  template <class T, class B>
  params<T, B> init(affine_params<T, B> base, generator& random,
                    const std::string& prefix = "") const {
    if constexpr (base_adapting_expert<Expert>) {
      validate<B>();
      params<T, B> p;
      p.base = std::move(base);
      check_frozen(p);
      p.router = router.template init<T, B>(p.base.weight.cols(), experts, random,
                                            detail::concat(prefix, "router."));
      p.expert = expert.template adapt<T, B>(p.base.weight.value(), experts, random,
                                             detail::concat(prefix, "expert."));
      return p;
    } else {
      params<T, B> p = init_adapter<T, B>(base.weight.cols(), base.weight.rows(), random, prefix);
      p.base = std::move(base);
      return p;
    }
  }

  /// Parameters without a base, for a map D -> O that somebody else keeps: see add_adapter.
  template <class T, class B>
  requires(!base_adapting_expert<Expert>) params<T, B> init_adapter(index inputs, index outputs,
                                                                    generator& random,
                                                                    const std::string& prefix = "")
  const {
    validate<B>();
    params<T, B> p;
    p.router =
        router.template init<T, B>(inputs, experts, random, detail::concat(prefix, "router."));
    p.expert = expert.template init<T, B>(inputs, outputs, experts, random,
                                          detail::concat(prefix, "expert."));
    return p;
  }

  template <class B = cpu>
  void validate() const {
    mixed().template validate<B>(name);
    router.selector.validate(experts);
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.base.weight.rows();
  }

  /// The strategy a forward on D -> O takes on backend B.
  template <class B = cpu>
  strategy choose(index inputs, index outputs) const {
    return mixed().template choose<B>(inputs, outputs);
  }

  /// Strategy and bytes that one forward of N tokens saves in ctx.memory, an upper bound.
  template <class T, class B>
  plan_result plan(const params<T, B>& p, index tokens) const {
    const index inputs = p.base.weight.cols(), outputs = p.base.weight.rows();
    return {choose<B>(inputs, outputs),
            router.template saved_bytes<T, B>(tokens, inputs, experts) +
                mixed().template saved_bytes<T, B>(tokens, inputs, outputs)};
  }

  /// Writes y; keeps what backward reads in ctx.memory. With mode::inference nothing is dropped.
  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, mode m,
                      const std::type_identity_t<batch_info<T, B>>& batch = {}) const {
    validate<B>();
    check_shape(name, "x", x, x.rows, p.base.weight.cols(), "tokens, input width of the base");
    check_shape(name, "y", y, x.rows, p.base.weight.rows(), "tokens, output width of the base");

    const auto dropout = mixed().draw(name, m, batch);
    if constexpr (can_join<B>) {
      if (joins(ctx, p, x.rows, batch)) {
        return forward_joined(ctx, p, x, y, m, batch, dropout.input);
      }
    }
    saved<T, B> kept;
    kept.router = router.forward(ctx, p.router, experts, x, m, batch);
    kept.routed = kept.router.routed;
    const packed_product<T, B> base = packed_base(p, x);
    if (base.b == nullptr) affine_forward(ctx, p.base, x, y);
    kept.mixed = mixed().forward(ctx, p.expert, kept.routed.routing, x, y,
                                 base.b != nullptr ? grad_mode::overwrite : grad_mode::accumulate,
                                 dropout, base);
    return kept;
  }

  /// y += sum_e g_e f_e(x): the adapter on top of what somebody else's map has made of x, with the
  /// bits of forward over an unpacked base. The base of p is not looked at, and may be none.
  ///
  /// Backward: add_adapter_backward.
  /// Shapes: x [N, D], y [N, O].
  /// Throws: shape_error with y as it was.
  template <floating T, backend B>
  saved<T, B> add_adapter(context<B>& ctx, const params<T, B>& p,
                          std::type_identity_t<matrix_view<const T, B>> x,
                          std::type_identity_t<matrix_view<T, B>> y, mode m,
                          const std::type_identity_t<batch_info<T, B>>& batch = {}) const {
    validate<B>();
    check_shape(name, "y", y, x.rows, y.cols, "tokens of x");
    const auto dropout = mixed().draw(name, m, batch);
    saved<T, B> kept;
    kept.router = router.forward(ctx, p.router, experts, x, m, batch);
    kept.routed = kept.router.routed;
    kept.mixed =
        mixed().forward(ctx, p.expert, kept.routed.routing, x, y, grad_mode::accumulate, dropout);
    return kept;
  }
  /// Backward of add_adapter: adds to the gradients of router and experts; writes their share of dx
  /// or adds it to somebody else's, as dx_mode says. `from_losses` as in backward.
  template <floating T, backend B>
  void add_adapter_backward(
      context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
      std::type_identity_t<matrix_view<const T, B>> x,
      std::type_identity_t<matrix_view<const T, B>> dy, std::type_identity_t<matrix_view<T, B>> dx,
      grad_mode dx_mode,
      const std::type_identity_t<routed_gradient<T, B>>* from_losses = nullptr) const {
    check_shape(name, "x", x, kept.routed.logits.rows, x.cols, "tokens of forward");
    check_shape(name, "dy", dy, x.rows, dy.cols, "tokens of x");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    backward_alone(ctx, p, kept, x, dy, dx, dx_mode, {}, from_losses);
  }

  /// Adds to the gradients of what trains; writes or adds to dx as dx_mode says. `from_losses`, if
  /// given, holds gradients of auxiliary losses with respect to logits and gates.
  template <floating T, backend B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<const T, B>> dy,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* from_losses = nullptr) const {
    check_shape(name, "x", x, kept.routed.logits.rows, p.base.weight.cols(),
                "tokens of forward, input width of the base");
    check_shape(name, "dy", dy, x.rows, p.base.weight.rows(), "tokens, output width of the base");
    if (dx_mode != grad_mode::ignore) check_shape(name, "dx", dx, x.rows, x.cols, "shape of x");
    if constexpr (base_adapting_expert<Expert>) check_frozen(p);
    const packed_product<T, B> base{dy, p.base.weight.packed()};
    if constexpr (can_join<B>) {
      if (kept.mixed.joined && base.b != nullptr && dx_mode != grad_mode::ignore &&
          ops::routed_linear_pays<B, T>(ctx, *base.b, x.rows, experts)) {
        affine_backward(ctx, p.base, x, dy, dx, grad_mode::ignore);
        return backward_joined(ctx, p, kept, x, base, dx, dx_mode, from_losses);
      }
    }
    affine_backward(ctx, p.base, x, dy, dx, base.b != nullptr ? grad_mode::ignore : dx_mode);
    const bool is_there = base.b == nullptr && dx_mode != grad_mode::ignore;
    backward_alone(ctx, p, kept, x, dy, dx, is_there ? grad_mode::accumulate : dx_mode, base,
                   from_losses);
  }

 private:
  /// The base's share of y, if its weight is packed.
  template <class T, class B>
  static packed_product<T, B> packed_base(const params<T, B>& p, matrix_view<const T, B> x) {
    packed_product<T, B> base{x, p.base.weight.packed_transpose()};
    if (p.base.bias.exists()) base.bias = p.base.bias.value();
    return base;
  }

  /// Backward of router and experts, and of the product with a packed base, if there is one.
  template <class T, class B>
  void backward_alone(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                      matrix_view<const T, B> x, matrix_view<const T, B> dy, matrix_view<T, B> dx,
                      grad_mode dx_mode, const packed_product<T, B>& base,
                      const routed_gradient<T, B>* from_losses) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dgates = ctx.scratch.template take<T>(x.rows, experts);  // [N, E]
    if constexpr (Router::low_rank_dx) {
      const auto dlogits = ctx.scratch.template take<T>(x.rows, experts);  // [N, E]
      mixed().backward(ctx, p.expert, kept.mixed, kept.routed.routing, x, dy, dgates, dx, dx_mode,
                       base, [&] {
                         return router.backward_low_rank(ctx, p.router, kept.router, x, dgates,
                                                         dlogits, from_losses);
                       });
    } else {
      mixed().backward(ctx, p.expert, kept.mixed, kept.routed.routing, x, dy, dgates, dx, dx_mode,
                       base);
      const grad_mode add = dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate;
      router.backward(ctx, p.router, kept.router, x, dgates, dx, add, from_losses);
    }
  }
  /// Whether router, experts and base can go through the tokens together.
  template <class B>
  static constexpr bool can_join = Router::routes_rows&& mixture<Expert>::template can_join<B>;

  template <class T, class B>
  bool joins(const context<B>& ctx, const params<T, B>& p, index tokens,
             const batch_info<T, B>& batch) const {
    const affine_params<T, B>& scorer = p.router.scorer;
    const packed_matrix<T, B>* const base = p.base.weight.packed_transpose();
    return base != nullptr && scorer.weight.packed_transpose() == nullptr &&
           batch.replay.data == nullptr &&
           choose<B>(base->rows(), base->cols()) == strategy::indexed &&
           ops::routed_linear_pays<B, T>(ctx, *base, tokens, experts);
  }
  template <class T, class B>
  saved<T, B> forward_joined(context<B>& ctx, const params<T, B>& p, matrix_view<const T, B> x,
                             matrix_view<T, B> y, mode m, const batch_info<T, B>& batch,
                             const input_dropout<B>& dropout) const {
    saved<T, B> kept;
    const auto route = [&](const routed_adapter<T, B>& adapter, matrix_view<T, B> u,
                           const routed_dropout<B>& dropped) {
      kept.router =
          router.forward_by(ctx, p.router, experts, x, m, batch,
                            [&](const auto& selector, const routed_choice<T, B>& choice) {
                              ops::routed_linear(ctx, selector, adapter, packed_base(p, x),
                                                 batch.padding_mask, choice, u, y, dropped);
                            });
      kept.routed = kept.router.routed;
      return kept.routed.routing;
    };
    kept.mixed =
        mixed().template forward_joined<T>(ctx, p.expert, p.router.scorer, x.rows, dropout, route);
    return kept;
  }
  template <class T, class B>
  void backward_joined(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                       matrix_view<const T, B> x, const packed_product<T, B>& base,
                       matrix_view<T, B> dx, grad_mode dx_mode,
                       const routed_gradient<T, B>* from_losses) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dgates = ctx.scratch.template take<T>(x.rows, experts);   // [N, E]
    const auto dlogits = ctx.scratch.template take<T>(x.rows, experts);  // [N, E]
    const routed_gradient<T, B> losses =
        from_losses != nullptr ? *from_losses : routed_gradient<T, B>{};
    const auto route = [&](const routed_adapter<T, B>& adapter,
                           const ops::routed_slots<T, B>& slots, matrix_view<T, B> du) {
      router.backward_by(ctx, p.router, kept.router, x, dlogits,
                         [&](const auto& selector, const routed_choice<const T, B>& choice) {
                           ops::routed_linear_backward(ctx, selector, adapter, base, choice, slots,
                                                       losses.dlogits, losses.dgates, dgates,
                                                       dlogits, du, dx, dx_mode);
                         });
    };
    mixed().template backward_joined<T>(ctx, p.expert, kept.mixed, p.router.scorer, x, base.a,
                                        route);
  }
  /// Experts that look at the base give it no gradient.
  template <class T, class B>
  static void check_frozen(const params<T, B>& p) {
    if (!p.base.weight.trainable()) return;
    detail::throw_value(name, "base.weight", "trainable",
                        detail::concat("frozen = what experts of kind ", Expert::name, " adapt"));
  }
  mixture<Expert> mixed() const {
    return {expert, experts, router.selector.max_selected(experts), execution};
  }
};

}  // namespace talpa
