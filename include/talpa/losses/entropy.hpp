// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/losses/explain.hpp>
#include <talpa/routing/entropy.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// H of softmax(logits) of a row.
template <class Entropy>
struct entropy_row {
  static constexpr row_term_uses uses{.number = true};

  Entropy kind;

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T>) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    return kind.template value<T>(g, p);
  }

  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    auto slope = g.template elements<T>();
    kind.template slopes<T>(g, p, slope);
    const auto mean = g.template sum<T>([&](auto e) { return math::mul(p[e], slope[e]); });
    const auto scale = g.uniform(math::mul(d.scale, d.number));
    g.for_each([&](auto e) {
      g.store(out.dlogits, e, math::mul(scale, math::mul(p[e], slope[e] - mean)));
    });
  }
};

}  // namespace detail

/// Loss that is the mean entropy of the router's probabilities: its weight makes routers decide.
///
/// Forward: mean over real tokens of H(softmax(u_n)), H as Entropy says (entropy::shannon, tsallis,
/// renyi; routing/entropy.hpp); which tokens are looked at together as Pooling says
/// (balance::per_layer, pooled, per_sequence).
/// Backward: dlogits_ne = dvalue p_ne (h_ne - sum_j p_nj h_nj) / n with h = dH/dp and n the tokens
/// of the group; dgates is zero.
/// Shapes: per layer logits [N, E]; value [1, 1].
/// Value: of a layer 0 when every token is sure of one expert, its minimum; 1 for equal logits, its
/// greatest (ln E where normalised is false, for Tsallis its own greatest value).
/// Edges: E = 1 gives 0; a logit of -inf has p = 0 and gets no gradient; NaN, +inf, or -inf
/// everywhere gives NaN; a group without tokens gives 0; padding counts as absent unless
/// include_padding is set, and then its logits must be numbers.
/// Cost: one pass over the logits forward, one backward; keeps one number a group.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error for an index or epsilon of the entropy that is out of range; shape_error,
/// value_error as the other losses.
/// Source: Li et al. 2025, DynMoLE (arXiv 2504.00661): entropy_loss<entropy::tsallis,
/// balance::pooled>{.entropy = {.q = 1.1, .epsilon = 1e-5}, .include_padding = true} repeats its
/// code, which leaves padding in this mean but not in its balance loss; the default leaves it out.
/// Huang et al. 2024 (arXiv 2403.07652): entropy_loss<entropy::shannon> with .normalised = false.
template <class Entropy, class Pooling = balance::per_layer>
struct entropy_loss {
  static constexpr const char* name = "entropy_loss";

  Entropy entropy{};             ///< kind and its index
  bool include_padding = false;  ///< true: padding counts as tokens, as in the code of DynMoLE

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    entropy.validate(name);
    return group_loss_forward(ctx, name, Pooling::groups, group(), layers);
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
    group_loss_backward(ctx, name, Pooling::groups, group(), layers, kept, dvalue, out, mode);
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
  detail::mean_row_term<detail::entropy_row<Entropy>> group() const {
    return {{entropy}, include_padding};
  }
};

static_assert(loss_policy<entropy_loss<entropy::shannon>> &&
              loss_policy<entropy_loss<entropy::tsallis, balance::pooled>> &&
              loss_policy<entropy_loss<entropy::renyi, balance::per_sequence>>);

}  // namespace talpa
