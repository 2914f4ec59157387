// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// sum_e p_e ln(p_e / q_e) of a row, both clipped, q the softmax of its mask.
struct prior_approximate_row {
  static constexpr row_term_uses uses{.number = true};

  double clip;

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T>) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    const auto q = targets<T>(g, in);
    return g.template sum<T>([&](auto e) {
      const auto a = clipped<T>(g, p[e]), b = clipped<T>(g, q[e]);
      return math::mul(a, math::log(a) - math::log(b));
    });
  }

  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    const auto q = targets<T>(g, in);
    const auto zero = g.uniform(T{0}), one = g.uniform(T{1});
    auto slope = g.template elements<T>();
    g.for_each([&](auto e) {
      const auto a = clipped<T>(g, p[e]);
      const auto inside = math::log(a) - math::log(clipped<T>(g, q[e])) + one;
      const auto kept = a == p[e];
      slope[e] = talpa::select(kept, inside, zero);
    });
    const auto mean = g.template sum<T>([&](auto e) { return math::mul(p[e], slope[e]); });
    const auto scale = g.uniform(math::mul(d.scale, d.number));
    g.for_each([&](auto e) {
      g.store(out.dlogits, e, math::mul(scale, math::mul(p[e], slope[e] - mean)));
    });
  }

 private:
  /// softmax of the bits of the mask: 1 for an expert that is on beside exp(-1) for one that is
  /// off.
  template <class T, class G>
  TALPA_HD static auto targets(const G& g, const routed_row<T>& in) {
    const auto one = g.uniform(T{1});
    const auto less = math::exp(g.uniform(T{-1}));
    auto q = g.template elements<T>();
    g.for_each([&](auto e) { q[e] = talpa::select(g.load_bit(in.mask, e), one, less); });
    const auto sum = g.template sum<T>([&](auto e) { return q[e]; });
    g.for_each([&](auto e) { q[e] = q[e] / sum; });
    return q;
  }
  template <class T, class G, class Value>
  TALPA_HD auto clipped(const G& g, const Value& v) const {
    const auto low = g.uniform(static_cast<T>(clip));
    const auto high = g.uniform(T{1} - static_cast<T>(clip));
    const auto below = v<low, above = v> high;
    return talpa::select(below, low, talpa::select(above, high, v));
  }
};

}  // namespace detail

/// Loss that teaches a router which experts a token needs: the divergence of its probabilities from
/// the softmax of a mask that names them, its pseudo-labels.
///
/// Forward: mean over real tokens of sum_e p'_e ln(p'_e / q'_e), p = softmax(logits), q = softmax
/// of the bits of the mask, p' and q' clipped to [clip, 1 - clip]; summed over layers. The mask is
/// that of the routed_view: give it the labels there, or by labelled<prior_approximate, B>.
/// Backward: dlogits_e = dvalue p_e (s_e - sum_j p_j s_j) / n, s_e = ln(p_e / q'_e) + 1 where p_e
/// was not clipped and 0 where it was, n the layer's real tokens; the mask is a constant, dgates is
/// zero.
/// Shapes: per layer logits [N, E], mask [N, ceil(E / 32)]; value [1, 1].
/// Value: 0 at p = q, its least but for clipping. With k of E experts on, q is e / (k e + E - k) on
/// them, not 1 / k: the router never becomes sure.
/// Edges: clipped logits have no gradient, so a router that is very sure and wrong learns nothing;
/// a logit of -inf has p = 0, which is clipped; NaN, +inf, or -inf everywhere gives NaN; a layer
/// without real tokens gives 0; padding counts as absent.
/// Cost: one pass over the logits forward, one backward; keeps one number a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error, value_error, also for clip outside (0, 0.5).
/// Source: Zhao et al. 2024, FactorLLM (arXiv 2408.11855), and its code, which puts the prediction
/// first and clips after the softmax. The code takes the mean over one sequence's tokens alone; its
/// committed training step leaves the loss out, and then a router with hard gates never trains.
struct prior_approximate {
  static constexpr const char* name = "prior_approximate";

  double clip = 1e-7;  ///< least probability, above 0, below 0.5

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    check_value(clip > 0.0 && clip < 0.5, name, "clip", clip,
                "above 0, below 0.5 = least probability");
    return group_loss_forward(ctx, name, token_groups::layer, group(), layers);
  }
  /// The same for one layer.
  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, const routed_view<T, B>& layer) const {
    return forward(ctx, std::span<const routed_view<T, B>>(&layer, 1));
  }

  template <class T, class B>
  void backward(context<B>& ctx, std::type_identity_t<std::span<const routed_view<T, B>>> layers,
                const group_loss_saved<T, B>& kept, input<T, B> dvalue,
                std::type_identity_t<std::span<const routed_gradient<T, B>>> out,
                grad_mode mode) const {
    group_loss_backward(ctx, name, token_groups::layer, group(), layers, kept, dvalue, out, mode);
  }
  /// The same for one layer.
  template <class T, class B>
  void backward(context<B>& ctx, const std::type_identity_t<routed_view<T, B>>& layer,
                const group_loss_saved<T, B>& kept, input<T, B> dvalue,
                const std::type_identity_t<routed_gradient<T, B>>& out, grad_mode mode) const {
    backward(ctx, std::span<const routed_view<T, B>>(&layer, 1), kept, dvalue,
             std::span<const routed_gradient<T, B>>(&out, 1), mode);
  }

 private:
  detail::mean_row_term<detail::prior_approximate_row> group() const { return {{clip}}; }
};

static_assert(loss_policy<prior_approximate>);

}  // namespace talpa
