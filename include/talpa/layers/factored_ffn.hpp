// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/analysis/neuron_split.hpp>
#include <talpa/core/transfer.hpp>
#include <talpa/experts/glu_ffn.hpp>
#include <talpa/layers/moe_ffn.hpp>
#include <talpa/ops/expert_errors.hpp>
#include <talpa/ops/gather.hpp>
#include <talpa/ops/scale.hpp>
#include <talpa/routing/always_on.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/top_k.hpp>

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>

namespace talpa {

/// What makes up for the experts that are off, for k of E.
namespace rescale {

/// E / k: the sum over all experts, estimated from those that are on.
struct exact {
  static constexpr double factor(index experts, index k) {
    return static_cast<double>(experts) / static_cast<double>(k);
  }
};
/// The integer part of E / k, as the code of FactorLLM has it: 1 for 3 of 4.
struct floored {
  static constexpr double factor(index experts, index k) {
    return static_cast<double>(experts / k);
  }
};
/// 1: the others are left out (MoEfication), or the gates say how much.
struct none {};

}  // namespace rescale

namespace detail {

/// Rows of a matrix in the given order, on the host.
template <class T>
matrix<T, cpu> rows_in_order(matrix_view<const T, cpu> from, const index* first, index rows) {
  matrix<T, cpu> to(rows, from.cols);
  for (index r = 0; r < rows; ++r) std::copy_n(from.row(first[r]), from.cols, to.view().row(r));
  return to;
}
template <class T, backend B>
matrix<T, cpu> rows_in_order(matrix_view<const T, B> from, const index* first, index rows) {
  const matrix<T, cpu> all = to_host(from);
  return rows_in_order(all.view(), first, rows);
}

}  // namespace detail

/// Puts the neurons of a dense network in the order of a split, in place: the network stays the
/// same function but for the order of a sum, and its experts become blocks of rows, which
/// factored_ffn::borrow can look at. On a device by way of the host.
///
/// Throws: value_error when the split is not of its neurons; the network is then unchanged.
template <class Network>
void reorder_neurons(Network& dense, const neuron_split& split) {
  detail::check_order("reorder_neurons", split.order, dense.gate.rows());
  for (auto* p : {&dense.gate, &dense.up, &dense.down}) {
    const auto sorted =
        detail::rows_in_order(std::as_const(*p).value(), split.order.data(), split.neurons());
    to_device(sorted.view(), p->value());
  }
}

/// Layer of the neurons of a dense feed-forward network, split into experts of which a router turns
/// some on: y = c sum_e g_e(x) f_e(x) + sum_s f_s(x), f_e the network of the neurons of expert e
/// alone, f_s those of shared experts, c as Rescale says (E / k for k of E experts).
///
/// The sum of all experts is the dense network, so k = E with hard gates gives it back. With hard
/// gates the router gets no gradient from y: teach it by prior_approximate with the labels of
/// `label`, or take straight_through in the place of top_k.
/// Backward: that of moe_ffn with scale c.
/// Shapes: x and y [N, D]; an expert has F / (E + shared_experts) neurons, as the parameters say.
/// Edges: N = 0; experts without tokens get zero gradients; padding gets shared experts alone.
/// Cost: at inference the products of (k + shared) / (E + shared) of the dense network and the
/// router's; in training the same, or all experts with straight_through.
/// Determinism: same bits for any number of threads.
/// Throws: shape_error, value_error before any work.
/// Source: FactorLLM (arXiv 2408.11855): router with bias, hard gates, rescale::floored in its
/// code. The code hands the teacher's output to the next layer as its input, where only the first
/// layer's is right: give `label` the tokens that the layer sees.
template <class Router = router<linear_scorer, top_k<gate::hard>>, class Rescale = rescale::exact,
          activation_function Act = silu>
struct factored_ffn {
  using expert_type = glu_ffn<Act>;
  using mixture_type = moe_ffn<Router, expert_type>;
  static constexpr bool rescales = !std::is_same_v<Rescale, rescale::none>;
  static_assert(
      !rescales || requires(const Router r) { r.selector.k; },
      "talpa: factored_ffn rescales by the share k / E of a selector with a member k, "
      "for others write rescale::none as its second argument");

  static constexpr const char* name = "factored_ffn";

