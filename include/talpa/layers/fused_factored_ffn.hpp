// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/analysis/neuron_split.hpp>
#include <talpa/core/half.hpp>
#include <talpa/layers/factored_ffn.hpp>
#include <talpa/layers/fused_moe_ffn.hpp>
#include <talpa/ops/convert.hpp>
#include <talpa/ops/expert_errors.hpp>
#include <talpa/ops/grouped_gemm.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/ops/slot_glu.hpp>
#include <talpa/routing/always_on.hpp>
#include <talpa/routing/routing.hpp>
#include <talpa/routing/segments.hpp>
#include <talpa/selectors/top_k.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace talpa {

/// `factored_ffn` of a device: the neurons of a dense feed-forward network, stored as halves and
/// split into experts of which a linear router turns some on: y = c sum_e g_e(x) f_e(x) +
/// sum_s f_s(x), c as Rescale says (E / k for k of E experts).
///
/// Forward and backward: those of fused_moe_ffn with scale c. The neurons are copied, half by half;
/// they are frozen until `train_experts` or `train_shared`. With hard gates the router gets no
/// gradient from y: teach it by prior_approximate with the labels of `label`, or take
/// straight_through in the place of top_k.
/// Shapes: x, y, dy and dx [N, D]; an expert has F / (E + shared_experts) neurons.
/// Ranges: as fused_moe_ffn.
/// Edges: N = 0; experts without tokens get zero gradients; padding gets shared experts alone.
/// Cost: as fused_moe_ffn.
/// Determinism: the same bits on every run.
/// Throws: shape_error, value_error before any work.
/// Source: as factored_ffn.
template <class Selector = top_k<gate::hard>, class Rescale = rescale::exact,
          half_storage S = bfloat16, activation_function Act = silu>
struct fused_factored_ffn {
  using mixture_type = fused_moe_ffn<Selector, S, Act>;
  static constexpr bool rescales = !std::is_same_v<Rescale, rescale::none>;
  static_assert(
      !rescales || requires(const Selector s) { s.k; },
      "talpa: fused_factored_ffn rescales by the share k / E of a selector with a member k, for "
      "others write rescale::none as its second argument");

  static constexpr const char* name = "fused_factored_ffn";
  using storage = S;

  Selector selector{};
  index experts = 4;         ///< E, >= 1: routed experts
  index shared_experts = 0;  ///< >= 0: experts that are always on
  bool bias = false;         ///< whether the router has a bias (FactorLLM has)
  Act act{};

  template <class B>
  using params = typename mixture_type::template params<B>;
  template <class B>
  using saved = typename mixture_type::template saved<B>;

  /// c.
  double scale() const {
    if constexpr (rescales) {
      return Rescale::factor(experts, selector.k);
    } else {
      return 1.0;
    }
  }
  void validate() const {
    check_at_least(name, "experts", experts, 1, "at least one expert");
    check_at_least(name, "shared_experts", shared_experts, 0, "experts that are always on");
    selector.validate(experts);
  }

