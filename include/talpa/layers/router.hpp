// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/autograd/parameter.hpp>
#include <talpa/core/workspace.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/copy.hpp>
#include <talpa/ops/indexed_gemm.hpp>
#include <talpa/ops/route.hpp>
#include <talpa/ops/routed_linear.hpp>
#include <talpa/ops/routing_sums.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/scorers/explain.hpp>
#include <talpa/scorers/linear_scorer.hpp>
#include <talpa/selectors/explain.hpp>

#include <concepts>
#include <string>
#include <utility>

namespace talpa {

namespace detail {

/// What stands where a selector has no control.
struct no_control {
  template <class F>
  void visit(F) {}
};

template <class Selector, class T, class B>
struct control_of {
  using params = no_control;
  struct saved {};
};
template <controlled_selector Selector, class T, class B>
struct control_of<Selector, T, B> {
  static_assert(explain_scorer<typename Selector::control_scorer>());
  using params = typename Selector::control_scorer::template params<T, B>;
  using saved = typename Selector::control_scorer::template saved<T, B>;
};

/// Bytes of ctx.memory that a scorer keeps: what its saved_bytes says, nothing without one.
template <class T, class B, class Scorer>
std::size_t scorer_bytes(const Scorer& scorer, index tokens, index inputs, index experts) {
  if constexpr (requires { scorer.template saved_bytes<T, B>(tokens, inputs, experts); }) {
    return scorer.template saved_bytes<T, B>(tokens, inputs, experts);
  } else {
    return 0;
  }
}

}  // namespace detail

/// A scorer followed by a selector: any pair composes.
///
/// Forward: logits = scorer(x), (gates, mask) = selector(logits); with batch.replay the mask is the
/// recorded one and only the gates are computed. A selector with a control gets one number a token
/// from a scorer of its own, `selector.control`; a selector with a bias gets one number an expert,
/// which no gradient changes; whoever balances the experts updates it between steps. A selector
/// that behaves differently in training and at inference is told the mode.
/// Losses see the noise of a scorer that adds some (noisy_scorer).
/// Backward: dgates -> dlogits, dcontrol by the selector, plus what losses add to either, then the
/// scorers; a scorer that adds noise also takes what losses have for it.
/// Shapes: x [N, D], logits and gates [N, E], mask [N, ceil(E / 32)], control [N, 1], bias [1, E].
/// Cost: that of the parts; keeps logits, gates, mask and what the scorer keeps.
/// Determinism: from the same logits the same bits on every backend; logits by a product differ by
/// rounding between backends, not between numbers of threads.
/// Throws: shape_error, value_error of the parts.
template <class Scorer, class Selector>
struct router {
  static_assert(detail::explain_scorer<Scorer>() && detail::explain_selector<Selector>());

  Scorer scorer{};
  Selector selector{};

  template <class T, class B>
  struct params {
    typename Scorer::template params<T, B> scorer;
    typename detail::control_of<Selector, T, B>::params control;  // nothing without a control
    parameter<T, B> expert_bias;                                  // [1, E], absent without a bias

    /// Every parameter in a fixed order: scorer, control, bias.
    template <class F>
    void visit(F f) {
      scorer.visit(f);
      control.visit(f);
      if (expert_bias.exists()) f(expert_bias);
    }
    void freeze() {
      visit([](parameter<T, B>& p) { p.freeze(); });
    }
    /// All but the bias, which has no gradient.
    void train() {
      const auto thaw = [](parameter<T, B>& p) { p.train(); };
      scorer.visit(thaw);
      control.visit(thaw);
    }
  };

  template <class T, class B>
  struct saved {
    typename Scorer::template saved<T, B> scorer;
    typename detail::control_of<Selector, T, B>::saved control;
    routed_view<T, B> routed;    // logits, gates [N, E], mask, control, padding: ctx.memory
    select_inputs<T, B> more{};  // control, bias as the selector read them
    mode in = mode::training;    // of forward
  };

  /// Parameters named `prefix` and what the scorer says, `prefix`control.*, `prefix`expert_bias.
  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    selector.validate(experts);
    params<T, B> p;
    p.scorer = scorer.template init<T, B>(inputs, experts, random, prefix);
    if constexpr (controlled_selector<Selector>) {
      p.control = detail::control_member(selector).template init<T, B>(
          inputs, 1, random, detail::concat(prefix, "control."));
    }
    if constexpr (biased_selector<Selector>) {
      p.expert_bias =
          parameter<T, B>(detail::concat(prefix, "expert_bias"), matrix<T, B>(1, experts));
      p.expert_bias.freeze();
    }
    return p;
  }