  Router router{};
  index experts = 4;         ///< E, >= 1: routed experts
  index shared_experts = 0;  ///< >= 0: experts that are always on
  Act act{};

  template <class T, class B>
  using network = typename expert_type::template params<T, B>;
  template <class T, class B>
  using params = typename mixture_type::template params<T, B>;
  template <class T, class B>
  using saved = typename mixture_type::template saved<T, B>;

  /// c.
  double scale() const {
    if constexpr (rescales) {
      return Rescale::factor(experts, router.selector.k);
    } else {
      return 1.0;
    }
  }
  void validate() const {
    check_at_least(name, "experts", experts, 1, "at least one expert");
    check_at_least(name, "shared_experts", shared_experts, 0, "experts that are always on");
    router.selector.validate(experts);
  }

  /// Experts with copies of the dense network's weights: they train, the network keeps its own.
  /// Parameters are named `prefix`router.*, `prefix`expert.*, `prefix`shared.*.
  ///
  /// Throws: value_error when the split is not of this network or has other numbers of experts.
  template <class T, class B>
  params<T, B> split(const network<T, B>& dense, const neuron_split& split, generator& random,
                     const std::string& prefix = "") const {
    validate();
    detail::check_order(name, split.order, dense.gate.rows());
    const index hidden =
        detail::neurons_of_expert(name, dense.gate.rows(), experts + shared_experts);
    check_range(name, "split.hidden", split.hidden, hidden, hidden, "neurons of one expert");
    check_range(name, "split.shared", split.shared, shared_experts, shared_experts,
                "shared_experts");
    params<T, B> p = with_router(dense, random, prefix);
    const index* const first = split.order.data();
    const index always = shared_experts * hidden;
    p.expert = copy(dense, first + always, experts * hidden, prefix + "expert.");
    if (shared_experts > 0) p.shared = copy(dense, first, always, prefix + "shared.");
    return p;
  }

  /// Experts that are windows on the rows of the dense network, in its own order, without a copy;
  /// see reorder_neurons. They are frozen, for inference and for training the router: what changes
  /// them changes the network.
  ///
  /// Throws: value_error when the neurons do not divide.
  template <class T, class B>
  params<T, B> borrow(network<T, B>& dense, generator& random,
                      const std::string& prefix = "") const {
    validate();
    const index hidden =
        detail::neurons_of_expert(name, dense.gate.rows(), experts + shared_experts);
    params<T, B> p = with_router(dense, random, prefix);
    const index always = shared_experts * hidden;
    p.expert = window(dense, always, experts * hidden, prefix + "expert.");
    if (shared_experts > 0) p.shared = window(dense, 0, always, prefix + "shared.");
    return p;
  }

  template <class T, class B>
  index output_width(const params<T, B>& p) const {
    return p.expert.down.cols();
  }
  /// Most routed experts of a token.
  index max_selected() const { return router.selector.max_selected(experts); }

  /// Writes y; keeps what backward reads in ctx.memory.
  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p,
                      std::type_identity_t<matrix_view<const T, B>> x,
                      std::type_identity_t<matrix_view<T, B>> y, mode m,
                      const std::type_identity_t<batch_info<T, B>>& batch = {}) const {
    validate();
    detail::neurons_of_expert(name, p.expert.gate.rows(), experts);
    check_shape(name, "x", x, x.rows, output_width(p), "tokens, width of the layer");
    check_shape(name, "y", y, x.rows, x.cols, "shape of x");
    return mixture_of(p).forward(ctx, p, x, y, m, batch);
  }

