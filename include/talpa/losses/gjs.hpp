// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/routing/entropy.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// max(H(softmax(logits)), floor ln E) of a row, in nats.
struct floored_entropy_row {
  static constexpr row_term_uses uses{.number = true};

  double floor, epsilon;

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T>) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    const auto h = kind().template value<T>(g, p);
    const auto least = least_of<T>(g);
    return talpa::select(h < least, least, h);
  }

  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto p = talpa::probabilities<T>(g, exponentials<T>(g, row_logits<T>(g, in.logits)));
    auto slope = g.template elements<T>();
    kind().template slopes<T>(g, p, slope);
    const auto floored = kind().template value<T>(g, p) < least_of<T>(g);
    const auto mean = g.template sum<T>([&](auto e) { return math::mul(p[e], slope[e]); });
    const auto zero = g.uniform(T{0});
    const auto scale = talpa::select(floored, zero, g.uniform(math::mul(d.scale, d.number)));
    g.for_each([&](auto e) {
      g.store(out.dlogits, e, math::mul(scale, math::mul(p[e], slope[e] - mean)));
    });
  }

  TALPA_HD entropy::shannon kind() const {
    return {.epsilon = 0.0, .log_epsilon = epsilon, .normalised = false};
  }

 private:
  template <class T, class G>
  TALPA_HD typename G::template value<T> least_of(const G& g) const {
    return g.uniform(math::mul(static_cast<T>(floor), math::log(static_cast<T>(g.experts()))));
  }
};

/// The divergence that is missing, as a part of ln E.
struct gjs_group {
  static constexpr used_totals uses{.probability = true, .row_term = true};

  floored_entropy_row term;
  double ceiling;

  template <class G, class T>
  TALPA_HD group_value<typename G::template value<T>> operator()(
      const G& g, const totals_row<T>& in, const totals_derivative_row<T>& out) const {
    const auto zero = g.uniform(T{0});
    const bool nothing = g.experts() == 1 || !(in.tokens > T{0});
    if (nothing) {
      g.for_each([&](auto e) { g.store(out.probability, e, zero); });
      return {zero, zero, zero};
    }
    const auto tokens = g.uniform(in.tokens);
    const T greatest = math::log(static_cast<T>(g.experts()));
    auto mean = g.template elements<T>();
    g.for_each([&](auto e) { mean[e] = g.load(in.probability, e, T{0}) / tokens; });
    auto slope = g.template elements<T>();
    term.kind().template slopes<T>(g, mean, slope);
    const auto h = term.kind().template value<T>(g, mean);
    const auto most = g.uniform(math::mul(static_cast<T>(ceiling), greatest));
    const auto over = h > most;
    const auto wanted = g.uniform(math::mul(static_cast<T>(ceiling - term.floor), greatest));
    const auto found = talpa::select(over, most, h) - g.uniform(in.row_term) / tokens;
    const auto missing = (wanted - found) / g.uniform(greatest);
    // NaN stays NaN.
    const auto enough = missing <= zero;
    const auto by_entropy = g.uniform(T{1} / greatest) / tokens;
    const auto used = talpa::select(enough | over, zero, by_entropy);
    g.for_each([&](auto e) { g.store(out.probability, e, -math::mul(used, slope[e])); });
    return {talpa::select(enough, zero, missing), zero, talpa::select(enough, zero, by_entropy)};
  }
};

}  // namespace detail

/// Loss that asks for experts used evenly by tokens that each are sure: a generalised
/// Jensen-Shannon divergence of the router's probabilities, up to what is wanted of it.
///
/// Forward: relu((b - c) ln E - (min(H(mean_n p_n), b ln E) - mean_n max(H(p_n), c ln E))) / ln E
/// for the real tokens n of a layer, p = softmax(logits), H(p) = -sum p ln(p + epsilon),
/// b = balance, c = certainty; summed over layers.
/// Backward: where the value is above 0, dlogits_ne = dvalue / (n ln E) p_ne (d_e - sum_j p_nj d_j)
/// with d = dH/dp(p_n) where H(p_n) >= c ln E, less dH/dp(mean p) where H(mean p) <= b ln E; dgates
/// is zero.
/// Shapes: per layer logits [N, E]; value [1, 1].
/// Value: 0 when every token is sure (entropy up to c ln E) and the mean is even (b ln E or more),
/// its minimum; 1 - c for equal logits, b when every token is sure of the same expert; never above
/// the larger of the two.
/// Edges: E = 1 and a layer without real tokens give 0; a logit of -inf has p = 0 and gets no
/// gradient; NaN, +inf, or -inf everywhere gives NaN; padding counts as absent.
/// Cost: two passes over the logits forward, two backward; keeps E + 1 numbers a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error unless 0 <= certainty <= balance <= 1 and epsilon >= 0; shape_error,
/// value_error as the other losses.
/// Source: Liao et al. 2025, HMoRA (ICLR 2025) and its code, gamma_balance and gamma_certain there;
/// the epsilon is the code's. The code takes p of the token's scorer alone; with the logits of
/// task_mixture p is the mixture.
struct gjs {
  static constexpr const char* name = "gjs";

  double balance = 0.98;   ///< part of ln E that the entropy of the mean need not exceed, 0..1
  double certainty = 0.5;  ///< part of ln E that a token's entropy need not fall below, 0..balance
  double epsilon = 1e-9;   ///< added inside the logarithm, >= 0

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    check_value(balance >= 0.0 && balance <= 1.0, name, "balance", balance, "0..1");
    check_value(certainty >= 0.0 && certainty <= balance, name, "certainty", certainty,
                "0..balance");
    check_value(epsilon >= 0.0 && epsilon < 1.0, name, "epsilon", epsilon, "0..1");
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
  detail::gjs_group group() const { return {{certainty, epsilon}, balance}; }
};

static_assert(loss_policy<gjs>);

}  // namespace talpa