  /// Experts of the neurons of a dense network, in the order of `split`: gate, up and down [F, D],
  /// a row a neuron, as dense_ffn has them. Parameters are named as those of fused_moe_ffn.
  ///
  /// Cost: a few copies for each run of neighbours that the split leaves together.
  /// Throws: value_error when the split is not of this network or has other numbers of experts;
  /// shape_error.
  template <class B>
  params<B> split(context<B>& ctx, std::type_identity_t<matrix_view<const S, B>> gate,
                  std::type_identity_t<matrix_view<const S, B>> up,
                  std::type_identity_t<matrix_view<const S, B>> down, const neuron_split& split,
                  generator& random, const std::string& prefix = "") const {
    validate();
    check_network(gate, up, down);
    detail::check_order(name, split.order, gate.rows);
    const index hidden = detail::neurons_of_expert(name, gate.rows, experts + shared_experts);
    check_range(name, "split.hidden", split.hidden, hidden, hidden, "neurons of one expert");
    check_range(name, "split.shared", split.shared, shared_experts, shared_experts,
                "shared_experts");
    const auto in_order = [&](matrix_view<const S, B> from) {
      matrix<S, B> to(from.rows, from.cols);
      const std::vector<index>& order = split.order;
      for (std::size_t first = 0, last = 0; first < order.size(); first = last) {
        last = first + 1;
        while (last < order.size() && order[last] == order[last - 1] + 1) ++last;
        const auto rows = static_cast<index>(last - first);
        ops::convert(ctx, from.row_range(order[first], rows),
                     to.view().row_range(static_cast<index>(first), rows));
      }
      return to;
    };
    const matrix<S, B> g = in_order(gate), u = in_order(up), d = in_order(down);
    return mixture(hidden).init(ctx, g.view(), u.view(), d.view(), random, prefix);
  }
  /// The same in the order of the network, experts behind one another, first the shared ones.
  template <class B>
  params<B> split(context<B>& ctx, std::type_identity_t<matrix_view<const S, B>> gate,
                  std::type_identity_t<matrix_view<const S, B>> up,
                  std::type_identity_t<matrix_view<const S, B>> down, generator& random,
                  const std::string& prefix = "") const {
    validate();
    check_network(gate, up, down);
    const index hidden = detail::neurons_of_expert(name, gate.rows, experts + shared_experts);
    return mixture(hidden).init(ctx, gate, up, down, random, prefix);
  }

  /// As fused_moe_ffn.
  template <class B>
  void train_experts(context<B>& ctx, params<B>& p) const {
    mixture_of(p).train_experts(ctx, p);
  }
  template <class B>
  void train_experts(context<B>& ctx, params<B>& p, std::span<const index> which) const {
    mixture_of(p).train_experts(ctx, p, which);
  }
  template <class B>
  void train_shared(context<B>& ctx, params<B>& p) const {
    mixture_of(p).train_shared(ctx, p);
  }
  template <class B>
  void refresh(context<B>& ctx, params<B>& p) const {
    mixture_of(p).refresh(ctx, p);
  }
  /// Most routed experts of a token.
  index max_selected() const { return selector.max_selected(experts); }
  /// Bytes that one forward of N tokens saves in ctx.memory, an upper bound.
  template <class B>
  std::size_t saved_bytes(const params<B>& p, index tokens) const {
    return mixture_of(p).template saved_bytes<B>(tokens);
  }