  /// As moe_ffn::backward.
  template <floating T, backend B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<const T, B>> dy,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* from_losses = nullptr) const {
    mixture_of(p).backward(ctx, p, kept, x, dy, dx, dx_mode, from_losses);
  }

  template <class T, class B>
  struct labels {
    matrix_view<T, B> errors;   ///< [N, E] of each expert
    routing_view<T, B> chosen;  ///< the k experts with the least
  };

  /// Pseudo-labels of tokens h: the k experts that, each by itself, come nearest to 1 / c of the
  /// target, which is what the routed experts ought to add up to (the teacher's output, less that
  /// of shared experts). In ctx.memory; ties to the lower expert.
  ///
  /// Errors of expert e: mean over d of (f_e(h)_d - target_d / c)^2.
  /// Edges: with k = 1 of E = 2 and experts that are the dense network's own, both errors are equal
  /// in exact arithmetic, and rounding chooses.
  /// Cost: that of all experts, and E N (D + 2 H) numbers of memory that are free again at the end.
  /// Throws: shape_error, value_error.
  template <floating T, backend B>
  labels<T, B> label(context<B>& ctx, const params<T, B>& p, index k,
                     std::type_identity_t<matrix_view<const T, B>> h,
                     std::type_identity_t<matrix_view<const T, B>> target) const {
    validate();
    check_range(name, "k", k, 1, experts, "experts");
    detail::neurons_of_expert(name, p.expert.gate.rows(), experts);
    check_shape(name, "h", h, h.rows, output_width(p), "tokens, width of the layer");
    check_shape(name, "target", target, h.rows, h.cols, "shape of h");
    const labels<T, B> l{ctx.memory.template take<T>(h.rows, experts),
                         {ctx.memory.template take<T>(h.rows, experts),
                          ctx.memory.template take<std::uint32_t>(h.rows, mask_words(experts))}};
    const typename workspace<B>::scope memory(ctx.memory);
    const typename workspace<B>::scope scratch(ctx.scratch);
    const routing_view<T, B> on = always_on<T>(ctx, ctx.memory, h.rows, experts);
    const auto sorted = sort_slots<T, B>(ctx, on, experts);
    const index slots = sorted.slots.capacity();
    const auto h_slots = ctx.scratch.template take<T>(slots, h.cols);     // [E N, D]
    const auto outputs = ctx.scratch.template take<T>(slots, h.cols);     // [E N, D]
    const auto nearness = ctx.scratch.template take<T>(h.rows, experts);  // [N, E]
    ops::gather(ctx, sorted.slots, h, h_slots);
    mixture_of(p).expert.forward_grouped(ctx, p.expert, sorted.slots, sorted.gates, h_slots,
                                         outputs);
    ops::expert_errors(ctx, outputs, target, 1.0 / scale(), l.errors);
    ops::scale(ctx, T{-1}, l.errors, nearness);
    ops::select(ctx, top_k<gate::hard>{.k = k}, nearness, {}, l.chosen.gates, l.chosen.mask);
    return l;
  }
  /// The same for the k of the router's selector.
  template <floating T, backend B>
  labels<T, B> label(context<B>& ctx, const params<T, B>& p,
                     std::type_identity_t<matrix_view<const T, B>> h,
                     std::type_identity_t<matrix_view<const T, B>> target) const {
    return label(ctx, p, router.selector.k, h, target);
  }

 private:
  template <class T, class B>
  mixture_type mixture_of(const params<T, B>& p) const {
    mixture_type m;
    m.router = router;
    m.expert = m.shared = {.hidden = p.expert.gate.rows() / experts, .act = act};
    m.experts = experts;
    m.shared_experts = shared_experts;
    m.scale = scale();
    return m;
  }
  template <class T, class B>
  params<T, B> with_router(const network<T, B>& dense, generator& random,
                           const std::string& prefix) const {
    params<T, B> p;
    p.router = router.template init<T, B>(dense.gate.cols(), experts, random, prefix + "router.");
    return p;
  }
  template <class T, class B>
  static network<T, B> copy(const network<T, B>& dense, const index* first, index rows,
                            const std::string& prefix) {
    const auto take = [&](const parameter<T, B>& from, const char* which) {
      matrix<T, cpu> taken = detail::rows_in_order(from.value(), first, rows);
      if constexpr (std::same_as<B, cpu>) {
        return parameter<T, B>(prefix + which, std::move(taken));
      } else {
        return parameter<T, B>(prefix + which, to_device<B>(taken.view()));
      }
    };
    network<T, B> p;
    p.gate = take(dense.gate, "gate");
    p.up = take(dense.up, "up");
    p.down = take(dense.down, "down");
    return p;
  }
  template <class T, class B>
  static network<T, B> window(network<T, B>& dense, index first, index rows,
                              const std::string& prefix) {
    const auto look = [&](parameter<T, B>& at, const char* which) {
      return parameter<T, B>::borrow(prefix + which, at.value().row_range(first, rows));
    };
    network<T, B> p;
    p.gate = look(dense.gate, "gate");
    p.up = look(dense.up, "up");
    p.down = look(dense.down, "down");
    return p;
  }
};

}  // namespace talpa
