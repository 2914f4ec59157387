// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// Mean over experts of m_e p_e of a row.
struct top_k_mass_row {
  static constexpr row_term_uses uses{.number = true};

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T>) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    return mass<T>(g, in, p) / g.uniform(static_cast<T>(g.experts()));
  }

  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    const auto whole = mass<T>(g, in, p);
    const auto zero = g.uniform(T{0}), one = g.uniform(T{1});
    const auto scale = g.uniform(math::mul(d.scale, d.number) / static_cast<T>(g.experts()));
    g.for_each([&](auto e) {
      const auto on = talpa::select(g.load_bit(in.mask, e), one, zero);
      g.store(out.dlogits, e, math::mul(scale, math::mul(p[e], on - whole)));
    });
  }

 private:
  template <class T, class G, class P>
  TALPA_HD static typename G::template value<T> mass(const G& g, const routed_row<T>& in,
                                                     const P& p) {
    const auto zero = g.uniform(T{0});
    return g.template sum<T>(
        [&](auto e) { return talpa::select(g.load_bit(in.mask, e), p[e], zero); });
  }
};

}  // namespace detail

/// Loss that is the mean probability of the chosen experts over all (token, expert).
///
/// Forward: sum over real tokens n and experts e of m_ne p_ne / (n E), p = softmax(logits), n the
/// layer's real tokens; summed over layers.
/// Backward: dlogits_ne = dvalue p_ne (m_ne - sum_j m_nj p_nj) / (n E), the mask is a constant;
/// dgates is zero.
/// Shapes: per layer logits [N, E], mask [N, ceil(E / 32)]; value [1, 1].
/// Value: 1 / E a layer when the chosen experts have all probability, its greatest; K / E^2 for
/// equal logits.
/// Edges: a token without an expert adds 0; a logit of -inf has p = 0; NaN, +inf, or -inf
/// everywhere gives NaN; a layer without real tokens gives 0; padding counts as absent.
/// Cost: one pass over the logits forward, one backward; keeps one number a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: shape_error, value_error.
/// Source: Zhao et al. 2024, FactorLLM (arXiv 2408.11855), the router term of its code; minimised
/// as it is there, it lowers the mass of the chosen experts. A negative weight raises it.
struct top_k_mass {
  static constexpr const char* name = "top_k_mass";

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
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
  static detail::mean_row_term<detail::top_k_mass_row> group() { return {}; }
};

static_assert(loss_policy<top_k_mass>);

}  // namespace talpa