  /// Writes y; keeps what backward reads in ctx.memory.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p,
                   std::type_identity_t<matrix_view<const S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask = {}) const {
    check_tokens(p, x, y);
    return mixture_of(p).forward(ctx, p, x, y, m, padding_mask);
  }
  /// The same, and the totals of the routing in the launch that routes.
  template <class B>
  saved<B> forward(context<B>& ctx, const params<B>& p,
                   std::type_identity_t<matrix_view<const S, B>> x,
                   std::type_identity_t<matrix_view<S, B>> y, mode m,
                   vector_input<std::uint8_t, B> padding_mask,
                   const std::type_identity_t<wanted_totals<float, B>>& totals) const {
    check_tokens(p, x, y);
    return mixture_of(p).forward(ctx, p, x, y, m, padding_mask, totals);
  }

  /// As fused_moe_ffn::backward.
  template <class B>
  void backward(
      context<B>& ctx, params<B>& p, const saved<B>& kept,
      std::type_identity_t<matrix_view<const S, B>> x,
      std::type_identity_t<matrix_view<const S, B>> dy, std::type_identity_t<matrix_view<S, B>> dx,
      grad_mode dx_mode, mode m,
      const std::type_identity_t<routed_gradient<float, B>>* from_losses = nullptr) const {
    mixture_of(p).backward(ctx, p, kept, x, dy, dx, dx_mode, m, from_losses);
  }

  template <class B>
  struct labels {
    matrix_view<float, B> errors;   ///< [N, E] of each expert
    routing_view<float, B> chosen;  ///< the k experts with the least
  };

  /// Pseudo-labels of tokens h: the k experts that, each by itself, come nearest to 1 / c of the
  /// target, as factored_ffn::label has them. In ctx.memory; ties to the lower expert.
  ///
  /// Shapes: h [N, D] in S, target [N, D] in S or float. Errors are in float, of outputs whose last
  /// sum is not rounded to S.
  /// Cost: that of all experts, and E N (D + 3 H) numbers of memory that are free again at the end.
  /// Throws: shape_error, value_error.
  template <class B, class C>
  requires(std::same_as<std::remove_const_t<C>, S> || std::same_as<std::remove_const_t<C>, float>)
      labels<B> label(context<B>& ctx, const params<B>& p, index k,
                      std::type_identity_t<matrix_view<const S, B>> h, matrix_view<C, B> target)
  const {
    validate();
    check_range(name, "k", k, 1, experts, "experts");
    const index hidden = detail::neurons_of_expert(name, p.down_stored.rows(), experts);
    const index n = h.rows, features = p.features();
    check_shape(name, "h", h, n, features, "tokens, width of the layer");
    check_shape(name, "target", target, n, features, "shape of h");
    const labels<B> l{ctx.memory.template take<float>(n, experts),
                      {ctx.memory.template take<float>(n, experts),
                       ctx.memory.template take<std::uint32_t>(n, mask_words(experts))}};
    const typename workspace<B>::scope memory(ctx.memory);
    const typename workspace<B>::scope scratch(ctx.scratch);
    const auto sorted =
        make_segmented<float>(ctx, always_on<float>(ctx, ctx.memory, n, experts), n * experts);
    const segments<B>& slots = sorted.slots;
    const index places = slots.capacity();
    const auto ab = ctx.scratch.template take<S>(places, 2 * hidden);         // [E N, 2 H]
    const auto z = ctx.scratch.template take<S>(places, hidden);              // [E N, H]
    const auto outputs = ctx.scratch.template take<float>(places, features);  // [E N, D]
    const auto nearness = ctx.scratch.template take<float>(n, experts);       // [N, E]
    ops::mixed_grouped_gemm(ctx, slots.offsets, h, slots.token_of_slot, p.gate_up_stored.view(),
                            transpose::yes, ab);
    ops::slot_glu(ctx, act, slots, matrix_view<const S, B>(ab), sorted.gate_of_slot, z);
    ops::mixed_grouped_gemm(ctx, slots.offsets, matrix_view<const S, B>(z), {},
                            p.down_stored.view(), transpose::no, outputs);
    matrix_view<const float, B> wanted;  // [N, D]
    if constexpr (std::same_as<std::remove_const_t<C>, float>) {
      wanted = target;
    } else {
      const auto exact = ctx.scratch.template take<float>(n, features);
      ops::convert(ctx, matrix_view<const S, B>(target), exact);
      wanted = exact;
    }
    ops::expert_errors(ctx, matrix_view<const float, B>(outputs), wanted, 1.0 / scale(), l.errors);
    ops::scale(ctx, -1.0f, matrix_view<const float, B>(l.errors), nearness);
    ops::select(ctx, top_k<gate::hard>{.k = k}, matrix_view<const float, B>(nearness), {},
                l.chosen.gates, l.chosen.mask);
    return l;
  }
  /// The same for the k of the selector.
  template <class B, class C>
  labels<B> label(context<B>& ctx, const params<B>& p,
                  std::type_identity_t<matrix_view<const S, B>> h, matrix_view<C, B> target) const {
    return label(ctx, p, selector.k, h, target);
  }

 private:
  static void check_network(const auto& gate, const auto& up, const auto& down) {
    check_shape(name, "up", up, gate.rows, gate.cols, "shape of gate");
    check_shape(name, "down", down, gate.rows, gate.cols, "shape of gate");
  }
  template <class B>
  void check_tokens(const params<B>& p, matrix_view<const S, B> x, matrix_view<S, B> y) const {
    validate();
    check_shape(name, "x", x, x.rows, p.features(), "tokens, width of the layer");
    check_shape(name, "y", y, x.rows, x.cols, "shape of x");
  }
  mixture_type mixture(index hidden) const {
    return {selector, hidden, experts, act, shared_experts, scale(), bias};
  }
  template <class B>
  mixture_type mixture_of(const params<B>& p) const {
    return mixture(detail::neurons_of_expert(name, p.down_stored.rows(), experts));
  }
};

}  // namespace talpa
