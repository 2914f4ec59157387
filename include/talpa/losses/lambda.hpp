// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <talpa/core/check.hpp>
#include <talpa/losses/explain.hpp>
#include <talpa/routing/group_loss.hpp>
#include <talpa/routing/row_softmax.hpp>

#include <limits>
#include <span>
#include <type_traits>

namespace talpa {

namespace detail {

/// 1 - lambda of a row: softplus(-control) + epsilon.
template <class T, class G>
TALPA_HD typename G::template value<T> missing_lambda(const G& g, const routed_row<T>& in,
                                                      double epsilon) {
  return math::softplus(-g.load(in.control)) + g.uniform(static_cast<T>(epsilon));
}

/// Writes d number / d control of 1 - lambda where it is `wanted`, and zeros to the logits.
template <class T, class G, class C>
TALPA_HD void missing_lambda_backward(const G& g, const routed_row<T>& in,
                                      const row_term_gradient<T>& d,
                                      const routed_row_gradient<T>& out, const C& wanted) {
  const auto zero = g.uniform(T{0});
  const auto slope = -math::sigmoid(-g.load(in.control));
  const auto scale = g.uniform(math::mul(d.scale, d.number));
  g.store(out.dcontrol, talpa::select(wanted, math::mul(scale, slope), zero));
  g.for_each([&](auto e) { g.store(out.dlogits, e, zero); });
}

struct lambda_mean_row {
  static constexpr row_term_uses uses{.number = true, .control = true};

  double epsilon;

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T>) const {
    return missing_lambda(g, in, epsilon);
  }
  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    const auto zero = g.uniform(T{0});
    missing_lambda_backward(g, in, d, out, zero == zero);
  }
};

/// relu(lower_k - lambda) of a row, where lower_k - lambda = (1 - lambda) - sum_{j <= k} (u_(j) -
/// u_(k + 1)) with u_(1) >= u_(2) >= ... the sorted logits.
struct lambda_sparsity_row {
  static constexpr row_term_uses uses{.number = true, .control = true};

  index k;
  double epsilon;

  template <class T, class G>
  TALPA_HD typename G::template value<T> forward(const G& g, const routed_row<T>& in,
                                                 row_pointer<T>) const {
    const auto zero = g.uniform(T{0});
    const auto lacking = lack<T>(g, in);
    return talpa::select(lacking <= zero, zero, lacking);
  }
  template <class T, class G>
  TALPA_HD void backward(const G& g, const routed_row<T>& in, const row_term_gradient<T>& d,
                         const routed_row_gradient<T>& out) const {
    missing_lambda_backward(g, in, d, out, lack<T>(g, in) > g.uniform(T{0}));
  }

 private:
  template <class T, class G>
  TALPA_HD typename G::template value<T> lack(const G& g, const routed_row<T>& in) const {
    const auto u = row_logits<T>(g, in.logits);
    const auto zero = g.uniform(T{0}), one = g.uniform(T{1});
    auto taken = g.template elements<T>();
    g.for_each([&](auto e) { taken[e] = zero; });
    const auto best = [&] {
      return g.template arg_max<T>([&](auto e) { return u[e]; },
                                   [&](auto e) { return taken[e] == zero; });
    };
    for (index rank = 0; rank < k; ++rank) {
      const auto found = best();
      g.for_each(
          [&](auto e) { taken[e] = talpa::select(e.expert() == found.expert, one, taken[e]); });
    }
    const auto next = best().value;
    // With k finite logits or fewer, no more than k experts can be on: nothing is lacking.
    const auto some = next > -g.uniform(std::numeric_limits<T>::infinity());
    const auto gap = g.template sum<T>([&](auto e) {
      const auto counted = some & (taken[e] > zero);
      return talpa::select(counted, u[e] - next, zero);
    });
    const auto lacking = talpa::select(some, missing_lambda(g, in, epsilon) - gap, zero);
    const auto invalid = row_invalid<T>(g, u);
    return talpa::select(invalid, g.uniform(std::numeric_limits<T>::quiet_NaN()), lacking);
  }
};

}  // namespace detail

/// Loss that is the mean of 1 - lambda: it pushes the width lambda of the sparse simplex
/// projection of every token up, which turns experts off.
///
/// Forward: mean over real tokens of 1 - lambda_n, lambda = ln sigmoid(control) + 1 - epsilon;
/// summed over layers.
/// Backward: dcontrol_n = -dvalue sigmoid(-control_n) / n, n the layer's real tokens; dlogits and
/// dgates are zero.
/// Shapes: per layer control [N, 1]; value [1, 1].
/// Value: above epsilon a layer, its infimum as control grows; epsilon + ln 2 for control 0.
/// Edges: control of NaN or -inf gives NaN or infinity; a layer without real tokens gives 0;
/// padding counts as absent.
/// Cost: one pass over the controls forward; keeps one number a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error unless 0 <= epsilon < 1; shape_error for a layer without control.
/// Source: Zhuang et al. 2025, LD-MoLE, and its code (lam_sparse).
struct lambda_mean {
  static constexpr const char* name = "lambda_mean";

  double epsilon = 1e-2;  ///< as the selector's, 0..1

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
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
  detail::mean_row_term<detail::lambda_mean_row> group() const { return {{epsilon}}; }
};

static_assert(loss_policy<lambda_mean>);

/// Loss that pushes lambda up until at most k experts of a token are on.
///
/// Forward: mean over real tokens of relu(lower_k - lambda_n), lower_k = 1 - (u_(1) + ... + u_(k) -
/// k u_(k + 1)) of the sorted logits, lambda = ln sigmoid(control) + 1 - epsilon; summed over
/// layers.
/// Backward: dcontrol_n = -dvalue sigmoid(-control_n) / n where lower_k > lambda_n; the logits are
/// constants here, so dlogits is zero, and so is dgates.
/// Shapes: per layer logits [N, E], control [N, 1]; value [1, 1].
/// Value: 0 when no token needs more than k experts, its minimum; the mean of 1 - lambda for equal
/// logits, its greatest.
/// Edges: a token with k finite logits or fewer gives 0; NaN, +inf, or -inf everywhere gives NaN; a
/// layer without real tokens gives 0; padding counts as absent.
/// Cost: k + 1 passes over a row of logits forward and backward; keeps one number a layer.
/// Determinism: same bits on every backend and number of threads.
/// Throws: value_error unless 1 <= k < E, which the original needs too without saying so, and
/// unless 0 <= epsilon < 1; shape_error for a layer without control.
/// Source: Zhuang et al. 2025, LD-MoLE, and its code (sparsity).
struct lambda_sparsity {
  static constexpr const char* name = "lambda_sparsity";

  index k = 2;            ///< experts that may be on, 1..E - 1
  double epsilon = 1e-2;  ///< as the selector's, 0..1

  template <class T, class B>
  using saved = group_loss_saved<T, B>;

  template <class T, class B>
  saved<T, B> forward(context<B>& ctx, std::span<const routed_view<T, B>> layers) const {
    check_value(epsilon >= 0.0 && epsilon < 1.0, name, "epsilon", epsilon, "0..1");
    for (const routed_view<T, B>& layer : layers) {
      check_range(name, "k", k, 1, layer.logits.cols - 1, "experts - 1");
    }
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
  detail::mean_row_term<detail::lambda_sparsity_row> group() const { return {{k, epsilon}}; }
};

static_assert(loss_policy<lambda_sparsity>);

}  // namespace talpa