  /// Bytes that one forward of N tokens saves in ctx.memory, an upper bound.
  template <class T, class B>
  std::size_t saved_bytes(index tokens, index inputs, index experts) const {
    const auto bytes = [](index count, std::size_t size) {
      return workspace<B>::rounded(static_cast<std::size_t>(count) * size);
    };
    std::size_t sum = 2 * bytes(tokens * experts, sizeof(T)) +
                      bytes(tokens * mask_words(experts), sizeof(std::uint32_t)) +
                      detail::scorer_bytes<T, B>(scorer, tokens, inputs, experts);
    if constexpr (controlled_selector<Selector>) {
      sum += bytes(tokens, sizeof(T)) +
             detail::scorer_bytes<T, B>(detail::control_member(selector), tokens, inputs, 1);
    }
    return sum;
  }

  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, index experts,
                      std::type_identity_t<matrix_view<const T, B>> x, mode m,
                      const batch_info<T, B>& batch) const {
    return forward_with(
        ctx, p, experts, x, m, batch, score(ctx, p, x, m, batch),
        [&](const Selector& now, auto logits, auto gates, auto mask, const auto& more) {
          if (batch.replay.data == nullptr) {
            ops::select(ctx, now, logits, batch.padding_mask, gates, mask, more);
          } else {
            ops::copy(ctx, batch.replay, mask);
            ops::replay(ctx, now, logits, batch.padding_mask, mask, gates, more);
          }
        });
  }
  /// The same, and the totals of the routing as ops::route leaves them: what statistics are made
  /// of (routing_statistics::wanted) and losses read, on a device in the launch that routes.
  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, index experts,
                      std::type_identity_t<matrix_view<const T, B>> x, mode m,
                      const batch_info<T, B>& batch,
                      const std::type_identity_t<wanted_totals<T, B>>& totals) const {
    saved<T, B> kept = forward_with(
        ctx, p, experts, x, m, batch, score(ctx, p, x, m, batch),
        [&](const Selector& now, auto logits, auto gates, auto mask, const auto& more) {
          if (batch.replay.data == nullptr) {
            ops::route(ctx, now, logits, batch.padding_mask, gates, mask, totals, more);
          } else {
            ops::copy(ctx, batch.replay, mask);
            ops::replay(ctx, now, logits, batch.padding_mask, mask, gates, more);
            ops::routing_sums(ctx, {logits, gates, mask, batch.padding_mask, totals.group_rows},
                              totals.out, totals.mode);
          }
        });
    kept.routed.totals = totals;
    return kept;
  }

  /// Whether all of dx is dlogits W with the weight of the scorer.
  static constexpr bool low_rank_dx =
      std::same_as<Scorer, linear_scorer> && !controlled_selector<Selector>;

  /// Whether ops::routed_linear can route: `low_rank_dx`, each token by itself.
  static constexpr bool routes_rows = low_rank_dx && !coupled_selector<Selector>;

  /// forward where route(selector, choice) makes logits, gates and mask at once.
  template <floating T, backend B, class Route>
  requires routes_rows saved<T, B> forward_by(context<B>& ctx, const params<T, B>& p, index experts,
                                              std::type_identity_t<matrix_view<const T, B>> x,
                                              mode m, const batch_info<T, B>& batch,
                                              const Route& route)
  const {
    return forward_with(
        ctx, p, experts, x, m, batch, [](auto) { return typename Scorer::template saved<T, B>{}; },
        [&](const Selector& now, auto logits, auto gates, auto mask, const auto& more) {
          route(now, routed_choice<T, B>{logits, gates, mask, more});
        });
  }
  /// backward where route_back(selector, choice) makes dlogits [N, E], all of dx among what it
  /// does.
  template <floating T, backend B, class Route>
  requires routes_rows void backward_by(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                                        std::type_identity_t<matrix_view<const T, B>> x,
                                        std::type_identity_t<matrix_view<const T, B>> dlogits,
                                        const Route& route_back) const {
    const auto& routed = kept.routed;
    route_back(selector_at(selector, kept.in),
               routed_choice<const T, B>{routed.logits, routed.routing.gates, routed.routing.mask,
                                         kept.more});
    scorer.backward(ctx, p.scorer, kept.scorer, x, dlogits, {}, grad_mode::ignore);
  }

  /// backward without dx, which is the returned product if `low_rank_dx`. dlogits [N, E] is
  /// overwritten and must live until the product is formed.
  template <floating T, backend B>
  low_rank_product<T, B> backward_low_rank(
      context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
      std::type_identity_t<matrix_view<const T, B>> x,
      std::type_identity_t<matrix_view<T, B>> dgates,
      std::type_identity_t<matrix_view<T, B>> dlogits,
      const std::type_identity_t<routed_gradient<T, B>>* from_losses) const requires(low_rank_dx) {
    logits_gradient<T, B>(ctx, kept, dgates, dlogits, {}, from_losses);
    scorer.backward(ctx, p.scorer, kept.scorer, x, dlogits, {}, grad_mode::ignore);
    return {dlogits, std::as_const(p.scorer.weight).value()};
  }

  /// dgates [N, E] is consumed: gradients of losses are added to it. dx as dx_mode says.
  template <floating T, backend B>
  void backward(context<B>& ctx, params<T, B>& p, const saved<T, B>& kept,
                std::type_identity_t<matrix_view<const T, B>> x,
                std::type_identity_t<matrix_view<T, B>> dgates,
                std::type_identity_t<matrix_view<T, B>> dx, grad_mode dx_mode,
                const std::type_identity_t<routed_gradient<T, B>>* from_losses) const {
    const typename workspace<B>::scope scope(ctx.scratch);
    const auto dlogits = ctx.scratch.template take<T>(dgates.rows, dgates.cols);  // [N, E]
    matrix_view<T, B> dcontrol;
    if constexpr (controlled_selector<Selector>) {
      dcontrol = ctx.scratch.template take<T>(dgates.rows, 1);  // [N, 1]
    }
    logits_gradient<T, B>(ctx, kept, dgates, dlogits, dcontrol, from_losses);
    if constexpr (noisy_scorer<Scorer>) {
      const routed_noise_gradient<T, B> none;
      scorer.backward(ctx, p.scorer, kept.scorer, x, dlogits, dx, dx_mode,
                      from_losses != nullptr ? from_losses->dnoise : none);
    } else {
      scorer.backward(ctx, p.scorer, kept.scorer, x, dlogits, dx, dx_mode);
    }
    if constexpr (controlled_selector<Selector>) {
      if (from_losses != nullptr && !from_losses->dcontrol.empty()) {
        ops::axpy(ctx, T{1}, from_losses->dcontrol, dcontrol);
      }
      detail::control_member(selector).backward(
          ctx, p.control, kept.control, x, dcontrol, dx,
          dx_mode == grad_mode::ignore ? dx_mode : grad_mode::accumulate);
    }
  }

 private:
  /// What makes logits by the scorer.
  template <class T, class B>
  auto score(context<B>& ctx, const params<T, B>& p, matrix_view<const T, B> x, mode m,
             const batch_info<T, B>& batch) const {
    return [this, &ctx, &p, x, m, &batch](matrix_view<T, B> logits) {
      return scorer.forward(ctx, p.scorer, x, logits, m, batch);
    };
  }
  /// forward, where score(logits) makes logits and select(selector, logits, gates, mask, more)
  /// gates and mask.
  template <class T, class B, class Score, class Select>
  saved<T, B> forward_with(context<B>& ctx, const params<T, B>& p, index experts,
                           matrix_view<const T, B> x, mode m, const batch_info<T, B>& batch,
                           const Score& score, const Select& select) const {
    check_batch(Selector::name, batch, x.rows, experts);
    const auto logits = ctx.memory.template take<T>(x.rows, experts);  // [N, E]
    const auto gates = ctx.memory.template take<T>(x.rows, experts);   // [N, E]
    const auto mask =
        ctx.memory.template take<std::uint32_t>(x.rows, mask_words(experts));  // [N, words]
    saved<T, B> kept{};
    kept.in = m;
    kept.scorer = score(logits);
    kept.more.sequence_length = batch.sequence_length;
    if constexpr (controlled_selector<Selector>) {
      const auto control = ctx.memory.template take<T>(x.rows, 1);  // [N, 1]
      kept.control = detail::control_member(selector).forward(ctx, p.control, x, control, m, batch);
      kept.more.control = control;
    }
    if constexpr (biased_selector<Selector>) kept.more.bias = p.expert_bias.value();
    select(selector_at(selector, m), logits, gates, mask, kept.more);
    kept.routed = {logits,
                   routing_view<T, B>(gates, mask),
                   batch.padding_mask,
                   batch.sequence_length,
                   kept.more.control,
                   batch.labels};
    if constexpr (noisy_scorer<Scorer>) {
      kept.routed.noise = scorer.noise(kept.scorer, kept.routed.logits);
    }
    return kept;
  }

  template <class T, class B>
  void logits_gradient(context<B>& ctx, const saved<T, B>& kept, matrix_view<T, B> dgates,
                       matrix_view<T, B> dlogits, matrix_view<T, B> dcontrol,
                       const routed_gradient<T, B>* from_losses) const {
    if (from_losses != nullptr) ops::axpy(ctx, T{1}, from_losses->dgates, dgates);
    ops::select_backward(ctx, selector_at(selector, kept.in), kept.routed.logits,
                         kept.routed.routing.gates, kept.routed.routing.mask, dgates, dlogits,
                         kept.more, dcontrol);
    if (from_losses != nullptr) ops::axpy(ctx, T{1}, from_losses->dlogits, dlogits);
  }
};

}  // namespace talpa
