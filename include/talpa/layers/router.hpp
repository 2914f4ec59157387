// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/workspace.hpp>
#include <talpa/ops/add.hpp>
#include <talpa/ops/copy.hpp>
#include <talpa/ops/select.hpp>
#include <talpa/scorers/explain.hpp>
#include <talpa/selectors/explain.hpp>

#include <string>

namespace talpa {

/// A scorer followed by a selector: any pair composes.
///
/// Forward: logits = scorer(x), (gates, mask) = selector(logits); with batch.replay the mask is the
/// recorded one and only the gates are computed.
/// Backward: dgates -> dlogits by the selector, plus what losses add to either, then the scorer.
/// Shapes: x [N, D], logits and gates [N, E], mask [N, ceil(E / 32)].
/// Throws: shape_error, value_error of the parts.
template <class Scorer, class Selector>
struct router {
  static_assert(detail::explain_scorer<Scorer>() && detail::explain_selector<Selector>());

  Scorer scorer{};
  Selector selector{};

  template <class T, class B>
  using params = typename Scorer::template params<T, B>;

  template <class T, class B>
  struct saved {
    typename Scorer::template saved<T, B> scorer;
    routed_view<T, B> routed;  // logits, gates [N, E], mask, padding: in ctx.memory
  };

  template <class T, class B>
  params<T, B> init(index inputs, index experts, generator& random,
                    const std::string& prefix) const {
    selector.validate(experts);
    return scorer.template init<T, B>(inputs, experts, random, prefix);
  }

  template <floating T, backend B>
  saved<T, B> forward(context<B>& ctx, const params<T, B>& p, index experts,
                      std::type_identity_t<matrix_view<const T, B>> x, mode m,
                      const batch_info<B>& batch) const {
    check_batch(Selector::name, batch, x.rows, experts);
    const auto logits = ctx.memory.template take<T>(x.rows, experts);  // [N, E]
    const auto gates = ctx.memory.template take<T>(x.rows, experts);   // [N, E]
    const auto mask =
        ctx.memory.template take<std::uint32_t>(x.rows, mask_words(experts));  // [N, words]
    saved<T, B> kept{scorer.forward(ctx, p, x, logits, m, batch), {}};
    if (batch.replay.data == nullptr) {
      ops::select(ctx, selector, logits, batch.padding_mask, gates, mask);
    } else {
      ops::copy(ctx, batch.replay, mask);
      ops::replay(ctx, selector, logits, batch.padding_mask, mask, gates);
    }
    kept.routed = {logits, routing_view<T, B>(gates, mask), batch.padding_mask,
                   batch.sequence_length};
    return kept;
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
    if (from_losses != nullptr) ops::axpy(ctx, T{1}, from_losses->dgates, dgates);
    ops::select_backward(ctx, selector, kept.routed.logits, kept.routed.routing.gates,
                         kept.routed.routing.mask, dgates, dlogits);
    if (from_losses != nullptr) ops::axpy(ctx, T{1}, from_losses->dlogits, dlogits);
    scorer.backward(ctx, p, kept.scorer, x, dlogits, dx, dx_mode);
  }
};

}  // namespace talpa
